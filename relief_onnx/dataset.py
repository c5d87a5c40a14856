"""Stored samples as a stream of batches that fit a model.

A reader yields `Part`s: lazily read units (a file, a slice of one, a feed) with a known number of samples. A `Dataset`
picks samples from them, checks and casts them piece by piece, and regroups the pieces into batches, so that memory
holds about two batches whatever the size of the data.

A model with a fixed batch size B leaves r = samples mod B over. They are repeated in turn until they fill lcm(r, B) / B
whole batches, each with weight r / lcm(r, B): every sample then counts exactly once in a weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from relief_onnx.data_checks import Array, Feed, batch_axis, cast, to_labels
from relief_onnx.datatypes import InputSpec
from relief_onnx.errors import DataError, RecipeError

__all__ = ["Batch", "Dataset", "Part", "Piece", "check_labelled"]


@dataclass(frozen=True)
class Part:
    """One stored unit. `read()` gives arrays as stored with `rows` on axis 0 (or one whole feed), and labels if any."""

    source: str
    rows: int
    read: Callable[[], tuple[Feed, Array | None]]
    labelled: bool = False


@dataclass(frozen=True, eq=False)
class Batch:
    """What one run of the model gets.

    feed: every model input, in its exact dtype.
    size: rows on the batch axis; 1 for a whole feed of a model without a common batch axis.
    weight: what each row counts for; below 1 only where rows are repeated to fill a fixed batch.
    labels: int64 [size] class numbers, or float targets with `size` on axis 0; None without labels.
    source: the file or files that it came from, for messages.
    repeats: True where a sample occurs more than once in the batches of this remainder.
    """

    feed: Feed
    size: int
    weight: float = 1.0
    labels: Array | None = None
    source: str = ""
    repeats: bool = False


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive checked rows of one part, before regrouping."""

    feed: Feed
    rows: int
    labels: Array | None
    source: str

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes behind axis 0: only pieces that agree here share a batch."""
        labels = () if self.labels is None else self.labels.shape[1:]
        return (*(array.shape[1:] for array in self.feed.values()), labels)

    def take(self, rows: slice | Array) -> Piece:
        """Some of the rows."""
        feed = {name: array[rows] for name, array in self.feed.items()}
        labels = None if self.labels is None else self.labels[rows]
        return Piece(feed, len(next(iter(feed.values()))), labels, self.source)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples for one model; it can be read any number of times.

    kind: "npy", "npz", "images", "pb", "csv" or "python".
    source: the path as given, or a description.
    samples: how many, None where only a full pass would tell.
    class_names: names by class number where the data has names.
    fingerprint: sha256 of kind, options and each file's relative name, size and time; None for data from Python.
    files: the files, relative to `source`; notes: what the reader left aside, for people.
    """

    kind: str
    source: str
    samples: int | None
    labelled: bool
    class_names: tuple[str, ...]
    fingerprint: str | None
    inputs: tuple[InputSpec, ...] = field(repr=False)
    parts: Iterable[Part] = field(repr=False)
    files: tuple[str, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()

    def batches(self, batch_size: int, limit: int | None = None, seed: int = 0) -> Iterator[Batch]:
        """Stream the samples, in file order, in batches of `batch_size` (or of the size that the model fixes).

        A batch is smaller only at the end and where the shapes of the samples change. With `limit` below the number of
        samples a random subset without replacement is used, the same for the same seed; where that number is unknown,
        the first `limit` samples.

        Raises DataError when a file cannot be read or a value does not fit, RecipeError for a size or limit below 1.
        """
        for name, value in (("batch size", batch_size), ("sample limit", limit)):
            if value is not None and value < 1:
                raise RecipeError(f"The {name} is {value}; give 1 or more.")
        axis = batch_axis(self.inputs)
        size = axis.fixed or batch_size
        pieces = self.pieces(size, limit, seed)
        if not axis.batchable:
            return (Batch(piece.feed, 1, 1.0, piece.labels, piece.source) for piece in pieces)
        return _regroup(pieces, size, axis.fixed is not None)

    def pieces(self, rows: int, limit: int | None = None, seed: int = 0) -> Iterator[Piece]:
        """The chosen samples, checked and cast, at most `rows` at a time and never across parts."""
        for part, chosen in self._chosen(limit, seed):
            yield from self.rows_of(part, chosen, rows)

    def rows_of(self, part: Part, rows: Array, step: int) -> Iterator[Piece]:
        """Some rows of one of the parts, checked and cast, at most `step` at a time (1 for whole feeds)."""
        if part.labelled != self.labelled:
            raise DataError(_half_labelled(part.source, part.labelled))
        yield from self._read(part, rows, step if batch_axis(self.inputs).batchable else 1)

    def _chosen(self, limit: int | None, seed: int) -> Iterator[tuple[Part, Array]]:
        """Each part with the numbers of the rows to use from it."""
        subset: Array | None = None
        if limit is not None and self.samples is not None and limit < self.samples:
            subset = np.sort(np.random.default_rng(seed).choice(self.samples, limit, replace=False, shuffle=False))
        start = 0
        for part in self.parts:
            stop = start + part.rows
            if subset is not None:
                low, high = np.searchsorted(subset, [start, stop])
                rows = subset[low:high] - start
            else:
                rows = np.arange(part.rows if limit is None else min(part.rows, limit - start))
            if rows.size:
                yield part, rows
            start = stop
            if limit is not None and self.samples is None and start >= limit:
                return
        if start == 0:
            raise DataError(f"{self.source} gave no samples; give at least one.")

    def _read(self, part: Part, rows: Array, step: int) -> Iterator[Piece]:
        feed, labels = part.read()
        labels = None if labels is None else to_labels(labels, part.rows, part.source)
        batchable = batch_axis(self.inputs).batchable
        for begin in range(0, len(rows), step):
            some = _as_slice(rows[begin : begin + step])
            first = int(rows[begin])
            checked = {
                spec.name: cast(feed[spec.name][some] if batchable else feed[spec.name], spec, part.source, first) for spec in self.inputs
            }
            yield Piece(checked, len(rows[begin : begin + step]), None if labels is None else labels[some], part.source)


def check_labelled(parts: Sequence[Part]) -> bool:
    """Whether the parts have labels; all or none of them must."""
    labelled = parts[0].labelled
    for part in parts:
        if part.labelled != labelled:
            raise DataError(_half_labelled(part.source, part.labelled))
    return labelled


def _half_labelled(source: str, labelled: bool) -> str:
    found = "has labels, but the samples before it have none" if labelled else "has no labels, but the samples before it have"
    return f"{source} {found}; label all samples or none."


def _as_slice(rows: Array) -> slice | Array:
    """Consecutive rows as a slice: a memory map then reads one run of bytes."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _regroup(pieces: Iterator[Piece], size: int, fixed: bool) -> Iterator[Batch]:
    """Fill batches of exactly `size` rows while the shapes agree; flush where they change and at the end."""
    pending: list[Piece] = []
    count = 0
    for whole in pieces:
        if pending and pending[0].shapes() != whole.shapes():
            yield from _flush(pending, size, fixed)
            pending, count = [], 0
        begin = 0
        while begin < whole.rows:
            piece = whole.take(slice(begin, begin + size - count))
            pending.append(piece)
            begin += piece.rows
            count += piece.rows
            if count == size:
                yield _batch(_join(pending))
                pending, count = [], 0
    yield from _flush(pending, size, fixed)


def _flush(pending: list[Piece], size: int, fixed: bool) -> Iterator[Batch]:
    """The rows left over: one small batch, or whole weighted batches where the model fixes the size."""
    if not pending:
        return
    left = _join(pending)
    if not fixed:
        yield _batch(left)
        return
    total = math.lcm(left.rows, size)
    for begin in range(0, total, size):
        rows = np.arange(begin, begin + size) % left.rows
        yield _batch(left.take(rows), left.rows / total, repeats=True)


def _batch(piece: Piece, weight: float = 1.0, repeats: bool = False) -> Batch:
    return Batch(piece.feed, piece.rows, weight, piece.labels, piece.source, repeats)


def _join(pieces: Sequence[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    feed = {name: np.concatenate([piece.feed[name] for piece in pieces]) for name in pieces[0].feed}
    stored = [piece.labels for piece in pieces if piece.labels is not None]
    sources = list(dict.fromkeys(piece.source for piece in pieces))
    source = sources[0] if len(sources) == 1 else f"{sources[0]} to {sources[-1]} ({len(sources)} sources)"
    return Piece(feed, sum(piece.rows for piece in pieces), np.concatenate(stored) if stored else None, source)
