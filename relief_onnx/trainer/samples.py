"""Samples in random order, batch by batch: out of memory where they fit there, else streamed from disk. Needs no torch.

The order depends on the seed and the number of the epoch only, so a run that was stopped finds its place again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relief_onnx.data_checks import batch_axis
from relief_onnx.dataset import Dataset, Part, Piece

__all__ = ["CACHE_BYTES", "Draw", "Samples"]

Array = NDArray[Any]

# Samples up to that size are held in memory; beyond it, so much of them is mixed at a time, read in runs of so many rows.
CACHE_BYTES, MIXED_BYTES, RUN_ROWS = 1 << 30, 1 << 28, 256
READ_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Draw:
    """One batch: a feed, labels, the numbers of its samples, and how many of its rows count (the rest fill up a fixed batch)."""

    feed: dict[str, Array]
    labels: Array | None
    numbers: Array
    rows: int


@dataclass(frozen=True, eq=False)
class _Group:
    """Samples of one shape. numbers: their places in the data set."""

    feed: dict[str, Array]
    labels: Array | None
    numbers: Array

    def draw(self, rows: Array, size: int) -> Draw:
        """These rows; with `size`, repeated to fill a batch of exactly that many."""
        taken = np.resize(rows, size) if size else rows
        feed = {name: np.ascontiguousarray(value[taken]) for name, value in self.feed.items()}
        return Draw(feed, None if self.labels is None else self.labels[taken], self.numbers[taken], len(rows))


class Samples:
    """The samples of a data set, some of them set aside for validation by the seed."""

    def __init__(self, dataset: Dataset, *, batch: int, validation: float, seed: int, limit: int = CACHE_BYTES) -> None:
        """Reads the data once. limit: bytes that are held in memory. Raises DataError."""
        axis = batch_axis(dataset.inputs)
        self._dataset, self._seed = dataset, seed
        self.batchable = axis.batchable
        self.batch = axis.fixed or (batch if axis.batchable else 1)
        self._fill = axis.fixed or 0
        self._groups: list[_Group] | None = []
        self._row_bytes = 1.0
        self.total = self._read(limit)
        count = min(round(validation * self.total), self.total - 1)
        self._aside = np.zeros(self.total, bool)
        self._aside[np.random.default_rng([seed, 1]).permutation(self.total)[:count]] = True
        self.validation_rows, self.training_rows = count, self.total - count

    @property
    def cached(self) -> bool:
        """Whether all samples are in memory."""
        return self._groups is not None

    def _read(self, limit: int) -> int:
        pieces: list[Piece] | None = []
        total = held = 0
        for piece in self._dataset.pieces(READ_ROWS):
            held += sum(value.nbytes for value in piece.feed.values())
            total += self._rows(piece)
            expected = held if self._dataset.samples is None else held / total * self._dataset.samples
            if max(held, expected) > limit:
                pieces = None
                self._row_bytes = held / total
                if self._dataset.samples is not None:
                    total = self._dataset.samples
                    break
            if pieces is not None:
                pieces.append(piece)
        self._groups = None if pieces is None else _grouped(pieces, 0, self.batchable)
        return total

    def _rows(self, piece: Piece) -> int:
        return piece.rows if self.batchable else 1

    def epoch(self, number: int) -> Iterator[Draw]:
        """The training samples in the order of that epoch. A model with a fixed batch gets whole batches only, where there are enough."""
        rng = np.random.default_rng([self._seed, 2, number])
        for groups in self._windows(rng):
            yield from self._draws(groups, rng)

    def validation(self) -> Iterator[Draw]:
        """The samples set aside, in order; every one counts once."""
        yield from self._in_order(lambda numbers: self._aside[numbers])

    def everything(self) -> Iterator[Draw]:
        """All samples, in order."""
        yield from self._in_order(lambda numbers: np.ones(len(numbers), bool))

    def _in_order(self, wanted: Callable[[Array], Array]) -> Iterator[Draw]:
        for groups in self._windows(None):
            for group in groups:
                rows = np.flatnonzero(wanted(group.numbers))
                for start in range(0, len(rows), self.batch):
                    yield group.draw(rows[start : start + self.batch], self._fill)

    def _draws(self, groups: Sequence[_Group], rng: np.random.Generator) -> Iterator[Draw]:
        plan: list[tuple[_Group, Array]] = []
        for group in groups:
            rows = rng.permutation(np.flatnonzero(~self._aside[group.numbers]))
            parts = [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]
            if self._fill and len(parts) > 1 and len(parts[-1]) < self.batch:
                parts.pop()
            plan += [(group, part) for part in parts]
        for place in rng.permutation(len(plan)) if len(groups) > 1 else range(len(plan)):
            group, rows = plan[place]
            yield group.draw(rows, self._fill)

    def _windows(self, rng: np.random.Generator | None) -> Iterator[list[_Group]]:
        """Groups that are mixed with each other: all of them, or as many as memory is meant for. Without `rng` in their own order."""
        if self._groups is not None:
            yield self._groups
            return
        waiting: list[tuple[Piece, int]] = []
        held, most = 0, MIXED_BYTES if rng is not None else 0
        for piece, start in self._runs(rng):
            waiting.append((piece, start))
            held += sum(value.nbytes for value in piece.feed.values())
            if held >= max(most, self.batch * self._row_bytes):
                yield _merged(waiting, self.batchable)
                waiting, held = [], 0
        if waiting:
            yield _merged(waiting, self.batchable)

    def _runs(self, rng: np.random.Generator | None) -> Iterator[tuple[Piece, int]]:
        """Runs of consecutive samples with the number of the first, in random order where the data can be read so."""
        parts = self._dataset.parts
        if rng is None or not isinstance(parts, Sequence):
            start = 0
            for piece in self._dataset.pieces(RUN_ROWS):
                yield piece, start
                start += self._rows(piece)
            return
        runs = list(_split(parts))
        for place in rng.permutation(len(runs)):
            part, rows, start = runs[place]
            for piece in self._dataset.rows_of(part, rows, RUN_ROWS):
                yield piece, start
                start += self._rows(piece)


def _split(parts: Sequence[Part]) -> Iterator[tuple[Part, Array, int]]:
    """Each part in runs of RUN_ROWS rows, with the number of the first sample."""
    first = 0
    for part in parts:
        for start in range(0, part.rows, RUN_ROWS):
            yield part, np.arange(start, min(start + RUN_ROWS, part.rows)), first + start
        first += part.rows


def _grouped(pieces: Sequence[Piece], start: int, batchable: bool) -> list[_Group]:
    places = []
    for piece in pieces:
        places.append((piece, start))
        start += piece.rows if batchable else 1
    return _merged(places, batchable)


def _merged(pieces: Sequence[tuple[Piece, int]], batchable: bool) -> list[_Group]:
    """Pieces of the same shape as one group; whole feeds of a model without a batch axis each on their own."""
    if not batchable:
        return [_whole(piece, start) for piece, start in pieces]
    found: dict[object, list[tuple[Piece, int]]] = {}
    for piece, start in pieces:
        found.setdefault(piece.shapes(), []).append((piece, start))
    groups = []
    for same in found.values():
        feed = {name: np.concatenate([piece.feed[name] for piece, _ in same]) for name in same[0][0].feed}
        labels = [piece.labels for piece, _ in same if piece.labels is not None]
        numbers = np.concatenate([np.arange(start, start + piece.rows) for piece, start in same])
        groups.append(_Group(feed, np.concatenate(labels) if labels else None, numbers))
    return groups


class _Feed(_Group):
    """A whole feed."""

    def draw(self, rows: Array, size: int) -> Draw:
        return Draw(self.feed, self.labels, self.numbers, 1)


def _whole(piece: Piece, start: int) -> _Group:
    return _Feed(dict(piece.feed), piece.labels, np.array([start]))
