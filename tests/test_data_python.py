"""Feeds from Python: lists, iterators, readers, and the spool of what can be read only once."""

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
import pytest
from data_files import NAN, ONE, joined, labels, rows, sizes, spec, subset

from relief_onnx.data import InputSpec, describe, open_dataset
from relief_onnx.errors import DataError


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
