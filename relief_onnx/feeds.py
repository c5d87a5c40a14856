"""Feeds from Python as parts: lists, iterables that start anew, one-shot iterators and CalibrationDataReader.

What can be read only once is kept on disk while it is first read, so that further passes work and memory does not grow.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from relief_onnx.data_checks import (
    Array,
    Feed,
    Header,
    batch_axis,
    cast,
    check_headers,
    check_label_header,
    label_key,
    lift,
)
from relief_onnx.dataset import Dataset, Part, check_labelled
from relief_onnx.datatypes import InputSpec
from relief_onnx.errors import DataError

__all__ = ["CalibrationDataReader", "open_feeds"]


@runtime_checkable
class CalibrationDataReader(Protocol):
    """The part of onnxruntime's class of this name that is used: feeds one by one, then None."""

    def get_next(self) -> Mapping[str, Any] | None: ...


def open_feeds(source: object, inputs: tuple[InputSpec, ...]) -> Dataset:
    """A dataset over feeds (input name -> array, optionally with 'label'). One feed is read at once, to check it."""
    parts = _parts(source, inputs)
    known = isinstance(parts, list)
    first = next(iter(parts), None)
    if first is None:
        raise DataError("The data from Python gave no feeds; give at least one dict from input name to array.")
    return Dataset(
        kind="python",
        source=f"feeds from a Python {type(source).__name__}",
        samples=sum(part.rows for part in parts) if known else None,
        labelled=check_labelled(parts) if isinstance(parts, list) else first.labelled,
        class_names=(),
        fingerprint=None,
        inputs=inputs,
        parts=parts,
    )


def _parts(source: object, inputs: tuple[InputSpec, ...]) -> Iterable[Part]:
    if isinstance(source, Mapping):
        source = [source]
    if isinstance(source, CalibrationDataReader):
        return _Spool(iter(source.get_next, None), inputs)
    if isinstance(source, np.ndarray) or not isinstance(source, Iterable):
        raise DataError(
            f"The data is a {type(source).__name__}; give a path, or an iterable of dicts from input name to array, "
            f"for example [{{'{inputs[0].name}': array}}]."
        )
    if isinstance(source, Sequence):
        return [_part(feed, number, inputs) for number, feed in enumerate(source)]
    iterator = iter(source)
    if iterator is source or iter(source) is iterator:
        return _Spool(iterator, inputs)
    return _Restarted(source, inputs)


def _part(feed: object, number: int, inputs: Sequence[InputSpec]) -> Part:
    """One feed, with its names and shapes checked."""
    source = f"Feed {number}"
    if not isinstance(feed, Mapping):
        raise DataError(
            f"{source} is a {type(feed).__name__}; give a dict from input name to array, for example {{'{inputs[0].name}': array}}."
        )
    arrays = {str(name): _array(value, str(name), source) for name, value in feed.items()}
    key = label_key(arrays, inputs, source)
    label = arrays.pop(key) if key else None
    axis = batch_axis(inputs)
    rows = check_headers({name: Header(a.shape, a.dtype) for name, a in arrays.items()}, inputs, axis, source)
    if label is not None:
        check_label_header(Header(label.shape, label.dtype), rows, source)
    lifted: Feed = {spec.name: lift(arrays[spec.name], spec, axis) for spec in inputs}
    return Part(source, rows, lambda: (lifted, label), label is not None)


def _array(value: object, name: str, source: str) -> Array:
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"{source} has a value for '{name}' that is no array ({error}); give a numpy array.") from error


class _Restarted:
    """Parts of an iterable that starts anew for every pass."""

    def __init__(self, source: Iterable[object], inputs: Sequence[InputSpec]) -> None:
        self._source, self._inputs = source, inputs

    def __iter__(self) -> Iterator[Part]:
        for number, feed in enumerate(self._source):
            yield _part(feed, number, self._inputs)


class _Spool:
    """Parts of a one-shot iterator: each feed is saved when it is first read, and loaded after that.

    The temporary folder goes when this object goes, or at the end of the interpreter.
    """

    def __init__(self, source: Iterator[object], inputs: Sequence[InputSpec]) -> None:
        self._source, self._inputs = source, inputs
        self._stored: list[tuple[int, bool]] = []  # rows and whether labelled
        self._ended = False
        self._pulling = False
        self._folder = Path(tempfile.mkdtemp(prefix="relief-onnx-"))
        self._cleanup = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __iter__(self) -> Iterator[Part]:
        number = 0
        while True:
            if number < len(self._stored):
                yield self._load(number)
            else:
                part = self._pull()
                if part is None:
                    return
                yield part
            number += 1

    def _pull(self) -> Part | None:
        if self._ended:
            return None
        number = len(self._stored)
        if self._pulling:
            raise DataError(f"The data from Python failed at feed {number} and cannot be read on; give the feeds again.")
        self._pulling = True  # stays set when the source raises or its feed does not fit: what follows is incomplete
        feed = next(self._source, self)
        if feed is self:
            self._ended, self._pulling = True, False
            return None
        part = self._save(_part(feed, number, self._inputs), number)
        self._pulling = False
        return part

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.npz"

    def _save(self, part: Part, number: int) -> Part:
        raw, label = part.read()
        feed = {spec.name: cast(raw[spec.name], spec, part.source) for spec in self._inputs}
        plain = (array.astype(str) if array.dtype.hasobject else array for array in feed.values())
        keyed: dict[str, Any] = {f"arr_{index}": array for index, array in enumerate(plain)}
        if label is not None:
            keyed["label"] = label
        try:
            np.savez(self._path(number), **keyed)
        except OSError as error:
            raise DataError(
                f"{part.source} cannot be kept in the temporary folder '{self._folder}' ({error.strerror}); free "
                "some space, set TMPDIR, "
                "or give an iterable that can be read several times."
            ) from error
        self._stored.append((part.rows, part.labelled))
        return Part(part.source, part.rows, lambda: (feed, label), part.labelled)

    def _load(self, number: int) -> Part:
        rows, labelled = self._stored[number]

        def read() -> tuple[Feed, Array | None]:
            with np.load(self._path(number), allow_pickle=False) as archive:
                feed = {spec.name: archive[f"arr_{index}"] for index, spec in enumerate(self._inputs)}
                return feed, archive["label"] if labelled else None

        return Part(f"Feed {number}", rows, read, labelled)
