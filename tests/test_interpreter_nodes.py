"""ONNX's own backend tests as the judge of the interpreter: every case passes or is listed below with its reason."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from interpreter_cases import differences, node_cases, run_case, to_numpy, to_torch
from onnx import numpy_helper

from relief_onnx.errors import Unsupported
from relief_onnx.interpreter import Network
from relief_onnx.session import Session

SMALL = "(FLOAT8E|FLOAT4|U?INT4|U?INT2)"
TINY = "torch has no arithmetic for floats of 8 and 4 bits and integers of 4 and 2"
UNSIGNED = "integer data: torch has no arithmetic for unsigned integers of more than 8 bits"
ARITHMETIC = "add|sub|div|mod|max|min|less|greater|less_equal|greater_equal|bitshift_left|bitshift_right"
# Pattern of whole names -> why such a case is not run. A listed case that passes is an error.
EXCLUDED = {
    f"cast(like)?_(no_saturate_|e8m0_)?(\\w+_to_{SMALL}\\w*|{SMALL}\\w*_to_\\w+)": TINY,
    "(de)?quantizelinear_(e4m3fn\\w*|e5m2|float4e2m1|u?int4|u?int2)": TINY,
    f"({ARITHMETIC})_uint(16|32|64)(_expanded)?": UNSIGNED,
    "bitwise_not_3d": UNSIGNED,
    "bernoulli\\w*": "random numbers: another generator than numpy's",
    "training_dropout(_default)?(_mask)?": "random numbers, and Dropout is active only in a network that is training",
    "resize_downsample_scales_(linear|cubic)_align_corners": "onnxruntime, which the interpreter follows, differs; held by a test below",
    "roialign_mode_max": "the standard's maximum of parts of samples; refused when the network is built",
    "(adagrad|adam|momentum|nesterov_momentum)(_multiple)?": "training operators, not part of an inference graph",
    "ai_onnx_ml_(array_feature_extractor|label_encoder\\w*|tree_ensemble\\w*)": "trees and tables of labels have no gradient",
    "(string|strnormalizer|regex|tfidfvectorizer|equal_string)_?\\w*": "text",
    "image_decoder\\w*": "compressed images",
    "(convinteger|qlinearconv|qlinearmatmul)_?\\w*": "integer kernels: a quantised model is trained before it is quantised",
    "(basic_)?deform_conv\\w*": "DeformConv is not claimed",
    "melweightmatrix": "MelWeightMatrix is not claimed",
}
# So many cases of onnx 1.23 pass; a newer onnx has more, an older one fewer.
LEAST = 1596


def reason(name: str) -> str | None:
    return next((text for pattern, text in EXCLUDED.items() if re.fullmatch(f"test_{pattern}", name)), None)


def outcome(case: Any) -> str | None:
    """What went wrong with a case, or None."""
    inputs, outputs = case.data_sets[0]
    try:
        return run_case(case.model, inputs, outputs, case.rtol, max(case.atol, 1e-6))
    except (Unsupported, RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    return {name: outcome(case) for name, case in node_cases().items()}


def test_every_case_passes_or_has_a_reason(outcomes: dict[str, str | None], capsys: pytest.CaptureFixture[str]) -> None:
    unexpected = {name: text for name, text in outcomes.items() if text is not None and reason(name) is None}
    assert not unexpected
    passed = sum(text is None for text in outcomes.values())
    left_out = Counter(reason(name) for name, text in outcomes.items() if text is not None)
    with capsys.disabled():
        print(f"\nONNX node tests: {passed} of {len(outcomes)} pass; not run:")
        for text, count in left_out.most_common():
            print(f"  {count:4d}  {text}")
    if len(outcomes) >= 1884:
        assert passed >= LEAST


def test_no_exclusion_is_needless(outcomes: dict[str, str | None]) -> None:
    assert not [name for name, text in outcomes.items() if text is None and reason(name) is not None]
    for pattern in EXCLUDED:
        assert any(re.fullmatch(f"test_{pattern}", name) for name in outcomes), pattern


def test_the_judge_can_fail() -> None:
    case = node_cases()["test_relu"]
    inputs, outputs = case.data_sets[0]
    assert run_case(case.model, inputs, [outputs[0] + 1e-2]) is not None
    assert run_case(case.model, inputs, [outputs[0].astype(np.float64)]) is not None
    assert run_case(case.model, inputs, [outputs[0][:1]]) is not None
    assert differences([outputs[0]], [], 1e-3, 1e-6) is not None


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resize_with_aligned_corners_is_onnxruntimes(mode: str) -> None:
    case = node_cases()[f"test_resize_downsample_scales_{mode}_align_corners"]
    inputs, _ = case.data_sets[0]
    model = onnx.ModelProto.FromString(case.model.SerializeToString())
    network = Network(model)
    (expected,) = Session(model).run(dict(zip(network.inputs, inputs, strict=True)))
    found = network({name: to_torch(value) for name, value in zip(network.inputs, inputs, strict=True)})
    assert differences(expected, to_numpy(next(iter(found.values()))), 1e-4, 1e-5) is None


FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data"


def _stored(kind: str) -> list[Path]:
    return sorted(path for path in (FOLDER / kind).glob("*") if (path / "model.onnx").exists()) if FOLDER.is_dir() else []


def _load(path: Path, info: onnx.ValueInfoProto) -> Any:
    """An input or output of stored test data: a tensor or a sequence."""
    content = path.read_bytes()
    if info.type.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(content))
    return numpy_helper.to_array(onnx.TensorProto.FromString(content))


@pytest.mark.parametrize(("kind", "least"), [("simple", 15), ("pytorch-operator", 20), ("pytorch-converted", 60)])
def test_stored_models(kind: str, least: int) -> None:
    """The standard's own models, right where they run. Those with text and those that ask for gradients as outputs cannot be run; those
    of an opset below 7, which is not claimed, may be refused."""
    skipped = ("strnorm", "gradient_of") if kind == "simple" else ()
    folders = [path for path in _stored(kind) if not any(part in path.name for part in skipped)]
    if not folders:
        pytest.skip(f"this onnx package has no backend test data of kind {kind}")
    wrong, passed = {}, 0
    for folder in folders:
        model = onnx.load(folder / "model.onnx")
        stored = {item.name for item in model.graph.initializer}
        infos = [item for item in model.graph.input if item.name not in stored]
        for data in folder.glob("test_data_set_*"):
            inputs = [_load(data / f"input_{place}.pb", info) for place, info in enumerate(infos)]
            outputs = [_load(data / f"output_{place}.pb", info) for place, info in enumerate(model.graph.output)]
            try:
                text = run_case(model, inputs, outputs, 1e-3, 1e-5)
            except (Unsupported, RuntimeError) as error:
                if isinstance(error, Unsupported) and model.opset_import[0].version < 7:
                    continue
                text = str(error)
            passed += text is None
            if text is not None:
                wrong[folder.name] = text
    assert not wrong
    assert passed >= least


LIGHT = sorted((FOLDER / "light").glob("light_*.onnx"))


@pytest.mark.skipif(not LIGHT, reason="this onnx package has no light models")
@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_light_models(path: Path) -> None:
    """Topologies of known networks with constant weights, and the output that belongs to inputs as onnx's test runner makes them."""
    model = onnx.load(path)
    network = Network(model)
    info = next(item for item in model.graph.input if item.name in network.inputs)
    sizes = [size.dim_value for size in info.type.tensor_type.shape.dim]
    x = (np.arange(np.prod(sizes), dtype=np.float32) / np.prod(sizes)).reshape(sizes).astype(np.float32)
    expected = onnx.TensorProto.FromString(path.with_name(f"{path.stem}_output_0.pb").read_bytes())
    with torch.no_grad():
        found = next(iter(network({network.inputs[0]: torch.from_numpy(x)}).values()))
    (reference,) = Session(model, threads=1).run({network.inputs[0]: x})
    assert differences(reference, found.numpy(), 1e-3, 1e-6) is None
    assert differences(numpy_helper.to_array(expected), found.numpy(), 1e-3, 1e-6) is None


def test_light_models_are_looked_for_where_onnx_keeps_them() -> None:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        urls = [case.url for case in load_model_tests(kind="real") if case.url]
    assert {os.path.basename(url) for url in urls} >= {path.name for path in LIGHT}
