"""Which of several choices is best: each is repaired on some samples and judged by what the network emits on others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.dataset import Dataset
from relief_onnx.options import Options
from relief_onnx.repair import BATCH
from relief_onnx.session import Session

__all__ = ["Contest", "Draw", "best", "distance", "draw", "emitted", "worth_choosing"]

Doubles = NDArray[np.float64]
Feed = Mapping[str, NDArray[Any]]

# Samples below which there is no contest: too few to tell candidates apart. One batch in HELD is set aside for the judge.
LEAST_SAMPLES, HELD = 96, 3
# Samples below which no mask is chosen again either: of one sample second moments say next to nothing.
LEAST_CHOSEN = 8
# How much less than the first candidate's the error of another has to be: samples that judge are few.
MARGIN = 0.1
# A part of what an output is that single precision may make of nothing.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Draw:
    """Samples in batches: those that candidates are made and repaired with, and those that judge them (none where there are too few)."""

    fit: tuple[Feed, ...]
    unseen: tuple[Feed, ...]
    fitted: int
    judged: int

    def chosen(self, limit: int) -> list[Feed]:
        """What masks are chosen with: those that repair sees, or, where they are fewer than `limit` samples, all of them."""
        return list(self.fit if self.fitted >= limit else self.fit + self.unseen)


@dataclass(frozen=True)
class Contest:
    """Error of each candidate by name, as a part of the variance of the outputs; infinite where outputs are not finite."""

    errors: Mapping[str, float]
    samples: int
    margin: float = MARGIN

    @property
    def winner(self) -> str:
        """The first name, or, where its error is clearly less, the one with the least."""
        first, least = next(iter(self.errors)), min(self.errors, key=lambda name: self.errors[name])
        return least if self.errors[least] < (1 - self.margin) * self.errors[first] else first

    def document(self) -> dict[str, Any]:
        """Errors, null where outputs are not finite, and how many samples judged."""
        errors = {name: error if math.isfinite(error) else None for name, error in self.errors.items()}
        return {"errors": errors, "samples": self.samples}


def worth_choosing(options: Options, dataset: Dataset) -> tuple[Options, list[str]]:
    """The options, with flow's own choice where samples are too few for flow-obs, and a sentence that says so."""
    if options.criterion != "flow-obs":
        return options, []
    count = dataset.samples
    if count is None:
        count = sum(batch.size for batch in dataset.batches(LEAST_CHOSEN, limit=LEAST_CHOSEN, seed=options.seed))
    if options.samples is not None:
        count = min(count, options.samples)
    if count >= LEAST_CHOSEN:
        return options, []
    return replace(options, criterion="flow"), [f"flow's choice ships: flow-obs needs {LEAST_CHOSEN} samples or more, and has {count}"]


def draw(dataset: Dataset, limit: int, seed: int, size: int = BATCH) -> Draw:
    """At most `limit` samples in batches of `size`, the judge's every third batch."""
    batches = list(dataset.batches(size, limit=limit, seed=seed))
    held = HELD if sum(batch.size for batch in batches) >= LEAST_SAMPLES else len(batches) + 1
    fit = [batch for number, batch in enumerate(batches) if number % held != held - 1]
    unseen = [batch for number, batch in enumerate(batches) if number % held == held - 1]
    return Draw(
        tuple(batch.feed for batch in fit), tuple(batch.feed for batch in unseen),
        sum(batch.size for batch in fit), sum(batch.size for batch in unseen),
    )  # fmt: skip


def best(
    original: onnx.ModelProto, candidates: Mapping[str, Callable[[], onnx.ModelProto]], drawn: Draw, threads: int, margin: float = MARGIN
) -> Contest:
    """Make each of the candidates (repaired) and compare what they emit with the original. Raises DataError, ModelError."""
    wanted = emitted(original, drawn.unseen, threads)
    errors = {name: distance(wanted, emitted(make(), drawn.unseen, threads)) for name, make in candidates.items()}
    return Contest(errors, drawn.judged, margin)


def emitted(model: onnx.ModelProto, feeds: Sequence[Feed], threads: int) -> list[Doubles]:
    """Outputs of floating type over all samples, each flat: sizes may differ from batch to batch, what is compared are the numbers."""
    session = Session(model, threads)
    runs = [session.run(feed, None, "the calibration data") for feed in feeds]
    floats = [index for index, value in enumerate(runs[0]) if isinstance(value, np.ndarray) and value.dtype.kind == "f"]
    return [np.concatenate([np.asarray(run[index], np.float64).reshape(-1) for run in runs]) for index in floats]


def distance(wanted: Sequence[Doubles], found: Sequence[Doubles]) -> float:
    """Squared error as a part of the variance, the mean over outputs; infinite where it is not a number, or sizes differ.

    An output that is constant but for rounding has no variance to speak of.
    """
    if any(one.shape != other.shape for one, other in zip(wanted, found, strict=True)):
        return math.inf  # sizes of outputs depend on the data, as those of detectors do
    errors = []
    for one, other in zip(wanted, found, strict=True):
        least = ROUNDING**2 * float(np.square(one).sum()) + 1e-300
        errors.append(float(np.square(other - one).sum() / max(np.square(one - one.mean(0)).sum(), least)))
    error = float(np.mean(errors)) if errors else 0.0
    return error if math.isfinite(error) else math.inf
