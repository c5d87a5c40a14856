"""How well two models agree on the same samples: streaming, so memory does not grow with their number."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.dataset import Batch, Dataset
from relief_onnx.errors import DataError
from relief_onnx.footprint import samples_at_once
from relief_onnx.graph import Graph, attributes
from relief_onnx.session import Session
from relief_onnx.state_changes import StateChange, declared, narrowed

__all__ = ["Comparison", "OutputAgreement", "compare_models"]

# Samples from which on what an output varies is known, and what of its squares it has to be; what may be lost of it where a large mean
# hides that from a cosine of so much.
FEWEST, CONSTANT = 8, 1e-6
LOST, HIGH = 0.5, 0.9
_MAP_MAKERS = frozenset({"ZipMap"})
_LOGIT_MAKERS = frozenset({"Gemm", "MatMul", "Add", "Softmax", "LogSoftmax", "QGemm", "QLinearMatMul", "QLinearAdd", "QLinearSoftmax"})
_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass
class _Spread:
    """How much an output varies over the samples, along its first axis: squares about the mean of each entry (Chan et al. 1983)."""

    samples: float = 0.0
    squares: float = 0.0
    mean: NDArray[np.float64] | None = None

    def add(self, values: NDArray[Any], weight: float) -> None:
        """One batch. Where entries differ in number from batch to batch, nothing is known."""
        if values.ndim == 0 or not values.size or math.isnan(self.squares):
            return
        rows = values.astype(np.float64).reshape(len(values), -1)
        if not np.isfinite(rows).all() or (self.mean is not None and self.mean.shape != rows.shape[1:]):
            self.squares = math.nan
            return
        own, count = rows.mean(0), weight * len(rows)
        if self.mean is None:
            self.mean = np.zeros_like(own)
        moved, total = own - self.mean, self.samples + count
        self.squares += weight * float(np.square(rows - own).sum()) + float(moved @ moved) * self.samples * count / total
        self.mean += moved * count / total
        self.samples = total


@dataclass
class _Tally:
    """Running sums of one output pair in float64."""

    dot: float = 0.0
    a: float = 0.0
    b: float = 0.0
    error: float = 0.0
    max_abs: float = 0.0
    max_a: float = 0.0
    agreeing: float = 0.0
    rows: float = 0.0
    spread: _Spread = field(default_factory=_Spread)

    def add(self, a: NDArray[Any], b: NDArray[Any], weight: float, classes: bool) -> None:
        if a.dtype.kind in "OUS":  # strings agree or not: as numbers 1 is what they are, and 1 or 0 what they should be
            a, b = np.ones(a.size), (a == b).reshape(-1).astype(np.float64)
        self.spread.add(a, weight)
        x, y = a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)
        # NaN and infinity on the same places on both sides agree; anywhere else they are an infinite error.
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        with np.errstate(invalid="ignore"):
            difference = np.where(same, 0.0, np.abs(x - y))
        difference = np.nan_to_num(difference, nan=np.inf, posinf=np.inf)
        finite = np.isfinite(x) & np.isfinite(y)
        x, y = x[finite], y[finite]
        self.dot += weight * float(x @ y)
        self.a += weight * float(x @ x)
        self.b += weight * float(y @ y)
        self.error += weight * float(difference @ difference)
        self.max_abs = max(self.max_abs, float(difference.max(initial=0.0)))
        self.max_a = max(self.max_a, float(np.abs(x).max(initial=0.0)))
        if classes:
            self.agreeing += weight * float((a.argmax(-1) == b.argmax(-1)).sum())
            self.rows += weight * len(a)


@dataclass(frozen=True)
class OutputAgreement:
    """Of one output: cosine over all values, signal to noise in dB (inf where equal), share of rows with the same largest entry.

    `max_abs` is the largest difference, `peak` the largest magnitude in the first model's output. `lost`: the squared error as a part of
    what the output varies over the samples; None where that is not known, or nearly nothing.
    """

    cosine: float
    sqnr_db: float
    max_abs: float
    peak: float
    top1: float | None
    lost: float | None = None

    @classmethod
    def of(cls, tally: _Tally, classes: bool) -> OutputAgreement:
        norms = math.sqrt(tally.a * tally.b)
        cosine = min(tally.dot / norms, 1.0) if norms > 0 else (1.0 if tally.a == tally.b else 0.0)
        if tally.error == 0:
            cosine, noise = 1.0, math.inf
        else:
            noise = 10 * math.log10(tally.a / tally.error) if tally.a > 0 and math.isfinite(tally.error) else -math.inf
        spread = tally.spread
        lost = tally.error / spread.squares if spread.samples >= FEWEST and spread.squares > CONSTANT * tally.a else None
        return cls(cosine, noise, tally.max_abs, tally.max_a, tally.agreeing / tally.rows if classes and tally.rows else None, lost)


@dataclass(frozen=True)
class Comparison:
    """Agreement per output, accuracy of both where labelled, and the seconds that each model took for the same samples."""

    outputs: Mapping[str, OutputAgreement]
    accuracy: tuple[float, float] | None
    samples: int
    seconds: tuple[float, float]
    warnings: tuple[str, ...] = ()


@dataclass
class _Accuracy:
    right: list[float] = field(default_factory=lambda: [0.0, 0.0])
    total: float = 0.0

    def add(self, labels: NDArray[Any], outputs: Sequence[NDArray[Any]], weight: float) -> None:
        self.total += weight * len(labels)
        for side, output in enumerate(outputs):
            self.right[side] += weight * float((output.argmax(-1) == labels).sum())


def class_outputs(model: onnx.ModelProto) -> frozenset[str]:
    """Outputs that look like class scores: float [rows, classes] straight from a dense layer or a softmax."""
    graph = Graph(model)
    found = set()
    for name in graph.outputs:
        shape, node = graph.shape(name), graph.nodes[graph.producer[name]] if name in graph.producer else None
        if node is not None and node.op_type in _MAP_MAKERS:
            found.add(name)
            continue
        while node is not None and node.op_type in _ROUNDING:
            node = graph.nodes[graph.producer[node.input[0]]] if node.input[0] in graph.producer else None
        if node is None or shape is None or len(shape) != 2 or shape[1] in (0, 1) or node.op_type not in _LOGIT_MAKERS:
            continue
        if graph.is_float(name) and attributes(node).get("axis", -1) in (1, -1):
            found.add(name)
    return frozenset(found)


def compare_models(
    a: onnx.ModelProto,
    b: onnx.ModelProto,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    seed: int = 0,
    threads: int = 0,
    optimize: tuple[bool, bool] = (True, True),
    states: Sequence[StateChange] = (),
    progress: Callable[[str, int, int | None], None] = lambda *_: None,
) -> Comparison:
    """Run both models side by side on every sample, batch by batch. Outputs are matched by name.

    At most `batch_size` samples run at a time, fewer where activations are large. `optimize` says whether onnxruntime may optimise each.
    states: what is narrower in `b`, which is fed, and compared with, the entries that are left. Raises DataError where outputs cannot be
    matched or a run fails.
    """
    sessions = Session(a, threads, "the first model", optimize[0]), Session(b, threads, "the second model", optimize[1])
    _check_inputs(sessions, states)
    names = [name for name in sessions[0].outputs if name in sessions[1].outputs]
    if not names:
        both = " and ".join(", ".join(session.outputs) for session in sessions)
        raise DataError(f"the models share no output name ({both}); compare a model with one that was made from it")
    changed = {change.name: change for change in states}
    classes = class_outputs(a) - changed.keys()
    tallies, varied, graph = {name: _Tally() for name in names}, set[str](), Graph(a)
    accuracy, seconds, samples = _Accuracy(), [0.0, 0.0], 0.0
    scored = _scored_output(a, dataset, names)
    size = samples_at_once(a, next(iter(dataset.batches(1, limit=1, seed=seed))), batch_size)
    for batch in dataset.batches(size, limit=limit, seed=seed):
        results = _timed(sessions, names, batch, seconds, states)
        for name, *pair in zip(names, *results, strict=True):
            x, y = (_as_array(name, value) for value in pair)
            x = changed[name].taken(x) if name in changed else x
            if not _same_shape(name, x, y, graph.shape(name)):
                varied.add(name)
            elif name not in varied:
                tallies[name].add(x, y, batch.weight, name in classes and x.ndim == 2)
        scores = [_as_array(scored, result[names.index(scored)]) for result in results] if scored is not None else []
        if scores and batch.labels is not None and _fits(scores[0], batch.labels):
            accuracy.add(batch.labels, scores, batch.weight)
        samples += batch.size * batch.weight
        progress("compare", round(samples), dataset.samples if limit is None else limit)
    rates = (accuracy.right[0] / accuracy.total, accuracy.right[1] / accuracy.total) if accuracy.total else None
    warnings = [f"output {name} has another size in each model on some samples, so its agreement is not known" for name in sorted(varied)]
    found = {name: OutputAgreement.of(tally, name in classes) for name, tally in tallies.items() if name not in varied}
    warnings += [
        f"output {name}: the squared error is {100 * item.lost:.0f} % of its variance over the samples; its mean is large, so the cosine "
        "hides that"
        for name, item in found.items()
        if item.top1 is None and item.lost is not None and item.lost > LOST and item.cosine > HIGH
    ]
    if dataset.labelled and rates is None:
        warnings.append("the data has labels, but no output has class scores that they could be compared with")
    return Comparison(found, rates, round(samples), (seconds[0], seconds[1]), tuple(warnings))


def _timed(
    sessions: tuple[Session, Session], names: Sequence[str], batch: Batch, seconds: list[float], states: Sequence[StateChange]
) -> list[list[Any]]:
    results, feeds = [], (batch.feed, narrowed(batch.feed, states))
    for side, session in enumerate(sessions):
        start = time.perf_counter()
        results.append(session.run(feeds[side], names, batch.source))
        seconds[side] += time.perf_counter() - start
    return results


def _check_inputs(sessions: tuple[Session, Session], states: Sequence[StateChange]) -> None:
    """Raise DataError where one feed cannot fit both models, as after `allow_state_change`."""
    wanted, found = declared(sessions[0].signature(), states), {name: shape for name, _, shape in sessions[1].signature()}
    for name, _, shape in wanted:
        other = found.get(name, shape) if name not in sessions[0].outputs else shape
        pairs = zip(shape, other, strict=True) if len(shape) == len(other) else ()
        if any(a != b for a, b in pairs if isinstance(a, int) and isinstance(b, int)):
            raise DataError(
                f"input {name} is {list(shape)} in one model and {list(other)} in the other; no data fits both, as after "
                "--allow-state-change: there the report of relief-onnx prune compares them (quality)"
            )


def _as_array(name: str, value: Any) -> NDArray[Any]:
    """An output as one array: maps (of a ZipMap) as rows of their values in the order of the keys, tensors of a sequence end to end.

    Raises DataError where it has no numbers or strings in it.
    """
    if isinstance(value, Mapping):
        return np.asarray([value[key] for key in sorted(value)])
    if isinstance(value, list):
        parts = [_as_array(name, item) for item in value]
        rows = len({part.shape for part in parts}) == 1 and isinstance(value[0], Mapping)
        return np.stack(parts) if rows else np.concatenate([part.reshape(-1) for part in parts]) if parts else np.zeros(0)
    if value is None or isinstance(value, np.ndarray | np.generic | float | int | str):
        return np.zeros(0) if value is None else np.asarray(value)
    raise DataError(f"output {name} is a {type(value).__name__}, which cannot be compared; make a tensor the model's output")


def _same_shape(name: str, x: NDArray[Any], y: NDArray[Any], known: Sequence[Any] | None) -> bool:
    """Raises DataError where shapes differ and the data cannot be why: sizes that the model names, or numbers of axes."""
    fixed = [size if isinstance(size, int) else None for size in known or [None] * x.ndim]
    if x.ndim != y.ndim or any(a != b and size is not None for a, b, size in zip(x.shape, y.shape, fixed, strict=False)):
        raise DataError(f"output {name} is {list(x.shape)} in one model and {list(y.shape)} in the other; compare models of one kind")
    return x.shape == y.shape


def _fits(output: Any, labels: NDArray[Any]) -> bool:
    return bool(
        isinstance(output, np.ndarray)
        and output.ndim == 2
        and len(output) == len(labels)
        and labels.ndim == 1
        and labels.dtype.kind in "iu"
        and labels.max(initial=0) < output.shape[1]
    )


def _scored_output(model: onnx.ModelProto, dataset: Dataset, names: Sequence[str]) -> str | None:
    """The output that labels are compared with: the first with class scores, else the first of rank 2."""
    if not dataset.labelled:
        return None
    classes, graph = class_outputs(model), Graph(model)
    ranked = [name for name in names if name in classes]
    ranked += [name for name in names if graph.is_float(name) and len(graph.shape(name) or ()) == 2]
    return ranked[0] if ranked else names[0]
