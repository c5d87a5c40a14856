"""The third table of bench-oneshot: which part of `--repair least-squares` does what, on the paper's masks and on flow's.

The known trap: with the paper's masks a plain solve of each layer can lower the accuracy. Starting from such a solve, one part after the
other is switched on (STEPS); from the whole repair, one part at a time is changed (CHANGES); and, on the MLP, ways to spoil a plain solve
and what helps against them (TRAPS). Parts are switched off by replacing functions of the library while the repair runs (`switched`): the
product has no options for that. Masks and weights come from `calib_a`, results from `test`; nothing is chosen here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from types import TracebackType
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from numpy.typing import NDArray

import relief_onnx
from benchmarks import flow_data, flow_models
from benchmarks.flow_channels_data import Cells, Row
from relief_onnx import aims, equations
from relief_onnx import model as files
from relief_onnx import repair as repairs
from relief_onnx import solve as solving
from relief_onnx.data import ImageOptions, open_dataset
from relief_onnx.graph import Graph
from relief_onnx.masks import Masks, applied, initializer_masks
from relief_onnx.options import CHOICES
from relief_onnx.prepared import Prepared, prepare
from relief_onnx.replay import Replay
from relief_onnx.surgery import apply_weights

CRITERIA = ("relief", "flow", "flow-obs")
SHARES: dict[str, tuple[float, ...]] = {"mlp": (0.194, 0.142, 0.104, 0.076, 0.053), "resnet20": (0.25, 0.10)}
NO_RIDGE = 1e-6  # of the mean diagonal: enough for the inverse to exist

Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Parts:
    """What of the repair is on; as it stands here, all of it.

    inputs: of each layer, from the network `pruned` and repaired so far, from the network only `masked`, from the `original`, or `mixed`:
    every second batch from the original. samples: at most so many.
    ridge: None for the library's. towards: what the ridge draws the weights to, their `old` values or `zero`.
    relu: targets below 0 count as met where a Relu follows. sums: where a sum follows, the target is what the sum was.
    spread: the power of the factor that scales each neuron's outputs back to the spread of its targets.
    """

    inputs: str = "pruned"
    samples: int | None = None
    free_bias: bool = True
    ridge: float | None = None
    towards: str = "old"
    relu: bool = True
    sums: bool = True
    spread: float = 0.0


PLAIN = Parts(inputs="original", free_bias=False, ridge=NO_RIDGE, relu=False, sums=False)
STEPS: dict[str, Parts] = {
    "plain solve": PLAIN,
    "+ sequential inputs": replace(PLAIN, inputs="pruned"),
    "+ free bias": replace(PLAIN, inputs="pruned", free_bias=True),
    "+ ridge to old weights": Parts(relu=False, sums=False),
    "+ targets of sums": Parts(relu=False),
    "+ Relu targets": Parts(),
}
CHANGES: dict[str, Parts] = {
    "all, original inputs": Parts(inputs="original"),
    "all, mixed inputs": Parts(inputs="mixed"),
    "all, no ridge": Parts(ridge=NO_RIDGE),
    "all, ridge to zero": Parts(towards="zero"),
    "all, spread half kept": Parts(spread=0.5),
    "all, spread kept": Parts(spread=1.0),
}
_FEW = replace(PLAIN, samples=64)
_SHRUNK = replace(PLAIN, ridge=1.0, towards="zero")
TRAPS: dict[str, Parts] = {
    "plain, free bias": replace(PLAIN, free_bias=True),
    "plain, masked inputs": replace(PLAIN, inputs="masked"),
    "64 samples: plain": _FEW,
    "  + ridge to old weights": replace(_FEW, ridge=None),
    "  all": Parts(samples=64),
    "  all, no ridge": Parts(samples=64, ridge=NO_RIDGE),
    "ridge 1 to zero: plain": _SHRUNK,
    "  + spread kept": replace(_SHRUNK, free_bias=True, spread=1.0),
    "  + sequential inputs": replace(_SHRUNK, inputs="pruned"),
    "  + to old weights": replace(_SHRUNK, inputs="pruned", towards="old"),
}


class _Fixed(Replay):
    """A network that new weights do not reach."""

    def advance(self, stop: int, weights: Mapping[str, NDArray[Any]] | None = None) -> None:
        super().advance(stop)


class _Mixed(Replay):
    """The pruned network, but every second batch sees the original one."""

    def __init__(self, original: Graph, graph: Graph, feeds: Sequence[Feed], wanted: Collection[str], *, threads: int = 0) -> None:
        super().__init__(graph, feeds, wanted, threads=threads)
        self._other = _Fixed(original, feeds, wanted, threads=threads)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._other.__exit__(kind, error, trace)

    def advance(self, stop: int, weights: Mapping[str, NDArray[Any]] | None = None) -> None:
        super().advance(stop, weights)
        self._other.advance(stop)

    def value(self, name: str, batch: int) -> NDArray[Any] | None:
        return self._other.value(name, batch) if batch % 2 else super().value(name, batch)


@contextmanager
def switched(parts: Parts, original: Graph) -> Iterator[None]:
    """The library's repair of `original` with these parts only, while the context lasts."""

    def replay(graph: Graph, feeds: Sequence[Feed], wanted: Collection[str], *, threads: int = 0) -> Replay:
        if graph is original or parts.inputs == "pruned":
            return Replay(graph, feeds, wanted, threads=threads)
        if parts.inputs == "mixed":
            return _Mixed(original, graph, feeds, wanted, threads=threads)
        return _Fixed(original if parts.inputs == "original" else graph, feeds, wanted, threads=threads)

    def solve(x: Any, target: Any, weight: Any, bias: Any, keep: Any, free_bias: bool, *more: Any, **named: Any) -> tuple[Any, Any]:
        target = replace(target, one_sided=target.one_sided and parts.relu)
        start = np.zeros_like(weight) if parts.towards == "zero" else weight
        weight, bias = solving.solve(x, target, start, bias, keep, free_bias and parts.free_bias, *more, **named)
        return _spread(x, target, weight, bias, parts.spread) if parts.spread else (weight, bias)

    with ExitStack() as stack:
        stack.enter_context(patch.object(repairs, "Replay", replay))
        stack.enter_context(patch.object(equations, "solve", solve))
        if parts.ridge is not None:
            stack.enter_context(patch.object(solving, "RIDGE", parts.ridge))
        if not parts.sums:
            stack.enter_context(patch.dict(aims._STEPS, {"Add": lambda *_: None}))
        yield


def _spread(x: Any, target: Any, weight: Any, bias: Any, power: float) -> tuple[Any, Any]:
    """Each neuron's outputs scaled towards the standard deviation of its targets, its mean moved to theirs."""
    y = x @ weight.T.astype(np.float32) + bias.astype(np.float32)
    wanted = target.of(y)
    emitted, due = y.std(0, dtype=np.float64), wanted.std(0, dtype=np.float64)
    factor = np.where(emitted > 0, due / np.where(emitted > 0, emitted, 1), 1) ** power
    return weight * factor[:, None], factor * (bias - y.mean(0, dtype=np.float64)) + wanted.mean(0, dtype=np.float64)


class Subject:
    """A model whose masks are repaired in several ways."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self.name, self.threads = name, threads
        self.path, self.data = flow_models.path(name), flow_data.file(name, "calib_a")
        self.ready: Prepared = prepare(self.path)
        self.dataset = open_dataset(self.data, files.input_specs(self.ready.original), images=ImageOptions())
        self.weights = frozenset(self.ready.plan.by_weight())

    def pruned(self, criterion: str, share: float) -> relief_onnx.Result:
        """As a user calls it."""
        return relief_onnx.prune(
            self.path, self.data, criterion=criterion, keep=f"{100 * share:.4g}%", granularity="weight", repair="least-squares",
            storage="dense", threads=self.threads,
        )  # fmt: skip

    def repaired(self, masks: Masks, parts: Parts | None) -> onnx.ModelProto:
        """The masked model with these parts of the repair; None: with none."""
        graph, flags = self.ready.graph, initializer_masks(self.ready.plan, masks)
        masked = apply_weights(graph.model, applied(graph, flags))
        if parts is None:
            return masked
        with switched(parts, graph):
            feeds = repairs.samples_of(graph, self.dataset, min(parts.samples or repairs.SAMPLES, repairs.SAMPLES))
            return repairs.repair(graph, masked, flags, self.weights, feeds, threads=self.threads)[0]

    def judged(self, model: onnx.ModelProto) -> Row:
        """score on the test samples, and the variance of the first output over the original's; None where it is not a number."""
        found, due = (next(iter(flow_data.outputs(self.name, item, "test", self.threads).values())) for item in (model, self.path))
        score = flow_data.evaluate(self.name, model, "test", self.threads)
        with np.errstate(over="ignore", invalid="ignore"):
            spread = float(found.var(0).sum() / due.var(0).sum())
        return {"score": score, "spread": float(f"{spread:.4g}") if np.isfinite(spread) else None}


def study(name: str, stored: Cells, threads: int = 1, criteria: Sequence[str] = CRITERIA) -> dict[str, Any]:
    """By criterion and label, score and spread at each of the model's shares; what is stored is not measured again."""
    subject = Subject(name, threads)
    variants: dict[str, Parts | None] = {"mask only": None, **STEPS, **CHANGES, **(TRAPS if name == "mlp" else {})}
    if not any(node.op_type == "Add" for node in subject.ready.graph.nodes):
        del variants["+ targets of sums"]
    masks: dict[str, dict[str, list[Row]]] = {}
    for criterion in criteria:
        if criterion not in CHOICES["criterion"]:
            continue
        found = masks.setdefault(criterion, {})
        for share in SHARES[name]:
            cut = cache(partial(subject.pruned, criterion, share))
            for label, parts in variants.items():
                key = (name, criterion, f"{share:g}", label, parts)
                found.setdefault(label, []).append(
                    stored.get(key, lambda cut=cut, parts=parts: subject.judged(subject.repaired(cut().masks, parts)))
                )
            key = (name, criterion, f"{share:g}", "product")
            found.setdefault("as the product does it", []).append(stored.get(key, lambda cut=cut: subject.judged(cut().model)))
    original = flow_data.evaluate(name, subject.path, "test", threads)
    return {"original": original, "shares": list(SHARES[name]), "masks": masks}


def table(name: str, entry: dict[str, Any]) -> str:
    """Scores in percent, and how much of the original's variance the output still has."""
    heads = [f"{100 * share:g} %" for share in entry["shares"]]
    lines = [f"{name}, original {100 * entry['original']:.1f}: score in % (variance of the output, the original's is 1) by share kept"]
    for criterion, rows in entry["masks"].items():
        lines.append(f"  {'masks of ' + criterion:24}" + "".join(f"{head:>15}" for head in heads))
        for label, found in rows.items():
            lines.append(f"  {label:24}" + "".join(f"{_cell(cell):>15}" for cell in found))
    return "\n".join(lines)


def _cell(cell: Row) -> str:
    spread = cell["spread"]
    return f"{100 * cell['score']:.1f} ({'-' if spread is None else f'{spread:.2f}' if spread < 100 else f'{spread:.0e}'})"
