"""What a dataset holds, for people: counts, ranges and what looks wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from relief_onnx.data_checks import Array, batch_axis, family
from relief_onnx.dataset import Dataset, Piece
from relief_onnx.datatypes import InputSpec

__all__ = ["DataSummary", "InputSummary", "describe"]

ADVISED_SAMPLES = 128
IMBALANCE = 10
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class InputSummary:
    """One input over all samples. Shapes lack the batch axis; min, max and mean are None without numbers."""

    name: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    min: float | None
    max: float | None
    mean: float | None


@dataclass(frozen=True)
class DataSummary:
    """A dataset at a glance. `classes` has (name or number, samples) for each class; `labels` what labels are taken for."""

    kind: str
    source: str
    files: tuple[str, ...]
    samples: int
    labelled: bool
    labels: str | None
    classes: tuple[tuple[str, int], ...]
    inputs: tuple[InputSummary, ...]
    warnings: tuple[str, ...]


@dataclass
class _Range:
    """Streaming shapes, min, max, sum and count of one input."""

    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0
    count: int = 0

    def add(self, array: Array, batchable: bool) -> None:
        self.shapes[array.shape[1:] if batchable else array.shape] += 1
        if not array.size or family(array.dtype) not in ("float", "int", "bool"):
            return
        values = array.astype(np.float64)
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        self.total += float(values.sum())
        self.count += values.size

    def summary(self, spec: InputSpec) -> InputSummary:
        dtype = "string" if spec.dtype.kind == "O" else spec.dtype.name
        numbers = (self.low, self.high, self.total / self.count) if self.count else (None, None, None)
        return InputSummary(spec.name, dtype, tuple(sorted(self.shapes)), *numbers)


class _Same:
    """Whether all samples so far equal the first one."""

    def __init__(self) -> None:
        self.first: list[Array] | None = None
        self.all = True

    def add(self, piece: Piece, batchable: bool) -> None:
        rows = [array if batchable else array[None] for array in piece.feed.values()]
        if self.first is None:
            self.first = [array[:1].copy() for array in rows]
        pairs = zip(rows, self.first, strict=True)
        self.all = self.all and all(a.shape[1:] == b.shape[1:] and bool((a == b).all()) for a, b in pairs)


def describe(dataset: Dataset, inputs: Sequence[InputSpec]) -> DataSummary:
    """Read every sample once and sum up. Raises whatever reading the data would raise."""
    specs = tuple(inputs)
    batchable = batch_axis(specs).batchable
    ranges = {spec.name: _Range() for spec in specs}
    same = _Same()
    labels: Counter[int] = Counter()
    samples, targets, whole = 0, False, True
    for piece in dataset.pieces(_ROWS_AT_ONCE):
        samples += piece.rows
        same.add(piece, batchable)
        for name, array in piece.feed.items():
            ranges[name].add(array, batchable)
        if piece.labels is not None and piece.labels.dtype.kind == "i":
            labels.update(piece.labels.tolist())
        elif piece.labels is not None:
            targets, whole = True, whole and bool((piece.labels == np.rint(piece.labels)).all())
    classes = _classes(dataset.class_names, labels)
    found = tuple(ranges[spec.name].summary(spec) for spec in specs)
    warnings = [*dataset.notes, *_warnings(dataset, specs, found, samples, same.all, classes), *_converted(dataset, specs)]
    if targets and whole:
        warnings.append("the labels are whole numbers with a point, so they are targets; write 3, not 3.0, if they are class numbers")
    taken = "targets" if targets else "class numbers" if dataset.labelled else None
    return DataSummary(dataset.kind, dataset.source, dataset.files, samples, dataset.labelled, taken, classes, found, tuple(warnings))


def _converted(dataset: Dataset, specs: tuple[InputSpec, ...]) -> list[str]:
    """That values of another kind are taken, which reading lets pass only where each of them stays the same number."""
    feed, _ = next(iter(dataset.parts)).read()
    stored = [(spec, feed[spec.name].dtype) for spec in specs]
    return [
        f"the {dtype.name} values of '{spec.name}' become {spec.dtype.name}, which holds each of them exactly"
        for spec, dtype in stored
        if {family(dtype), family(spec.dtype)} <= {"float", "int", "bool"} and family(dtype) != family(spec.dtype)
    ]


def _classes(names: tuple[str, ...], labels: Counter[int]) -> tuple[tuple[str, int], ...]:
    if names:
        return tuple((name, labels[number]) for number, name in enumerate(names))
    return tuple((str(number), labels[number]) for number in sorted(labels))


def _warnings(
    dataset: Dataset,
    specs: tuple[InputSpec, ...],
    found: tuple[InputSummary, ...],
    samples: int,
    same: bool,
    classes: tuple[tuple[str, int], ...],
) -> list[str]:
    warnings = []
    if not batch_axis(specs).batchable:
        warnings.append("the inputs share no batch axis, so each stored feed runs as it is")
    if samples < ADVISED_SAMPLES:
        warnings.append(f"only {samples} samples; {ADVISED_SAMPLES} or more are advised")
    if samples > 1 and same:
        warnings.append("all samples are identical")
    for spec, seen in zip(specs, found, strict=True):
        if dataset.kind != "images" and _looks_unscaled(spec, seen):
            warnings.append(
                f"the values of '{spec.name}' lie in {seen.min:g}..{seen.max:g}; images are usually scaled (to 0..1 "
                "or by mean and std), "
                "so compare with how the model was trained"
            )
    counts = sorted(classes, key=lambda item: item[1])
    if len(counts) > 1 and counts[-1][1] >= IMBALANCE * counts[0][1]:
        (rare, few), (common, many) = counts[0], counts[-1]
        warnings.append(f"class '{common}' has {many} samples and class '{rare}' only {few}; the scores lean to the larger classes")
    return warnings


def _looks_unscaled(spec: InputSpec, seen: InputSummary) -> bool:
    if seen.min is None or seen.max is None or len(spec.shape) != 4 or family(spec.dtype) != "float":
        return False
    return seen.min >= 0 and 16 < seen.max <= 255
