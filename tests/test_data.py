"""The data door: every format of arrays, values, batching, fingerprint and summary."""

from __future__ import annotations

import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from data_files import (
    F16,
    F32,
    GRAY,
    I32,
    I64,
    ONE,
    PAIR,
    RGB,
    VEC,
    WHOLE,
    color_pixels,
    joined,
    labels,
    layout_npy_folder_of_samples,
    read_all,
    rows,
    save_image,
    save_pb,
    sizes,
    spec,
    subset,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from relief_onnx.data import ImageOptions, InputSpec, batch_axis, describe, open_dataset
from relief_onnx.errors import RecipeError


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


def layout_npy_file(folder: Path) -> Path:
    np.save(folder / "any.npy", rows(5))
    return folder / "any.npy"


def layout_npy_folder_of_batches(folder: Path) -> Path:
    np.save(folder / "1.npy", rows(5)[:2])
    np.save(folder / "2.npy", rows(5)[2:])
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
            {"x": np.arange(130.0 * 24).reshape(130, 1, 4, 6) % 256},
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


@pytest.mark.parametrize(
    ("text", "taken", "hint"), [("3,1", "class numbers", False), ("3.0,1.0", "targets", True), ("3.5,1.0", "targets", False)]
)
def test_what_labels_are_taken_for_is_told(text: str, taken: str, hint: bool, tmp_path: Path) -> None:
    first, second = text.split(",")
    (tmp_path / "d.csv").write_text(f"v1,label,v2\n1,{first},2\n3,{second},4\n")
    inputs = [spec("N", 2)]
    summary = describe(open_dataset(tmp_path / "d.csv", inputs), inputs)
    assert summary.labels == taken
    assert any("write 3, not 3.0" in warning for warning in summary.warnings) == hint


@pytest.mark.parametrize(("dtype", "told"), [(np.int64, True), (np.bool_, True), (np.float64, False), (np.float32, False)])
def test_values_of_another_kind_are_told(dtype: Any, told: bool, tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.array([[0, 1, 1], [1, 0, 1]], dtype))
    inputs = [spec("N", 3)]
    summary = describe(open_dataset(tmp_path, inputs), inputs)
    sentence = f"the {np.dtype(dtype).name} values of 'x' become float32, which holds each of them exactly"
    assert (sentence in summary.warnings) == told
    assert summary.labels is None
