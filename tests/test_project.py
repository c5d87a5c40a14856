"""Rules of the project that people forget: the code map, who may import whom, file lengths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

CODE = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("relief_onnx", "cli", "benchmarks", "sample_models")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__init__.py" or folder != "benchmarks"
)
LIBRARY = [name for name in CODE if name.startswith("relief_onnx/")]


def test_the_code_map_is_true() -> None:
    section = (ROOT / "README.md").read_text().split("## Code map")[1]
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", section, re.MULTILINE)
    assert sorted(name for name, _ in rows) == CODE
    assert all(10 < len(line) < 120 for _, line in rows)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node, apart from what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if not _is_type_checking(child):
            yield child
            yield from _walk(child)


def imports(source: str) -> set[str]:
    """The modules that a file imports when it runs: `a.b` for `import a.b`, and `a` and `a.b` for `from a import b`."""
    found: set[str] = set()
    for node in _walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{item.name}" for item in node.names}
    return found


# The only places that may import torch: the interpreter, and the training that is built on it.
WITH_TORCH = {name for name in LIBRARY if name.startswith(("relief_onnx/interpreter/", "relief_onnx/trainer/"))}


def importers(module: str) -> set[str]:
    """The files of the library that import a module or anything in it."""
    return {name for name in LIBRARY if any(item == module or item.startswith(f"{module}.") for item in imports((ROOT / name).read_text()))}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("onnxruntime", {"relief_onnx/session.py", "relief_onnx/quantizer.py"}),
        ("onnxruntime.quantization", {"relief_onnx/quantizer.py"}),
        ("torch", WITH_TORCH),
        ("relief_onnx.interpreter", WITH_TORCH),
        ("click", set()),
        ("rich", set()),
        ("relief_onnx_cli", set()),
        ("cli", set()),
        ("relief_onnx.pipeline", {"relief_onnx/overview.py", "relief_onnx/retraining.py"}),
        ("onnx_graphsurgeon", set()),
        ("pickle", set()),
    ],
)
def test_who_imports(module: str, allowed: set[str]) -> None:
    assert importers(module) <= allowed


@pytest.mark.parametrize("module", ["relief_onnx", "relief_onnx_cli.main", "relief_onnx.pipeline"])
def test_torch_is_imported_by_nothing_but_training(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_help_imports_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys\nfrom relief_onnx_cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(bool({'torch', 'onnxruntime'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


def test_the_import_rule_can_fail() -> None:
    hidden = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    from onnxruntime.capi import x\n"
    assert "onnxruntime.capi" in imports(hidden)
    assert "torch" not in imports(hidden)
    assert importers("numpy")


def _calls(source: str) -> set[str]:
    return {node.func.id for node in _walk(ast.parse(source)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_never_prints_never_exits_and_hides_no_error(name: str) -> None:
    source = (ROOT / name).read_text()
    assert not _calls(source) & {"print", "exit", "quit", "eval", "exec", "breakpoint"}
    assert "sys.exit" not in source
    for node in _walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert not (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")), f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", CODE)
def test_files_are_short_and_documented(name: str) -> None:
    source = (ROOT / name).read_text()
    assert source.count("\n") <= 450
    assert ast.get_docstring(ast.parse(source)), f"{name} does not say what it is"


@pytest.mark.parametrize("name", [name for name in LIBRARY if not name.endswith("__init__.py")])
def test_every_module_says_what_it_offers(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text())
    assert any(isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__" for node in tree.body)


def test_links_in_the_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md"), ROOT / "sample_models" / "README.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_path_of_a_machine_in_the_sources() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w")
    for path in (*(ROOT / name for name in CODE), *(ROOT / "tests").glob("*.py"), Path(ROOT / "Makefile")):
        assert not pattern.search(path.read_text()), path.name
