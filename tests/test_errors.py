"""Every bad input ends with its exit code, one sentence that names the file and the fix, and nothing at OUT."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import LENET, digits, lenet, program, run
from onnx import TensorProto, helper, numpy_helper

from relief_onnx import pipeline, state_changes, surgery
from relief_onnx.errors import OptionError

Make = Callable[[Path], object]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good model and good data, which is also the working folder: messages then name short paths."""
    shutil.copy(LENET, tmp_path / "m.onnx")
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "a.npy", digits(8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(arguments: str, code: int, sentence: str) -> None:
    """Run the command; `...` in the sentence stands for words of another library."""
    result = run(*arguments.split())
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    pattern = ".+?".join(re.escape(part) for part in f"Error: {sentence}\n".split("..."))
    assert re.fullmatch(pattern, result.stderr), result.stderr
    assert not Path("out.onnx").exists()
    assert not list(Path().glob(".*"))  # and no half-written file beside it


# --- the model ------------------------------------------------------------------------------------------------------


def _external(edit: Callable[[Path, onnx.ModelProto], None]) -> Make:
    def make(folder: Path) -> None:
        path = folder / "m.onnx"
        onnx.save_model(lenet(), str(path), save_as_external_data=True, location="m.bin", size_threshold=0)
        model = onnx.load(str(path), load_external_data=False)
        edit(folder, model)
        path.write_bytes(model.SerializeToString())

    return make


def _outside(location: str) -> Callable[[Path, onnx.ModelProto], None]:
    def edit(folder: Path, model: onnx.ModelProto) -> None:
        next(item for item in model.graph.initializer[0].external_data if item.key == "location").value = location

    return edit


def _custom(folder: Path) -> None:
    model = lenet()
    model.graph.node.insert(0, helper.make_node("Magic", ["image"], ["seen"], name="trick", domain="com.acme"))
    model.graph.node[1].input[0] = "seen"
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    onnx.save(model, str(folder / "m.onnx"))


def _from_the_future(folder: Path) -> None:
    model = lenet()
    model.ir_version = 99
    onnx.save(model, str(folder / "m.onnx"))


def _channels_last(operator: str, element: int = TensorProto.FLOAT) -> Make:
    """A convolution as optimisers write it for other devices, and nothing else."""

    def make(folder: Path) -> None:
        kind = helper.tensor_dtype_to_np_dtype(element)
        weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), kind), "w")
        node = helper.make_node(operator, ["image", "w"], ["y"], name="first", domain="com.microsoft", kernel_shape=[3, 3])
        ends = [helper.make_tensor_value_info(name, element, shape) for name, shape in (("image", [1, 8, 8, 3]), ("y", None))]
        graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(folder / "m.onnx"))

    return make


def _last(operator: str) -> str:
    return (
        f"m.onnx: onnxruntime ... cannot load the model (...{operator}(1)...); {operator} is a convolution with channels last that "
        "onnxruntime's optimiser writes for another device, and has no kernel on this CPU: prune the model from before it was optimised "
        "for that device."
    )


def _damaged(folder: Path) -> None:
    model = lenet()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    onnx.save(model, str(folder / "m.onnx"))


def _sequence_input(folder: Path) -> None:
    model = lenet()
    model.graph.input.append(helper.make_tensor_sequence_value_info("words", TensorProto.FLOAT, None))
    onnx.save(model, str(folder / "m.onnx"))


MODELS: dict[str, tuple[Make, str]] = {
    "missing": (lambda f: (f / "m.onnx").unlink(), "m.onnx does not exist; check the path of the model."),
    "empty": (lambda f: (f / "m.onnx").write_bytes(b""), "m.onnx is empty; export or copy the model again."),
    "cut in half": (
        lambda f: (f / "m.onnx").write_bytes(LENET.read_bytes()[: LENET.stat().st_size // 2]),
        "m.onnx is truncated or not an ONNX model; export or copy it again.",
    ),
    "last byte lost": (
        lambda f: (f / "m.onnx").write_bytes(LENET.read_bytes()[:-1]),
        "m.onnx is truncated or not an ONNX model; export or copy it again.",
    ),
    "text": (lambda f: (f / "m.onnx").write_text("weights: 3\n"), "m.onnx is truncated or not an ONNX model; export or copy it again."),
    "another protobuf": (
        lambda f: (f / "m.onnx").write_bytes(helper.make_opsetid("", 1).SerializeToString()),
        "m.onnx is truncated or not an ONNX model...; export or copy it again.",
    ),
    "a folder": (lambda f: ((f / "m.onnx").unlink(), (f / "m.onnx").mkdir()), "m.onnx is a folder; give the .onnx file inside it."),
    "damaged initializer": (
        _damaged,
        "m.onnx is damaged: initializer features.0.weight does not hold what its shape says; export it again.",
    ),
    "external data missing": (
        _external(lambda f, _: (f / "m.bin").unlink()),
        "m.onnx: external data file m.bin of initializer features.0.weight is missing; put it beside the model.",
    ),
    "external data above": (
        _external(_outside("../m.bin")),
        "m.onnx: initializer features.0.weight points to external data outside the model's folder (../m.bin); "
        "save the model again with its data beside it.",
    ),
    "external data absolute": (
        _external(_outside("/etc/hostname")),
        "m.onnx: initializer features.0.weight points to external data outside the model's folder (/etc/hostname); "
        "save the model again with its data beside it.",
    ),
    "external data short": (
        _external(lambda f, _: os.truncate(f / "m.bin", 100)),
        "m.onnx: external data file m.bin is too short for initializer features.0.weight; copy it again.",
    ),
    "unknown operator": (
        _custom,
        "m.onnx: onnxruntime ... cannot load the model (...com.acme:Magic(-1) is not a registered function/op); "
        "operator Magic of domain com.acme is none of onnxruntime's: export the model again with standard ONNX operators only, "
        "or with Magic as a local function in the file, so that it loads there without relief-onnx too.",
    ),
    "IR version of the future": (
        _from_the_future,
        "m.onnx: onnxruntime ... cannot load the model (...Unsupported model IR version: 99, max supported IR version: ...); "
        "the file is newer than this onnxruntime: install a newer one, or save the model with IR version ...",
    ),
    "channels last": (_channels_last("NhwcConv"), _last("NhwcConv")),
    "channels last, halves": (_channels_last("NhwcConv", TensorProto.FLOAT16), _last("NhwcConv")),
    "not a tensor": (_sequence_input, "m.onnx: input words of the model is a sequence_type, not a tensor; only tensor inputs can be fed."),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, here: Path) -> None:
    make, sentence = MODELS[name]
    make(here)
    check("prune m.onnx --data data -o out.onnx", 1, sentence)


def test_unknown_operator_without_a_calibration_pass(here: Path) -> None:
    _custom(here)
    result = run(*["prune", "m.onnx", "--data", "data", "-o", "out.onnx", "--criterion", "magnitude"])
    assert result.exit_code == 1
    assert "com.acme:Magic" in result.stderr
    assert not Path("out.onnx").exists()


# --- the data -------------------------------------------------------------------------------------------------------


def _saved(array: Any, name: str = "a.npy") -> Make:
    def make(folder: Path) -> None:
        shutil.rmtree(folder / "data")
        (folder / "data").mkdir()
        target = folder / "data" / name
        if name.endswith(".npz"):
            np.savez(target, **array)
        elif isinstance(array, bytes):
            target.write_bytes(array)
        else:
            np.save(target, array, allow_pickle=True)

    return make


def _with(value: float) -> Any:
    values = digits(8).copy()
    values[3, 0, 5, 5] = value
    return values


FORMATS = ".npy, .npz, .csv, images (.png .jpg .jpeg .bmp .webp .gif .tif .tiff) and ONNX test_data_set_*/input_*.pb"
INPUT = "'image' (float32 [batch, 1, 28, 28])"

DATA: dict[str, tuple[Make, str]] = {
    "missing": (lambda f: shutil.rmtree(f / "data"), "'data' does not exist; check the path of the data."),
    "empty": (lambda f: (f / "data" / "a.npy").unlink(), f"'data' is empty; put the samples there as {FORMATS}."),
    "nothing readable": (
        _saved(b"hello", "notes.txt"),
        f"'data' holds nothing that relief-onnx reads (found .txt); it understands {FORMATS}.",
    ),
    "wrong shape": (
        _saved(np.zeros((4, 1, 32, 32), np.float32)),
        f"'data/a.npy' has 32 on axis 2 of shape [4, 1, 32, 32] for input {INPUT}, which needs 28 there; "
        "resize, transpose or crop the data to fit the model.",
    ),
    "wrong rank": (
        _saved(np.zeros((28, 28), np.float32)),
        f"'data/a.npy' has an array of shape [28, 28] for input {INPUT}, which needs 4 axes (a batch) or 3 (one sample); "
        "reshape the array before you save it.",
    ),
    "wrong type": (
        _saved(np.zeros((4, 1, 28, 28), np.complex64)),
        f"'data/a.npy' has complex64 values for input {INPUT}, and they cannot become float32 without loss; "
        "save them with .astype('float32') if that is what you mean.",
    ),
    "wrong name": (
        _saved({"imagE": digits(4)}, "a.npz"),
        f"'data/a.npz' has no array for input 'image' (found 'imagE'); the model's inputs are {INPUT}; "
        "rename 'imagE', which is the nearest.",
    ),
    "NaN": (
        _saved(_with(np.nan)),
        f"'data/a.npy' has the value nan in sample 3 of input {INPUT}, which needs only finite numbers; clean the data.",
    ),
    "infinity": (
        _saved(_with(np.inf)),
        f"'data/a.npy' has the value inf in sample 3 of input {INPUT}, which needs only finite numbers; clean the data.",
    ),
    "unreadable image": (
        _saved(b"\x89PNG\r\n\x1a\nbroken", "a.png"),
        "'data/a.png' cannot be read as an image (...); replace or remove the file.",
    ),
    "pickle": (
        _saved(np.array([{"a": 1}], dtype=object)),
        "'data/a.npy' holds Python objects in its array that only pickle can read, and relief-onnx never unpickles because a pickle "
        "can run code; save a plain array, for example np.save(file, array.astype('float32')).",
    ),
    "cut short": (
        lambda f: os.truncate(f / "data" / "a.npy", 1000),
        "'data/a.npy' is cut short: 872 bytes of values where its header asks for 25088; copy it again.",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, here: Path) -> None:
    make, sentence = DATA[name]
    make(here)
    check("prune m.onnx --data data -o out.onnx", 1, sentence)


@pytest.mark.parametrize("command", ["score m.onnx --data data -o out.onnx", "compare m.onnx m.onnx --data data", "check-data m.onnx data"])
def test_every_command_names_the_bad_file(command: str, here: Path) -> None:
    DATA["NaN"][0](here)
    check(command, 1, DATA["NaN"][1])


# --- options and recipes --------------------------------------------------------------------------------------------

OPTIONS: dict[str, str] = {
    "--alpha 0": "alpha is 0.0; it is the share of contribution to keep, above 0 and at most 1.",
    "--alpha-conv 1.5": "alpha-conv is 1.5; it is the share of contribution to keep, above 0 and at most 1.",
    "--alpha-fc nan": "alpha-fc is nan; it is the share of contribution to keep, above 0 and at most 1.",
    "--granularity channel --alpha-channel 2": "alpha-channel is 2.0; it is the share of importance to keep, above 0 and at most 1.",
    "--granularity channel --round-to 0": "round-to is 0; give 1 or more.",
    "--skip (": "skip '(' is not a regular expression (...); escape special characters with a backslash.",
    "--only [a": "only '[a' is not a regular expression (...); escape special characters with a backslash.",
    "--samples 0": "samples is 0; give 1 or more.",
    "--criterion flow-obs --repair none": (
        "criterion flow-obs chooses by what is left after repair; add --repair least-squares, or take --criterion flow."
    ),
    "--threads -1": "threads is -1; give 0 or more.",
    "--threads 100000": "threads is 100000; give 1024 or less, or 0 for one per core.",
    "--seed -1": "seed is -1; give 0 or more.",
    "--keep 130%": "keep is '130%'; give the percentage to keep, above 0 and at most 100, such as 30%.",
    "--keep 0.3": "keep is '0.3', which could be 30 % or 0.3 %; write it with the % sign.",
    "--pattern 4:2": "'4:2' is no pattern; write N:M with N at least 1 and below M, as 2:4 (of every 4 inputs 2 stay).",
    "--output-weight y": "output-weight is 'y'; write NAME=W, the name of an output and a number.",
    "--epochs -1": "epochs is -1; it must be a whole number, 0 or more.",
    "--max-drop -1": "max-drop is '-1'; give the points that may be lost, from 0 to 100, such as 1%.",
    "--validation 2": "validation is 2.0; it must be a number, 0 or more and at most 0.9.",
    "--precision mixed": "precision mixed works on a GPU only; add --device cuda, or leave it out.",
    "--std 0": "The image scale or std is 0, which would wipe out or blow up every pixel; give another value.",
    "--keep 30% --alpha 0.9": "keep and alpha both say how much stays; give one of them.",
    "--keep 30% --alpha 2 --recipe r.toml": "alpha is 2.0; it is the share of contribution to keep, above 0 and at most 1.",
}

FILES: dict[str, str] = {
    "--scores none.npz": "none.npz does not exist; measure it with relief-onnx score.",
    "--scores m.onnx": "m.onnx is not a score file (.npz); measure it with relief-onnx score.",
    "--recipe none.toml": "none.toml does not exist; check the path of the recipe.",
}


IDLE: dict[str, str] = {
    "--round-to 4": "round-to does nothing at granularity connection; it needs channel, channel+connection or channel+weight",
    "--granularity weight --alpha-channel 0.9": (
        "alpha-channel does nothing at granularity weight; it needs channel, channel+connection or channel+weight"
    ),
    "--allow-state-change": (
        "allow-state-change does nothing at granularity connection; it needs channel, channel+connection or channel+weight"
    ),
    "--scores s.npz --criterion wanda": "criterion does nothing: s.npz holds what was measured; leave out --scores to measure again",
}


@pytest.mark.parametrize("options", IDLE)
@pytest.mark.usefixtures("here")
def test_an_option_that_does_nothing_is_a_warning(options: str) -> None:
    assert run("score", "m.onnx", "--data", "data", "-o", "s.npz").exit_code == 0
    result = run("prune", "m.onnx", "--data", "data", "-o", "out.onnx", "--json", "-", *options.split())
    assert result.exit_code == 0
    assert IDLE[options] in json.loads(result.stdout)["warnings"]


def test_a_name_that_nothing_has_is_a_warning(here: Path) -> None:
    (here / "r.toml").write_text("[layers]\n'classifier' = 0.9\n'^conv1' = 1.0\n")
    result = run(*["prune", "m.onnx", "--data", "data", "-o", "out.onnx", "--json", "-", "--skip", "clasifier", "--recipe", "r.toml"])
    told = [f"{what} names no layer or weight of the model, so it does nothing; relief-onnx inspect shows their names" for what in (
        "--skip clasifier", "[layers] ^conv1"
    )]  # fmt: skip
    assert [warning for warning in json.loads(result.stdout)["warnings"] if "names no" in warning] == told


@pytest.mark.usefixtures("here")
def test_models_that_cannot_be_compared() -> None:
    sentence = "the models share no output name (logits and y); compare a model with one that was made from it."
    other = lenet()
    other.graph.node[-1].output[0] = other.graph.output[0].name = "y"
    onnx.save(other, "y.onnx")
    check("compare m.onnx y.onnx --data data", 1, sentence)


@pytest.mark.parametrize("options", OPTIONS)
def test_option_that_means_nothing_is_wrong_usage(options: str, here: Path) -> None:
    (here / "r.toml").write_text("keep = 40\n")
    check(f"prune m.onnx --data data -o out.onnx {options}", 2, OPTIONS[options])


@pytest.mark.parametrize("options", FILES)
@pytest.mark.usefixtures("here")
def test_file_of_an_option(options: str) -> None:
    check(f"prune m.onnx --data data -o out.onnx {options}", 1, FILES[options])


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("score m.onnx --data data -o out.onnx --samples 0", OPTIONS["--samples 0"]),
        ("compare m.onnx m.onnx --data data --threads -1", OPTIONS["--threads -1"]),
        ("quantize m.onnx --data data -o out.onnx --skip (", OPTIONS["--skip ("]),
        ("check-data m.onnx data --scale 0", OPTIONS["--std 0"]),
        ("retrain m.onnx --data data -o out.onnx --batch 0", "batch is 0; it must be a whole number, 1 or more."),
        (
            "retrain m.onnx --data data -o out.onnx --label-weight 0.5",
            "a label weight below 1 mixes in the original's outputs; give the original with --teacher.",
        ),
    ],
)
@pytest.mark.usefixtures("here")
def test_wrong_usage_of_every_command(command: str, sentence: str) -> None:
    check(command, 2, sentence)


RECIPES: dict[str, str] = {
    "alpa = 0.9": "r.toml has an unknown key 'alpa'; did you mean 'alpha'?",
    "alpha_cov = 0.9": "r.toml has an unknown key 'alpha_cov'; did you mean 'alpha-conv'?",
    "granulrity = 'connection'": "r.toml has an unknown key 'granulrity'; did you mean 'granularity'?",
    "alpha = 'much'": "r.toml: alpha is 'much'; it must be a number.",
    "criterion = 3": "r.toml: criterion is 3; it must be a string.",
    "criterion = 'taylor'": "r.toml: criterion is 'taylor'; choose one of flow, flow-obs, relief, relief-fast, magnitude, wanda.",
    "repair = 'labls'": "r.toml: repair is 'labls'; choose one of none, least-squares, distill, labels.",
    "preset = 'papr'": "r.toml: there is no preset papr; the presets are paper.",
    "granularity = 'channels'": (
        "r.toml: granularity is 'channels'; choose one of connection, weight, channel, channel+connection, channel+weight."
    ),
    "round-to = 2.5": "r.toml: round-to is 2.5; it must be a whole number.",
    "allow-state-change = 1": "r.toml: allow-state-change is 1; it must be true or false.",
    "rounds-to = 4": "r.toml has an unknown key 'rounds-to'; did you mean 'round-to'?",
    "alpha =": "r.toml is not valid TOML (...); correct that line.",
    "layers = 3": 'r.toml: [layers] must hold lines such as "regular expression" = 0.99.',
    "[layers]\n'fc' = true": 'r.toml: [layers] must hold lines such as "regular expression" = 0.99.',
    "[layers]\n'fc' = 1.2": "r.toml: alpha of a layer is 1.2; it is the share of contribution to keep, above 0 and at most 1.",
}


@pytest.mark.parametrize("text", RECIPES)
def test_recipe(text: str, here: Path) -> None:
    (here / "r.toml").write_text(text)
    check("prune m.onnx --data data -o out.onnx --recipe r.toml", 1, RECIPES[text])


def test_options_that_contradict_a_recipe(here: Path) -> None:
    """Each is good by itself: the recipe has a part in it, so it is bad input."""
    (here / "r.toml").write_text("alpha = 0.9\n")
    check("prune m.onnx --data data -o out.onnx --recipe r.toml --keep 30%", 1, OPTIONS["--keep 30% --alpha 0.9"])


KEYWORDS: tuple[tuple[dict[str, object], str], ...] = (
    ({"alpha": "0.9"}, "alpha is '0.9'; it must be a number"),
    ({"granularity": "channel", "round_to": 2.5}, "round-to is 2.5; it must be a whole number"),
    ({"allow_state_change": "yes"}, "allow-state-change is 'yes'; it must be true or false"),
    ({"only": 3}, "only is 3; it must be a string"),
    ({"layers": {"conv": "all"}}, '[layers] must hold lines such as "regular expression" = 0.99'),
    ({"layers": {"conv": 2}}, "alpha of a layer is 2.0; it is the share of contribution to keep, above 0 and at most 1"),
)


@pytest.mark.parametrize(("keywords", "sentence"), KEYWORDS)
@pytest.mark.usefixtures("here")
def test_a_keyword_of_a_wrong_type_from_python(keywords: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError) as caught:
        pipeline.prune("m.onnx", "data", **keywords)
    assert str(caught.value) == sentence


@pytest.mark.usefixtures("here")
def test_unknown_keyword_from_python() -> None:
    with pytest.raises(OptionError, match=r"^there is no option 'aplha'; did you mean 'alpha'\?$"):
        pipeline.prune("m.onnx", "data", aplha=0.9)


# --- where results go -----------------------------------------------------------------------------------------------

TARGETS: dict[str, str] = {
    "-o m.onnx": "m.onnx exists already; choose another name with -o or overwrite it with --force.",
    "-o data": "data is a folder; give the name of a file in it.",
    "-o none/out.onnx": "none is not a folder, so out.onnx cannot be written there; create it or choose another place.",
    "-o m.onnx/out.onnx": "m.onnx is not a folder, so out.onnx cannot be written there; create it or choose another place.",
    "-o /proc/out.onnx": "/proc cannot be written to (...); choose another place.",
    "-o out.onnx --json none/r.json": "none is not a folder, so r.json cannot be written there; create it or choose another place.",
    "-o out.onnx --json /proc/r.json": "/proc cannot be written to (...); choose another place.",
    "-o out.onnx --json m.onnx": "m.onnx is given for two things at once; choose another name for one of them.",
    "-o out.onnx --json out.onnx": "out.onnx is given for two things at once; choose another name for one of them.",
    "-o out.onnx --save-masks m.onnx": "m.onnx is given for two things at once; choose another name for one of them.",
    "-o out.onnx --save-masks none/m.npz": "none is not a folder, so m.npz cannot be written there; create it or choose another place.",
    "-o out.onnx --work-dir m.onnx": "m.onnx is a file, not a folder; choose another --work-dir.",
    "-o out.onnx --work-dir /proc/none": "/proc/none cannot be made (...); choose another --work-dir.",
}


@pytest.mark.parametrize("options", TARGETS)
@pytest.mark.usefixtures("here")
def test_target(options: str) -> None:
    check(f"prune m.onnx --data data {options}", 1, TARGETS[options])
    assert Path("m.onnx").read_bytes() == LENET.read_bytes()


@pytest.mark.usefixtures("here")
def test_scores_never_replace_the_model() -> None:
    check("score m.onnx --data data -o m.onnx --force", 1, TARGETS["-o out.onnx --json m.onnx"])
    assert Path("m.onnx").read_bytes() == LENET.read_bytes()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "command",
    [
        "prune m.onnx --data data/a.npy -o out.onnx --save-masks data/a.npy",
        "prune m.onnx --data data/a.npy -o out.onnx --json data/a.npy",
        "prune m.onnx --data data -o out.onnx --scores data/a.npy --json data/a.npy",
        "prune m.onnx --data data -o out.onnx --recipe data/a.npy --save-masks data/a.npy",
        "score m.onnx --data data/a.npy -o data/a.npy --force",
        "quantize m.onnx --data data/a.npy -o out.onnx --json data/a.npy",
        "retrain m.onnx --data data/a.npy -o out.onnx --json data/a.npy",
        "compare m.onnx m.onnx --data data/a.npy --json data/a.npy",
    ],
)
def test_what_is_read_is_never_replaced(command: str) -> None:
    before = Path("data/a.npy").read_bytes()
    check(command, 1, "data/a.npy is given for two things at once; choose another name for one of them.")
    assert Path("data/a.npy").read_bytes() == before


@pytest.mark.usefixtures("here")
def test_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    check(
        "prune m.onnx --data data -o out.onnx", 1,
        "out.onnx cannot be written (No space left on device); free some space or choose another place.",
    )  # fmt: skip


@pytest.mark.usefixtures("here")
def test_disk_that_fills_while_writing() -> None:
    """A real process whose files may not grow over 20 kB: the write stops in the middle."""
    limit = (20_000, 20_000)
    command = [*program(), *["prune", "m.onnx", "--data", "data", "-o", "out.onnx"]]
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert found.returncode == 1
    assert found.stderr == "Error: out.onnx cannot be written (File too large); free some space or choose another place.\n"
    assert sorted(path.name for path in Path().iterdir()) == ["data", "m.onnx"]


@pytest.mark.usefixtures("here")
def test_full_disk_keeps_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("old.onnx").write_bytes(b"old")

    def replace(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", replace)
    check(
        "prune m.onnx --data data -o old.onnx --force", 1,
        "old.onnx cannot be written (No space left on device); free some space or choose another place.",
    )  # fmt: skip
    assert Path("old.onnx").read_bytes() == b"old"


@pytest.mark.usefixtures("here")
def test_report_that_cannot_be_written_leaves_nothing_at_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(source: str, target: Path) -> None:
        if Path(target).name == "r.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    check(
        "prune m.onnx --data data -o out.onnx --json r.json", 1,
        "r.json cannot be written (No space left on device); free some space or choose another place.",
    )  # fmt: skip


# --- exit codes 3 and 4 ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_result_that_does_not_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupted(model: onnx.ModelProto, **options: bool) -> surgery.Operation:
        operation = surgery.operate(model, **options)
        weight = next(item for item in operation.model.graph.initializer if item.name == "classifier.4.weight")
        surgery.set_initializer(operation.model, weight.name, numpy_helper.to_array(weight) * np.float32(1.01))
        return operation

    monkeypatch.setattr(state_changes, "operate", corrupted)
    check(
        "prune m.onnx --data data -o out.onnx --work-dir work --save-masks k.npz", 3,
        "the pruned model differs from the masked one by ... of the largest output (allowed 0.0001); "
        "nothing was written, please report this model.",
    )  # fmt: skip
    assert not Path("k.npz").exists()
    assert not Path("work/pruned.onnx").exists()


def test_model_without_layers(here: Path) -> None:
    node = helper.make_node("Relu", ["image"], ["y"])
    shape = ["batch", 1, 28, 28]
    value = helper.make_tensor_value_info
    graph = helper.make_graph([node], "g", [value("image", TensorProto.FLOAT, shape)], [value("y", TensorProto.FLOAT, shape)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(here / "m.onnx"))
    sentence = "nothing could be pruned: the model has no Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU or RNN with a constant weight."
    check("prune m.onnx --data data -o out.onnx", 4, sentence)
    check("score m.onnx --data data -o out.onnx", 4, sentence)


@pytest.mark.usefixtures("here")
def test_everything_skipped() -> None:
    result = run(*["prune", "m.onnx", "--data", "data", "-o", "out.onnx", "--skip", "."])
    assert result.exit_code == 4
    first, *reasons = result.stderr.splitlines()
    assert first == "Error: nothing could be pruned: features.0.weight: --skip . names it (and 4 more)."
    weights = ["features.0", "features.3", "classifier.0", "classifier.2", "classifier.4"]
    assert reasons == [f"  {name}.weight: --skip . names it" for name in weights]
    assert not Path("out.onnx").exists()


@pytest.mark.usefixtures("here")
def test_scores_of_another_model() -> None:
    assert run("score", LENET.with_name("lenet300.onnx"), "--data", "data", "-o", "s.npz").exit_code == 0
    check(
        "prune m.onnx --data data -o out.onnx --scores s.npz", 1,
        "s.npz has no features.0.weight/score; it was measured on another model, measure again with relief-onnx score.",
    )  # fmt: skip
