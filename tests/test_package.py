"""The wheel: what is in it, and that it runs with nothing but the dependencies that it declares."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from helpers import CALIB, LENET, ROOT
from packaging.requirements import Requirement

SOURCES = ("relief_onnx", "cli", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays as it is; without a network."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=folder, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
    assert {name.split("/")[0] for name in names} == {"relief_onnx", "relief_onnx_cli", info}
    assert {"relief_onnx/py.typed", "relief_onnx_cli/py.typed", f"{info}/licenses/LICENSE"} <= set(names)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "relief_onnx").rglob("*.py")}
    modules |= {f"relief_onnx_cli/{path.name}" for path in (ROOT / "cli").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def _runtime() -> set[str]:
    """The distributions that relief-onnx declares, and those that they declare."""
    found: set[str] = set()
    waiting = ["relief-onnx"]
    while waiting:
        name = waiting.pop()
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            if (requirement.marker is None or requirement.marker.evaluate({"extra": ""})) and requirement.name not in found:
                found.add(requirement.name)
                waiting.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel and its declared dependencies, linked from this one."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in _runtime():
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution(name).locate_file(top))).resolve())
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "bin"


def _run(fresh: Path, *command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    name, *arguments = (str(part) for part in command)
    return subprocess.run([str(fresh / name), *arguments], capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_runs_without_dev_packages(fresh: Path, tmp_path: Path) -> None:
    for name in ("pytest", "torch", "sklearn", "mypy", "cli"):
        assert "No module named" in _run(fresh, "python", "-c", f"import {name}", cwd=tmp_path).stderr
    shown = _run(fresh, "relief-onnx", "--help", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "check-data" in shown.stdout
    for command in (("inspect", LENET), ("prune", LENET, "--data", CALIB, "--samples", 16, "-o", tmp_path / "out.onnx")):
        found = _run(fresh, "relief-onnx", *command, cwd=tmp_path)
        assert (found.returncode, found.stderr) == (0, "")
    assert (tmp_path / "out.onnx").stat().st_size < LENET.stat().st_size
