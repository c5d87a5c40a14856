"""The data door: every format, every rule of batching, every sentence of an error."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image

from relief_onnx.data import Batch, Dataset, ImageOptions, InputSpec, batch_axis, describe, open_dataset
from relief_onnx.errors import DataError, RecipeError

F32, F16, I64, I32, U8 = (np.dtype(t) for t in (np.float32, np.float16, np.int64, np.int32, np.uint8))


def spec(*shape: int | str | None, name: str = "x", dtype: np.dtype[Any] = F32) -> InputSpec:
    return InputSpec(name, dtype, shape)


VEC = spec("N", 3)
PAIR = (spec("N", 3, name="a"), spec("N", "T", name="b", dtype=I64))
WHOLE = (spec("N", 3, name="a"), spec(name="sr", dtype=I64))
RGB = spec("N", 3, 4, 6)
GRAY = spec("N", 1, 4, 6)


def rows(n: int, *shape: int) -> np.ndarray:
    return np.arange(n * int(np.prod(shape or (3,)))).reshape(n, *(shape or (3,))).astype(np.float32)


def joined(batches: Iterator[Batch], name: str = "x") -> np.ndarray:
    return np.concatenate([batch.feed[name] for batch in batches])


def sizes(data: Dataset, batch_size: int, **options: int) -> list[int]:
    return [batch.size for batch in data.batches(batch_size, **options)]


def labels(data: Dataset, **options: int) -> list[Any]:
    return [label for batch in data.batches(2, **options) if batch.labels is not None for label in batch.labels.tolist()]


def save_image(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return path


def save_pb(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(numpy_helper.from_array(array, "any").SerializeToString())


def color_pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)


def read_all(source: Any, *inputs: InputSpec, **images: Any) -> list[Batch]:
    return list(open_dataset(source, inputs, images=ImageOptions(**images)).batches(2))


# --- the batch axis ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "batchable", "fixed"),
    [
        ([("N", 3)], True, None),
        ([("N", 3), ("N",)], True, None),
        ([(None, 3), (None, 4)], True, None),
        ([(8, 3), (8, 4)], True, 8),
        ([(8, 3), (4, 4)], False, None),
        ([("N", 3), ("M", 3)], False, None),
        ([("N", 3), (None, 3)], False, None),
        ([("N", 3), (1, 3)], False, None),
        ([("N", 3), ()], False, None),
    ],
)
def test_batch_axis(shapes: list[tuple[Any, ...]], batchable: bool, fixed: int | None) -> None:
    axis = batch_axis([spec(*shape, name=str(index)) for index, shape in enumerate(shapes)])
    assert (axis.batchable, axis.fixed) == (batchable, fixed)


# --- array files ------------------------------------------------------------------------------------------------------


def layout_npy_file(folder: Path) -> Path:
    np.save(folder / "any.npy", rows(5))
    return folder / "any.npy"


def layout_npy_folder_of_batches(folder: Path) -> Path:
    np.save(folder / "1.npy", rows(5)[:2])
    np.save(folder / "2.npy", rows(5)[2:])
    return folder


def layout_npy_folder_of_samples(folder: Path) -> Path:
    for index, row in enumerate(rows(5)):
        np.save(folder / f"{index}.npy", row)
    (folder / "README.txt").write_text("hello")
    (folder / ".DS_Store").write_text("")
    return folder


def layout_npz_file(folder: Path) -> Path:
    np.savez_compressed(folder / "d.npz", x=rows(5))
    return folder / "d.npz"


def layout_npz_folder(folder: Path) -> Path:
    np.savez(folder / "1.npz", x=rows(5)[0])
    np.savez(folder / "2.npz", x=rows(5)[1:])
    return folder


def layout_pb(folder: Path) -> Path:
    save_pb(folder / "test_data_set_0" / "input_0.pb", rows(5)[:3])
    save_pb(folder / "test_data_set_0" / "output_0.pb", rows(5))
    save_pb(folder / "test_data_set_1" / "input_0.pb", rows(5)[3:])
    (folder / "model.onnx").write_bytes(b"")
    return folder


def layout_pb_set(folder: Path) -> Path:
    save_pb(folder / "set" / "input_0.pb", rows(5))
    return folder / "set"


def layout_pb_file(folder: Path) -> Path:
    return layout_pb_set(folder) / "input_0.pb"


def layout_csv(folder: Path) -> Path:
    lines = ["p,q,r", *(",".join(str(value) for value in row) for row in rows(5)), ""]
    (folder / "d.csv").write_text("\n".join(lines))
    return folder / "d.csv"


def layout_csv_plain(folder: Path) -> Path:
    text = "\r\n\r\n".join(";".join(str(value) for value in row) for row in rows(5))
    (folder / "d.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return folder


def layout_lone_folder(folder: Path) -> Path:
    layout_npz_folder_in = folder / "inner"
    layout_npz_folder_in.mkdir()
    layout_npz_folder(layout_npz_folder_in)
    return folder


LAYOUTS: list[tuple[Callable[[Path], Path], str]] = [
    (layout_npy_file, "npy"),
    (layout_npy_folder_of_batches, "npy"),
    (layout_npy_folder_of_samples, "npy"),
    (layout_npz_file, "npz"),
    (layout_npz_folder, "npz"),
    (layout_lone_folder, "npz"),
    (layout_pb, "pb"),
    (layout_pb_set, "pb"),
    (layout_pb_file, "pb"),
    (layout_csv, "csv"),
    (layout_csv_plain, "csv"),
]


@pytest.mark.parametrize(("layout", "kind"), LAYOUTS)
def test_every_layout_gives_the_same_samples(tmp_path: Path, layout: Callable[[Path], Path], kind: str) -> None:
    data = open_dataset(layout(tmp_path), [VEC])
    assert (data.kind, data.samples, data.labelled, data.class_names) == (kind, 5, False, ())
    for _ in range(2):  # re-iterable
        batches = list(data.batches(2))
        assert [batch.size for batch in batches] == [2, 2, 1]
        assert all(batch.weight == 1.0 and batch.labels is None and not batch.repeats and batch.source for batch in batches)
        result = joined(iter(batches))
        assert result.dtype == F32
        np.testing.assert_array_equal(result, rows(5))
    np.testing.assert_array_equal(joined(data.batches(4, limit=3, seed=1)), rows(5)[subset(5, 3, 1)])


def subset(total: int, limit: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(total, limit, replace=False, shuffle=False))


def test_several_inputs_as_named_npy_files(tmp_path: Path) -> None:
    b = np.arange(20).reshape(5, 4)
    np.save(tmp_path / "a.npy", rows(5))
    np.save(tmp_path / "b.npy", b)
    np.save(tmp_path / "labels.npy", np.array([[3], [1], [2], [0], [1]]))
    data = open_dataset(tmp_path, PAIR)
    assert (data.samples, data.labelled) == (5, True)
    batch = next(data.batches(8))
    np.testing.assert_array_equal(batch.feed["b"], b)
    assert list(batch.feed) == ["a", "b"]
    assert batch.labels is not None
    assert batch.labels.dtype == I64
    assert batch.labels.tolist() == [3, 1, 2, 0, 1]


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    inputs = (spec("N", 3, name="serve/x:0"), spec("N", name="y"))
    np.save(tmp_path / "serve_x_0.npy", rows(2))
    np.save(tmp_path / "y.npy", np.ones(2))
    assert set(next(open_dataset(tmp_path, inputs).batches(2)).feed) == {"serve/x:0", "y"}


def test_labels_beside_many_npy_files_follow_their_order(tmp_path: Path) -> None:
    layout_npy_folder_of_batches(tmp_path)
    np.save(tmp_path / "label.npy", np.array([4, 3, 2, 1, 0], np.int8))
    data = open_dataset(tmp_path, [VEC])
    assert labels(data) == [4, 3, 2, 1, 0]
    assert labels(data, limit=2, seed=3) == np.array([4, 3, 2, 1, 0])[subset(5, 2, 3)].tolist()


@pytest.mark.parametrize("key", ["label", "labels"])
@pytest.mark.parametrize(
    ("stored", "dtype", "shape"),
    [
        (np.array([1, 2]), I64, (2,)),
        (np.array([[1], [2]], np.uint8), I64, (2,)),
        (np.array([True, False]), I64, (2,)),
        (np.array([[0.5, 1], [2, 3]], np.float32), F32, (2, 2)),
    ],
)
def test_label_kinds(tmp_path: Path, key: str, stored: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "d.npz", x=rows(2), **{key: stored})
    (batch,) = read_all(tmp_path, VEC)
    assert batch.labels is not None
    assert (batch.labels.dtype, batch.labels.shape) == (dtype, shape)
    np.testing.assert_array_equal(batch.labels.ravel(), stored.ravel())


def test_an_input_named_label_is_an_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", label=rows(2), labels=np.array([1, 0]))
    (batch,) = read_all(tmp_path, spec("N", 3, name="label"))
    np.testing.assert_array_equal(batch.feed["label"], rows(2))
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0]


@pytest.mark.parametrize("suffix", ["npy", "npz", "png"])
def test_class_folders(tmp_path: Path, suffix: str) -> None:
    inputs = GRAY if suffix == "png" else VEC
    for name, count in (("dog", 2), ("cat", 1)):
        for index in range(count):
            path = tmp_path / name / f"{index}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            if suffix == "npy":
                np.save(path, rows(1))
            elif suffix == "npz":
                np.savez(path, x=rows(1)[0])
            else:
                save_image(path, color_pixels()[:, :, 0])
    (tmp_path / "__MACOSX").mkdir()
    data = open_dataset(tmp_path, [inputs])
    assert (data.class_names, data.labelled, labels(data)) == (("cat", "dog"), True, [0, 1, 1])


def test_csv_labels_by_number_name_and_target(tmp_path: Path) -> None:
    for text, expected, names in (("1,0", [1, 0], ()), ("b,a", [1, 0], ("a", "b")), ("0.5,1", [0.5, 1.0], ())):
        first, second = text.split(",")
        (tmp_path / "d.csv").write_text(f"v1,Label,v2\n1,{first},2\n3,{second},4\n")
        data = open_dataset(tmp_path / "d.csv", [spec("N", 2)])
        (batch,) = data.batches(2)
        np.testing.assert_array_equal(batch.feed["x"], [[1, 2], [3, 4]])
        assert (batch.labels.tolist(), data.class_names) == (expected, names)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [((None, 2, 3), F32, (1, 2, 3)), (("N", "T"), F32, (1, 6)), (("N", 2, "T"), I64, (1, 2, 3)), ((1, 6), I32, (1, 6))],
)
def test_csv_rows_take_the_inputs_shape(tmp_path: Path, shape: Any, dtype: np.dtype[Any], expected: Any) -> None:
    (tmp_path / "d.csv").write_text("0,1,2,3,4,5")
    (batch,) = read_all(tmp_path / "d.csv", spec(*shape, dtype=dtype))
    np.testing.assert_array_equal(batch.feed["x"], np.arange(6).reshape(expected))
    assert batch.feed["x"].dtype == dtype


def test_a_long_csv_is_read_in_blocks(tmp_path: Path) -> None:
    count = 2500
    text = "\n".join(f"{index},{index % 7}" for index in range(count))
    for name in ("1.csv", "2.csv"):
        (tmp_path / name).write_text("v,label\n" + text)
    data = open_dataset(tmp_path, [spec("N")])
    expected = np.tile(np.arange(count), 2)
    np.testing.assert_array_equal(joined(data.batches(64)), expected)
    assert labels(data) == (expected % 7).tolist()
    np.testing.assert_array_equal(joined(data.batches(9, limit=40, seed=2)), expected[subset(2 * count, 40, 2)])


def test_whole_feeds_run_as_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "1.npz", a=rows(2), sr=np.int64(16000), label=np.int64(1))
    np.savez(tmp_path / "2.npz", a=rows(4), sr=np.int64(8000), label=np.array([0]))
    data = open_dataset(tmp_path, WHOLE)
    batches = list(data.batches(64))
    assert data.samples == 2
    assert [(b.size, b.feed["a"].shape, b.feed["sr"].item(), b.labels.tolist()) for b in batches] == [  # type: ignore[union-attr]
        (1, (2, 3), 16000, [1]),
        (1, (4, 3), 8000, [0]),
    ]
    assert batches[0].feed["sr"].shape == ()
    assert sizes(data, 1, limit=1) == [1]


def test_pb_order_is_the_models_order(tmp_path: Path) -> None:
    inputs = [spec("N", name=f"in{index}") for index in range(11)]
    for index in range(11):
        save_pb(tmp_path / f"input_{index}.pb", np.full(2, index, np.float32))
    (batch,) = read_all(tmp_path, *inputs)
    assert [int(batch.feed[f"in{index}"][0]) for index in range(11)] == list(range(11))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (np.float64, F32), (np.float64, F16), (np.float32, np.dtype(np.float64)), (np.uint8, F32), (np.int64, F16),
        (np.int64, I32), (np.uint8, I64), (np.bool_, F32), (np.int64, np.dtype(np.bool_)), (">f4", F32),
    ],
)  # fmt: skip
def test_casts_that_keep_the_value(tmp_path: Path, stored: Any, wanted: np.dtype[Any]) -> None:
    values = np.array([[0, 1, 1]]).astype(stored)
    np.save(tmp_path / "d.npy", values)
    (batch,) = read_all(tmp_path, spec("N", 3, dtype=wanted))
    assert batch.feed["x"].dtype == wanted
    np.testing.assert_array_equal(batch.feed["x"], [[0, 1, 1]])


def test_bfloat16_survives_numpys_own_format(tmp_path: Path) -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
    np.save(tmp_path / "d.npy", rows(2).astype(dtype))
    for source in (tmp_path, iter([{"x": rows(2)}])):
        data = open_dataset(source, [spec("N", 3, dtype=dtype)])
        for _ in range(2):
            (batch,) = data.batches(2)
            assert batch.feed["x"].dtype == dtype
            np.testing.assert_array_equal(batch.feed["x"].astype(np.float32), rows(2))


def test_strings(tmp_path: Path) -> None:
    text = np.array([["a"], ["bc"]])
    np.savez(tmp_path / "d.npz", x=text)
    for source in (tmp_path, [{"x": text.astype(object)}], iter([{"x": text}])):
        data = open_dataset(source, [spec("N", 1, dtype=np.dtype(object))])
        for _ in range(2):
            (batch,) = data.batches(2)
            assert batch.feed["x"].dtype == object
            assert batch.feed["x"].tolist() == [["a"], ["bc"]]


def test_batches_are_copies_that_the_user_may_change(tmp_path: Path) -> None:
    original = rows(4)
    data = open_dataset([{"x": original}], [VEC])
    for batch in data.batches(4):
        batch.feed["x"][:] = -1
    np.testing.assert_array_equal(joined(data.batches(4)), rows(4))


# --- batching ---------------------------------------------------------------------------------------------------------


def test_a_change_of_shape_starts_a_new_batch() -> None:
    lengths = [4, 4, 4, 7, 7, 4]
    feeds = [{"x": np.full((1, length), index, np.float32)} for index, length in enumerate(lengths)]
    data = open_dataset(feeds, [spec("N", "T")])
    assert [(b.size, b.feed["x"].shape[1]) for b in data.batches(2)] == [(2, 4), (1, 4), (2, 7), (1, 4)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 40))
def test_fixed_batches_count_every_sample_once(counts: list[int], size: int, asked: int) -> None:
    total = sum(counts)
    stored = np.split(np.arange(total, dtype=np.float32), np.cumsum(counts)[:-1])
    data = open_dataset([{"x": values, "label": values.astype(int)} for values in stored], [spec(size)])
    seen = np.zeros(total)
    for batch in data.batches(asked):
        assert batch.feed["x"].shape == (size,)
        assert batch.size == size
        assert batch.labels is not None
        assert batch.labels.tolist() == batch.feed["x"].tolist()
        assert batch.repeats == (batch.weight < 1)
        np.add.at(seen, batch.labels, batch.weight)
    np.testing.assert_allclose(seen, 1, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 12), st.integers(1, 50), st.integers(0, 3))
def test_dynamic_batches_keep_order_and_fill_up(counts: list[int], size: int, limit: int, seed: int) -> None:
    total = sum(counts)
    stored = np.split(np.arange(total, dtype=np.float32), np.cumsum(counts)[:-1])
    data = open_dataset([{"x": values} for values in stored], [spec("N")])
    expected = np.arange(total) if limit >= total else subset(total, limit, seed)
    batches = list(data.batches(size, limit, seed))
    np.testing.assert_array_equal(joined(iter(batches)), expected)
    assert all(batch.size == size for batch in batches[:-1])


def test_limit_draws_by_seed_without_replacement() -> None:
    data = open_dataset([{"x": np.arange(50, dtype=np.float32)}], [spec("N")])
    draws = [joined(data.batches(7, limit=20, seed=seed)).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(set(draws[0]))
    assert len(draws[0]) == 20
    assert draws[0] != list(range(20))


@pytest.mark.parametrize(("size", "limit"), [(0, None), (-1, 3), (1, 0)])
def test_sizes_below_one_are_refused_at_once(size: int, limit: int | None) -> None:
    with pytest.raises(RecipeError, match="give 1 or more"):
        open_dataset([{"x": rows(1)}], [VEC]).batches(size, limit)


def test_a_large_npy_file_is_not_loaded_whole(tmp_path: Path) -> None:
    np.save(tmp_path / "big.npy", np.zeros((4000, 1000), np.float32))  # 16 MB; a batch is 64 kB
    data = open_dataset(tmp_path, [spec("N", 1000)])
    tracemalloc.start()
    try:
        assert sum(batch.size for batch in data.batches(16)) == 4000
        assert sum(batch.size for batch in data.batches(16, limit=2000)) == 2000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


# --- images -----------------------------------------------------------------------------------------------------------


def test_rgb_values_and_order(tmp_path: Path) -> None:
    pixels = color_pixels()
    save_image(tmp_path / "a.png", pixels)
    chw = pixels.transpose(2, 0, 1)[None]
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    m, s = np.reshape(mean, (1, 3, 1, 1)), np.reshape(std, (1, 3, 1, 1))
    cases: list[tuple[InputSpec, dict[str, Any], np.ndarray]] = [
        (RGB, {}, chw / 255),
        (RGB, {"color": "bgr"}, chw[:, ::-1] / 255),
        (RGB, {"scale": 1.0}, chw),
        (RGB, {"mean": mean, "std": std}, (chw / 255 - m) / s),
        (RGB, {"mean": mean, "std": std, "color": "bgr"}, (chw[:, ::-1] / 255 - m) / s),
        (RGB, {"mean": (0.5,), "std": (0.5,)}, (chw / 255 - 0.5) / 0.5),
        (spec("N", 4, 6, 3), {}, pixels[None] / 255),
        (spec("N", 4, 6, 3), {"color": "bgr"}, pixels[None, :, :, ::-1] / 255),
        (spec("N", "C", "H", "W"), {"layout": "nchw"}, chw / 255),
        (spec("N", "H", "W", "C"), {"layout": "nhwc"}, pixels[None] / 255),
        (spec("N", 3, 4, 6, dtype=U8), {}, chw),
        (spec("N", 3, 4, 6, dtype=np.dtype(np.int8)), {"mean": (128.0,)}, chw.astype(int) - 128),
        (spec("N", 3, 4, 6, dtype=F16), {}, chw / 255),
    ]
    for target, options, expected in cases:
        (batch,) = read_all(tmp_path, target, **options)
        assert batch.feed["x"].dtype == target.dtype
        tolerance = 1e-3 if target.dtype == F16 else 2e-6
        np.testing.assert_allclose(batch.feed["x"].astype(np.float64), expected, rtol=tolerance, atol=tolerance, err_msg=str(options))


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "LA", "CMYK"])
def test_every_png_and_tif_mode_reads_as_its_rgb(tmp_path: Path, mode: str) -> None:
    path = save_image(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), color_pixels(), mode)
    with Image.open(path) as image:
        assert image.mode == mode
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        gray = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(read_all(path, spec("N", 3, 4, 6, dtype=U8))[0].feed["x"][0], expected)
    if mode in ("L", "LA", "1"):
        np.testing.assert_array_equal(read_all(path, spec("N", 1, 4, 6, dtype=U8))[0].feed["x"][0, 0], gray)


def test_a_palette_with_transparency_reads_without_a_warning(tmp_path: Path) -> None:
    image = Image.fromarray(color_pixels()).quantize(4)
    image.save(tmp_path / "a.png", transparency=b"\x00\x80\xff\xff")
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_all(tmp_path, spec("N", 3, 4, 6, dtype=U8))[0].feed["x"][0], expected)


def test_sixteen_bits_keep_their_precision(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 24).reshape(4, 6).astype(np.uint16)
    save_image(tmp_path / "a.png", deep)
    gray = read_all(tmp_path, GRAY)[0].feed["x"][0, 0]
    np.testing.assert_allclose(gray, deep / 65535, rtol=1e-6)
    np.testing.assert_array_equal(read_all(tmp_path, RGB)[0].feed["x"][0, 2], gray)
    whole = read_all(tmp_path, spec("N", 1, 4, 6, dtype=U8))[0].feed["x"][0, 0]
    np.testing.assert_array_equal(whole, np.rint(deep / 257))


def test_color_to_gray_and_gray_to_color(tmp_path: Path) -> None:
    pixels = color_pixels()
    path = save_image(tmp_path / "a.png", pixels)
    expected = pixels @ np.array([0.299, 0.587, 0.114]) / 255
    np.testing.assert_allclose(read_all(path, GRAY)[0].feed["x"][0, 0], expected, atol=1 / 255)
    dynamic = read_all(path, spec("N", "C", "H", "W"), layout="nchw", color="gray")[0].feed["x"]
    assert dynamic.shape == (1, 1, 4, 6)


def test_resizing_is_antialiased_bilinear(tmp_path: Path) -> None:
    checker = np.indices((64, 64)).sum(0) % 2 * 255
    save_image(tmp_path / "a.png", checker.astype(np.uint8))
    small = read_all(tmp_path, spec("N", 1, 4, 6))[0].feed["x"]
    assert small.shape == (1, 1, 4, 6)
    np.testing.assert_allclose(small, 0.5, atol=0.03)  # without antialiasing it would alias to 0 and 1
    one_free = read_all(tmp_path, spec("N", 1, 8, "W"))[0].feed["x"]
    assert one_free.shape == (1, 1, 8, 64)


def test_images_of_several_sizes_batch_by_size(tmp_path: Path) -> None:
    for index, size in enumerate(((4, 4), (4, 4), (5, 4))):
        save_image(tmp_path / f"{index}.png", np.zeros(size, np.uint8))
    data = open_dataset(tmp_path, [spec("N", 1, "H", "W")])
    assert [batch.feed["x"].shape for batch in data.batches(8)] == [(2, 1, 4, 4), (1, 1, 5, 4)]


@pytest.mark.parametrize("suffix", ["png", "JPG", "jpeg", "bmp", "webp", "gif", "tif", "tiff"])
def test_image_suffixes(tmp_path: Path, suffix: str) -> None:
    save_image(tmp_path / f"a.{suffix}", np.full((4, 6, 3), 200, np.uint8))
    np.testing.assert_allclose(read_all(tmp_path, RGB)[0].feed["x"], 200 / 255, atol=2 / 255)


@pytest.mark.parametrize(
    ("table", "expected", "names"),
    [
        ("file,label\na.png,1\nb.png,0\n", [1, 0], ()),
        ("b.png,0\na.png,2\n", [2, 0], ()),
        ("a.png,dog\nb.png,cat\n", [1, 0], ("cat", "dog")),
        ("image;class\nb.png;x\na.png;y\n", [1, 0], ("x", "y")),
    ],
)
def test_labels_csv(tmp_path: Path, table: str, expected: list[int], names: tuple[str, ...]) -> None:
    for name in ("a.png", "b.png"):
        save_image(tmp_path / name, color_pixels())
    (tmp_path / "labels.csv").write_text(table)
    data = open_dataset(tmp_path, [RGB])
    assert (labels(data), data.class_names, data.kind, data.files) == (
        expected,
        names,
        "images",
        ("a.png", "b.png", "labels.csv"),
    )


def test_labels_csv_may_name_files_in_sub_folders(tmp_path: Path) -> None:
    for name in ("one/a.png", "two/a.png"):
        save_image(tmp_path / name, color_pixels())
    (tmp_path / "labels.csv").write_text("two/a.png,0\none/a.png,1\n")
    assert labels(open_dataset(tmp_path, [RGB])) == [1, 0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layout": "hwc"}, "image layout 'hwc' is unknown; use one of auto, nchw, nhwc"),
        ({"color": "red"}, "image color 'red' is unknown"),
        ({"std": (0.0,)}, "scale or std is 0"),
        ({"scale": 0.0}, "scale or std is 0"),
        ({"mean": (float("nan"),)}, "not a list of finite numbers"),
        ({"mean": ()}, "not a list of finite numbers"),
    ],
)
def test_image_options_that_mean_nothing(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(sentence)):
        ImageOptions(**options)


@pytest.mark.parametrize(
    ("target", "options", "error", "sentence"),
    [
        (spec("N", 3), {}, DataError, "Images need a numeric model input with 4 axes"),
        (spec("N", 5, 4, 6), {}, DataError, "cannot be told from its shape; give the image layout nchw or nhwc"),
        (spec("N", 3, 4, 3), {}, DataError, "cannot be told from its shape"),
        (spec("N", 4, 6, 6), {"layout": "nchw"}, DataError, "do not give the 4 channels of the model's input 'x'"),
        (GRAY, {"color": "bgr"}, DataError, "Images as 'bgr' do not give the 1 channels"),
        (
            RGB,
            {"mean": (1.0, 2.0)},
            RecipeError,
            "The image mean has 2 values, but the model's input 'x' (float32 [N, 3, 4, 6]) has 3",
        ),
        (
            spec("N", 3, 4, 6, dtype=U8),
            {"scale": 1 / 255},
            DataError,
            "gets fractions from the image scale, mean or std",
        ),
        (spec("N", 3, 4, 6, dtype=np.dtype(np.int8)), {}, DataError, "needs whole numbers that int8 holds exactly"),
    ],
)
def test_images_that_do_not_fit(tmp_path: Path, target: InputSpec, options: Any, error: type, sentence: str) -> None:
    save_image(tmp_path / "a.png", np.full((4, 6, 3), 201, np.uint8))
    with pytest.raises(error, match=re.escape(sentence)):
        read_all(tmp_path, target, **options)


# --- errors of files --------------------------------------------------------------------------------------------------


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


NAN = np.array([[1, 2, 3], [4, np.nan, 6]])
INT = (spec("N", 3, dtype=I64),)
ONE = (VEC,)

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


# --- from Python ------------------------------------------------------------------------------------------------------


class Reader:
    """Like onnxruntime's CalibrationDataReader, which needs no base class here."""

    def __init__(self, feeds: list[dict[str, Any]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


class Loader:
    """Starts anew for every pass, and has no length."""

    def __init__(self, feeds: list[dict[str, Any]]) -> None:
        self._feeds = feeds

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (feed for feed in self._feeds)


class Half:
    """Claims to be iterable again, but gives the same iterator each time."""

    def __init__(self, feeds: list[dict[str, Any]]) -> None:
        self._iterator = iter(feeds)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._iterator


SOURCES: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], bool]] = {
    "list": (lambda feeds: feeds, True),
    "tuple": (tuple, True),
    "generator": (lambda feeds: (feed for feed in feeds), False),
    "reader": (Reader, False),
    "loader": (Loader, False),
    "half": (Half, False),
}


@pytest.mark.parametrize("name", SOURCES)
def test_python_sources_give_several_whole_passes(name: str) -> None:
    make, known = SOURCES[name]
    feeds = [{"x": rows(6)[:2], "label": [0, 1]}, {"x": rows(6)[2], "label": 2}, {"x": rows(6)[3:], "label": [3, 4, 5]}]
    data = open_dataset(make(feeds), ONE)
    assert (data.kind, data.labelled, data.fingerprint) == ("python", True, None)
    assert data.samples == (6 if known else None)
    first = next(data.batches(2))  # a pass that is left early
    np.testing.assert_array_equal(first.feed["x"], rows(6)[:2])
    np.testing.assert_array_equal(joined(data.batches(2, limit=3)), rows(6)[subset(6, 3, 0) if known else slice(3)])
    for _ in range(2):
        np.testing.assert_array_equal(joined(data.batches(4)), rows(6))
        assert labels(data) == [0, 1, 2, 3, 4, 5]


def test_two_passes_at_once_share_the_spool() -> None:
    data = open_dataset(({"x": rows(5)[index]} for index in range(5)), ONE)
    pairs = list(zip(data.batches(1), data.batches(1), strict=True))
    assert len(pairs) == 5
    assert all(np.array_equal(a.feed["x"], b.feed["x"]) for a, b in pairs)


def test_an_endless_source_stops_at_the_limit() -> None:
    def endless() -> Iterator[dict[str, Any]]:
        while True:
            yield {"x": rows(2)}

    assert sizes(open_dataset(endless(), ONE), 4, limit=7) == [4, 3]


def test_the_spool_goes_with_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = open_dataset(({"x": rows(1)} for _ in range(5)), ONE)
    assert sizes(data, 2) == [2, 2, 1]
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 5
    del data
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_spooling_does_not_gather_feeds_in_memory() -> None:
    feeds = ({"x": np.zeros((1, 50_000), np.float32)} for _ in range(60))  # 12 MB in all
    data = open_dataset(feeds, [spec("N", 50_000)])
    tracemalloc.start()
    try:
        assert sum(sizes(data, 2)) == 60
        assert sum(sizes(data, 2)) == 60
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000


def test_a_source_that_fails_midway_never_passes_as_short() -> None:
    def failing() -> Iterator[dict[str, Any]]:
        yield {"x": rows(1)}
        raise KeyError("the user's own")

    data = open_dataset(failing(), ONE)
    with pytest.raises(KeyError):
        list(data.batches(1))
    with pytest.raises(DataError, match="failed at feed 1 and cannot be read on; give the feeds again"):
        list(data.batches(1))


@pytest.mark.parametrize(
    ("source", "inputs", "sentence"),
    [
        ([], ONE, "gave no feeds; give at least one dict"),
        (iter([]), ONE, "gave no feeds"),
        (
            rows(2),
            ONE,
            "The data is a ndarray; give a path, or an iterable of dicts from input name to array, for example [{'x': array}]",
        ),
        (3, ONE, "The data is a int; give a path"),
        ([rows(2)], ONE, "Feed 0 is a ndarray; give a dict"),
        ([{"x": rows(1)}, {"y": rows(1)}], ONE, "Feed 1 has no array for input 'x' (found 'y')"),
        (iter([{"x": rows(1)}, {"x": np.ones((1, 4))}]), ONE, "Feed 1 has 4 on axis 1"),
        ([{"x": [[1, 2, 3], [1]]}], ONE, "Feed 0 has a value for 'x' that is no array"),
        ([{"x": rows(1)}, {"x": NAN}], ONE, "Feed 1 has the value nan in sample 1 of input 'x'"),
        ([{"x": rows(1), "label": [1]}, {"x": rows(1)}], ONE, "Feed 1 has no labels, but the samples before it have"),
        (
            iter([{"x": rows(1)}, {"x": rows(1), "label": [1]}]),
            ONE,
            "Feed 1 has labels, but the samples before it have none",
        ),
        ([{"x": [["a", None, 1]]}], ONE, "Feed 0 has object values for input 'x'"),
    ],
)
def test_python_errors(source: Any, inputs: tuple[InputSpec, ...], sentence: str) -> None:
    with pytest.raises(DataError, match=re.escape(sentence)):
        describe(open_dataset(source, inputs), inputs)


def test_one_dict_is_one_feed() -> None:
    assert sizes(open_dataset({"x": rows(3)}, ONE), 2) == [2, 1]


def test_neither_onnxruntime_nor_torch_is_imported() -> None:
    code = "import sys, relief_onnx.data; print([m for m in ('onnxruntime', 'torch') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- fingerprint and summary ------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_files_and_the_options(tmp_path: Path) -> None:
    def fingerprint(**options: Any) -> str | None:
        return open_dataset(tmp_path, [RGB], images=ImageOptions(**options)).fingerprint

    save_image(tmp_path / "a.png", color_pixels())
    seen = [fingerprint()]
    assert seen[0] == fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", str(seen[0]))
    seen.append(fingerprint(scale=1.0))
    os.utime(tmp_path / "a.png", ns=(1, 1))
    seen.append(fingerprint())
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    seen.append(fingerprint())
    (tmp_path / "labels.csv").write_text("b.png,1")
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


def test_summary_of_plain_data() -> None:
    values = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    summary = describe(open_dataset([{"x": values, "label": np.arange(200) % 2}], ONE), ONE)
    (found,) = summary.inputs
    assert (summary.kind, summary.samples, summary.classes, summary.warnings) == (
        "python",
        200,
        (("0", 100), ("1", 100)),
        (),
    )
    assert (found.name, found.dtype, found.shapes) == ("x", "float32", ((3,),))
    np.testing.assert_allclose([found.min, found.max, found.mean], [values.min(), values.max(), values.mean(dtype=np.float64)], rtol=1e-6)


def test_summary_counts_samples_once_for_a_fixed_batch() -> None:
    values = np.array([0, 0, 0, 10], np.float32)
    summary = describe(open_dataset([{"x": values}], [spec(3)]), [spec(3)])
    assert (summary.samples, summary.inputs[0].mean) == (4, 2.5)


def test_summary_of_whole_feeds_and_shapes() -> None:
    feeds = [{"a": rows(2), "sr": np.array(1)}, {"a": rows(4), "sr": np.array(3)}]
    summary = describe(open_dataset(feeds, WHOLE), WHOLE)
    assert summary.inputs[0].shapes == ((2, 3), (4, 3))
    assert (summary.inputs[1].shapes, summary.inputs[1].mean) == (((),), 2.0)
    assert any("share no batch axis" in warning for warning in summary.warnings)


@pytest.mark.parametrize(
    ("feed", "inputs", "warning"),
    [
        ({"x": rows(3)}, VEC, "only 3 samples; 128 or more are advised"),
        ({"x": np.ones((200, 3))}, VEC, "all samples are identical"),
        (
            {"x": np.arange(130 * 24).reshape(130, 1, 4, 6) % 256},
            GRAY,
            "the values of 'x' lie in 0..255; images are usually scaled",
        ),
        ({"x": rows(132), "label": [0] * 121 + [1] * 11}, VEC, "class '0' has 121 samples and class '1' only 11"),
    ],
)
def test_summary_warnings(feed: dict[str, Any], inputs: InputSpec, warning: str) -> None:
    warnings = describe(open_dataset([feed], [inputs]), [inputs]).warnings
    assert len(warnings) == 1
    assert warning in warnings[0]


def test_summary_of_files_names_what_was_left_aside(tmp_path: Path) -> None:
    data = open_dataset(layout_npy_folder_of_samples(tmp_path), ONE)
    summary = describe(data, ONE)
    assert summary.files == tuple(f"{index}.npy" for index in range(5))
    assert "1 files of other formats were left aside, such as 'README.txt'" in summary.warnings


def test_class_names_are_counted_even_when_empty(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 1)):
        for index in range(count):
            save_image(tmp_path / name / f"{index}.png", color_pixels(index))
    summary = describe(open_dataset(tmp_path, [RGB]), [RGB])
    assert summary.classes == (("a", 2), ("b", 1))
