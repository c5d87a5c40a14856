"""Every sentence that the data door says about a file that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from data_files import F16, I64, NAN, ONE, PAIR, RGB, U8, WHOLE, rows, save_image, save_pb, spec
from onnx import numpy_helper

from relief_onnx.data import InputSpec, describe, open_dataset
from relief_onnx.errors import DataError


def bad_npy(array: Any) -> Callable[[Path], Path]:
    return lambda folder: (np.save(folder / "d.npy", array), folder / "d.npy")[1]


def bad_npz(**arrays: Any) -> Callable[[Path], Path]:
    return lambda folder: (np.savez(folder / "d.npz", **arrays), folder / "d.npz")[1]


def bad_file(name: str, content: bytes | str) -> Callable[[Path], Path]:
    data = content.encode() if isinstance(content, str) else content

    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        return folder / name

    return make


def in_folder(*makers: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for maker in makers:
            maker(folder)
        return folder

    return make


def cut(maker: Callable[[Path], Path], keep: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = maker(folder)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        return path

    return make


def png(name: str) -> Callable[[Path], Path]:
    return lambda folder: save_image(folder / name, np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))


def pb(name: str, array: np.ndarray) -> Callable[[Path], Path]:
    return lambda folder: (save_pb(folder / name, array), folder / name)[1]


def flipped(maker: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """The same file with a damaged byte in its values."""

    def make(folder: Path) -> Path:
        path = maker(folder)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(bytes(content))
        return path

    return make


def external_pb(folder: Path) -> Path:
    tensor = numpy_helper.from_array(rows(2), "x")
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
    return folder / "input_0.pb"


INT = (spec("N", 3, dtype=I64),)

FILE_ERRORS: dict[str, tuple[Callable[[Path], Path], tuple[InputSpec, ...], str]] = {
    "missing path": (lambda folder: folder / "no", ONE, "no' does not exist; check the path"),
    "empty folder": (lambda folder: folder, ONE, "is empty; put the samples there as .npy, .npz, .csv, images (.png"),
    "no readable": (
        in_folder(bad_file("a.txt", ""), bad_file("b", "")),
        ONE,
        "(found .txt, no suffix); it understands .npy",
    ),
    "only deep": (in_folder(bad_file("s/a.txt", "")), ONE, "(found sub-folders without data)"),
    "suffix": (bad_file("a.mat", ""), ONE, "a.mat' has a format that relief-onnx does not read; it understands .npy"),
    "mixed formats": (
        in_folder(bad_npy(rows(1)), bad_npz(x=rows(1))),
        ONE,
        "mixes formats: 'd.npy' (npy) and 'd.npz' (npz); keep one",
    ),
    "flat and nested": (
        in_folder(bad_npy(rows(1)), png("s/a.png")),
        ONE,
        "holds data both directly and in the sub-folder 's'",
    ),
    "mixed classes": (in_folder(png("a/a.png"), pb("b/x.npz", rows(1))), ONE, "mixes formats in its class folders"),
    "empty class": (
        in_folder(png("a/a.png"), png("b/a.png"), bad_file("c/t.txt", "")),
        (RGB,),
        "c' holds no samples, though the folders beside it do; fill or remove this class",
    ),
    "labels of no images": (
        in_folder(bad_npy(rows(1)), bad_file("labels.csv", "d.npy,1")),
        ONE,
        "labels.csv' is for images, and there are none",
    ),
    "nan": (
        bad_npy(NAN),
        ONE,
        "d.npy' has the value nan in sample 1 of input 'x' (float32 [N, 3]), which needs only finite numbers",
    ),
    "inf in npz": (bad_npz(x=np.array([np.inf, 1, 2])), ONE, "d.npz' has the value inf in sample 0 of input 'x'"),
    "nan in csv": (bad_file("d.csv", "1,2,3\n1,nan,3"), ONE, "d.csv' has the value nan in sample 1"),
    "overflow": (
        bad_npy(np.full((1, 3), 1e6)),
        (spec("N", 3, dtype=F16),),
        "needs numbers that fit in float16; rescale the data",
    ),
    "rank": (
        bad_npy(np.ones((2, 3, 1))),
        ONE,
        "an array of shape [2, 3, 1] for input 'x' (float32 [N, 3]), which needs 2 axes (a batch) or 1",
    ),
    "rank whole": (
        bad_npz(a=rows(1)[0], sr=1),
        WHOLE,
        "shape [3] for input 'a' (float32 [N, 3]), which needs 2 axes; reshape",
    ),
    "axis": (
        bad_npy(np.ones((2, 4))),
        ONE,
        "has 4 on axis 1 of shape [2, 4] for input 'x' (float32 [N, 3]), which needs 3 there",
    ),
    "sample axis": (bad_npy(np.ones(4)), ONE, "has 4 on axis 0 of shape [4]"),
    "no samples": (bad_npy(np.ones((0, 3))), ONE, "holds 0 samples for input 'x'"),
    "missing name": (
        bad_npz(a=rows(1), bb=np.ones((1, 2), int)),
        PAIR,
        "no array for input 'b' (found 'a', 'bb'); the model's inputs are 'a' (float32 [N, 3]), 'b' (int64 [N, T]); rename 'bb'",
    ),
    "nothing near": (bad_npz(a=rows(1)), PAIR, "no array for input 'b' (found 'a'); the model's inputs are"),
    "extra name": (bad_npz(x=rows(1), y=rows(1)), ONE, "has an array 'y' that is no input of the model"),
    "named npy": (
        in_folder(bad_npy(rows(1)), bad_file("a.npy", "")),
        PAIR,
        "no array for input 'b' (found 'a', 'd')",
    ),
    "one npy for two": (
        bad_npy(rows(1)),
        PAIR,
        "does not say which input it is for, and the model has 2: 'a' (float32 [N, 3]), 'b'",
    ),
    "one csv for two": (bad_file("d.csv", "1"), PAIR, "does not say which input it is for"),
    "images for two": (png("a.png"), PAIR, "does not say which input it is for"),
    "different rows": (bad_npz(a=rows(2), b=np.ones((3, 2), int)), PAIR, "('a' has 2, 'b' has 3)"),
    "float into int": (
        bad_npy(rows(2)),
        INT,
        "has float32 values for input 'x' (int64 [N, 3]), and they cannot become int64 without loss",
    ),
    "text into float": (bad_npz(x=np.array([["a", "b", "c"]])), ONE, "and they cannot become float32 without loss"),
    "int out of range": (
        bad_npy(np.full((2, 3), 300)),
        (spec("N", 3, dtype=U8),),
        "has the value 300 in sample 0 of input 'x'",
    ),
    "negative": (
        bad_npy(np.full((2, 3), -1)),
        (spec("N", 3, dtype=np.dtype(np.uint64)),),
        "has the value -1 in sample 0",
    ),
    "int not exact": (bad_npy(np.full((2, 3), 2**24 + 1)), ONE, "whole numbers that float32 holds exactly"),
    "pickled npy": (
        bad_npy(np.array([[1, None, 2]])),
        ONE,
        "holds Python objects in its array that only pickle can read, and relief-onnx never",
    ),
    "pickled npz": (
        bad_npz(x=np.array([[1, None, 2]])),
        ONE,
        "d.npz' holds Python objects in 'x' that only pickle can read",
    ),
    "raw pickle": (bad_file("d.npy", b"\x80\x04K\x01."), ONE, "d.npy' is no readable .npy file"),
    "empty npy": (bad_file("d.npy", ""), ONE, "d.npy' is no readable .npy file"),
    "cut npy": (cut(bad_npy(rows(100)), 0.7), ONE, "d.npy' is cut short: "),
    "cut npz": (
        cut(bad_npz(x=rows(100)), 0.7),
        ONE,
        "d.npz' is no readable .npz file (File is not a zip file); save it again with np.savez",
    ),
    "damaged npz": (flipped(bad_npz(x=rows(100))), ONE, "d.npz' is no readable .npz file (Bad CRC"),
    "not an npz": (bad_file("d.npz", "hello"), ONE, "d.npz' is no readable .npz file"),
    "cut png": (cut(png("a.png"), 0.5), (RGB,), "a.png' cannot be read as an image ("),
    "not a png": (bad_file("a.png", "hello"), (RGB,), "a.png' cannot be read as an image ("),
    "cut pb": (cut(pb("input_0.pb", rows(9)), 0.6), ONE, "input_0.pb' is no readable TensorProto file ("),
    "pb of junk": (bad_file("input_0.pb", b"\xff\xff\xff"), ONE, "input_0.pb' is no readable TensorProto file ("),
    "external pb": (external_pb, ONE, "(its values are in another file)"),
    "pb name": (bad_file("x.pb", ""), ONE, "x.pb' is not named input_K.pb"),
    "pb count": (in_folder(pb("input_0.pb", rows(1))), PAIR, "holds input_0.pb, but the model has 2 inputs"),
    "pb gap": (
        in_folder(pb("input_0.pb", rows(1)), pb("input_2.pb", rows(1))),
        PAIR,
        "holds input_0.pb, input_2.pb, but the model has 2",
    ),
    "empty pb set": (
        in_folder(bad_file("test_data_set_0/a.txt", "")),
        ONE,
        "test_data_set_0' holds no input_*.pb file",
    ),
    "empty csv": (bad_file("d.csv", "\n"), ONE, "d.csv' is empty"),
    "header only": (bad_file("d.csv", "a,b,c\n"), ONE, "d.csv' has a header but no rows"),
    "csv width": (
        bad_file("d.csv", "1,2\n"),
        ONE,
        "has 2 columns of values, but the model's input 'x' (float32 [N, 3]) needs 3 per sample",
    ),
    "csv open axes": (bad_file("d.csv", "1,2\n"), (spec("N", None, None),), "or save .npy files of the input's shape"),
    "csv ragged": (bad_file("d.csv", "1,2,3\n\n1,2\n"), ONE, "has 2 columns in line 3 but 3 in its first line"),
    "csv text": (
        bad_file("d.csv", "1,2,3\n1,x,3\n"),
        ONE,
        "d.csv' has 'x' in line 2 where input 'x' (float32 [N, 3]) needs numbers",
    ),
    "csv hole at once": (bad_file("d.csv", "1,,3\n1,2,3\n"), ONE, "has an empty cell in line 1 where input"),
    "csv hole": (bad_file("d.csv", "1,2,3\n1,,3\n"), ONE, "has an empty cell in line 2 where input"),
    "csv fraction": (bad_file("d.csv", "1,2,3.5\n"), INT, "has float64 values for input 'x' (int64 [N, 3])"),
    "csv bytes": (bad_file("d.csv", b"1,2,\xff\n"), ONE, "d.csv' is no readable .csv file"),
    "csv labels": (bad_file("d.csv", "a,b,c,label,labels\n"), ONE, "more than one label column"),
    "csv no label": (bad_file("d.csv", "a,b,c,label\n1,2,3,\n"), ONE, "has an empty label in row 1"),
    "labels twice": (bad_npz(x=rows(1), label=[1], labels=[1]), ONE, "has both 'label' and 'labels'; keep one"),
    "label count": (
        bad_npz(x=rows(2), label=[1, 2, 3]),
        ONE,
        "has 3 labels for 2 samples; save exactly one label per sample",
    ),
    "label file count": (
        in_folder(lambda f: bad_npy([1])(f).rename(f / "label.npy"), bad_npy(rows(2))),
        ONE,
        "has 1 labels for 2",
    ),
    "label file alone": (lambda f: bad_npy([1])(f).rename(f / "label.npy"), ONE, "holds labels but no samples"),
    "label text": (
        bad_npz(x=rows(2), label=["a", "b"]),
        ONE,
        "labels of type str32; save class numbers (int64, from 0)",
    ),
    "label shape": (
        bad_npz(x=rows(2), label=[[1, 2], [3, 4]]),
        ONE,
        "integer labels of shape [2, 2]; save one class number per sample",
    ),
    "label nan": (bad_npz(x=rows(2), label=[1, np.nan]), ONE, "has a label that is NaN or infinite"),
    "label negative": (bad_npz(x=rows(2), label=[1, -1]), ONE, "has the label -1; class numbers start at 0"),
    "half labelled": (
        in_folder(lambda f: bad_npz(x=rows(1), label=[1])(f).rename(f / "a.npz"), bad_npz(x=rows(1))),
        ONE,
        "d.npz' has no labels, but the samples before it have; label all samples or none",
    ),
    "images label missing": (
        in_folder(png("a.png"), png("b.png"), bad_file("labels.csv", "a.png,1")),
        (RGB,),
        "has no label for 'b.png' (1 images",
    ),
    "images label unknown": (
        in_folder(png("a.png"), bad_file("labels.csv", "a.png,1\nc.png,1")),
        (RGB,),
        "names 'c.png' in line 2, which is not",
    ),
    "images label twice": (
        in_folder(png("a.png"), bad_file("labels.csv", "a.png,1\na.png,2")),
        (RGB,),
        "names 'a.png' twice",
    ),
    "images label width": (
        in_folder(png("a.png"), bad_file("labels.csv", "a.png")),
        (RGB,),
        "has 1 columns in line 1; give two",
    ),
    "images and table": (
        in_folder(png("a.png"), bad_npy(rows(1)), bad_file("labels.csv", "a.png,1")),
        (RGB,),
        "mixes images and 'd.npy'",
    ),
    "no inputs": (bad_npy(rows(1)), (), "The model has no inputs"),
}


@pytest.mark.parametrize("case", FILE_ERRORS)
def test_file_errors_are_one_clear_sentence(tmp_path: Path, case: str) -> None:
    make, inputs, sentence = FILE_ERRORS[case]
    path = make(tmp_path)
    with pytest.raises(DataError) as caught:
        describe(open_dataset(path, inputs), inputs)
    message = str(caught.value)
    assert sentence in message
    assert "\n" not in message
    assert message.endswith(".")
    assert str(tmp_path) in message or not inputs


def test_class_folders_and_label_keys_contradict(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "d.npz", x=rows(1), label=[1])
    with pytest.raises(DataError, match="has labels of its own beside those of its class folder 'a'"):
        open_dataset(tmp_path, ONE)


def test_the_cause_is_kept(tmp_path: Path) -> None:
    (tmp_path / "d.npz").write_bytes(b"hello")
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path, ONE)
    assert caught.value.__cause__ is not None
