"""flow-obs for whole units: which go is chosen again by what the layers that read them lose once their other inputs make up for it.

In steps of equal work from the whole network: every layer is solved for again (as in `repair`), a unit is worth what the squared errors
of all neurons that read it would grow by without it, each as a part of the neuron's variance and times its R^EXPONENT (see `worth`; the
taps of a kernel go together), and units are ranked by worth / MACs^exponent: over the whole network, for each exponent of EXPONENTS, and
once more within each group, which keeps as many as flow leaves it. Of these choices and flow's own the one is taken whose outputs,
repaired, are closest to the original's on samples that the repair did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.channels import Choice, unit_masks
from relief_onnx.contest import distance, emitted
from relief_onnx.coupling import Coupling
from relief_onnx.dataset import Dataset
from relief_onnx.decide import Choose
from relief_onnx.equations import Equations
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, Plan
from relief_onnx.masks import applied, initializer_masks, keep_all
from relief_onnx.obs import EXPONENT, SAMPLES
from relief_onnx.repair import Visit, refusal, samples_of, sweep
from relief_onnx.surgery import apply_weights

__all__ = ["improve_units", "unit_losses"]

Doubles = NDArray[np.float64]
Feed = Mapping[str, NDArray[Any]]

STEPS, EXPONENTS = 4, (0.75, 1.0)
# Times the largest loss: units that are worth so much stay, whatever their MACs.
BEYOND = 1e9
# Exponent, and whether groups keep flow's numbers of units.
TRIES = (*((exponent, False) for exponent in EXPONENTS), (EXPONENTS[0], True))


def improve_units(
    graph: Graph, plan: Plan, coupling: Coupling, relevance: Mapping[int, float], value: Mapping[str, Doubles], first: Sequence[Choice],
    choose: Choose, share: float, weights: frozenset[str], dataset: Dataset, *, samples: int | None = None, seed: int = 0,
    threads: int = 0, progress: Callable[[str, int, int | None], None] = lambda *_: None,
) -> tuple[Choice, ...]:  # fmt: skip
    """The best of several choices that leave about `share` of the MACs.

    relevance: R of units, for those that no layer reads. value: R of the units of each layer [out], by layer name. first: flow's choice.
    Raises DataError, ModelError.
    """
    search = _search(graph, plan, coupling, value, weights, dataset, samples, seed, threads)
    candidates, total = [tuple(first)], 2 + len(TRIES) * (STEPS + 1)
    progress("choose", 0, total)
    whole, done = _completed(search.losses(()), relevance), 1
    for exponent, as_flow in TRIES:
        choices: tuple[Choice, ...] = ()
        for step in range(1, STEPS + 1):
            progress("choose", done, total)
            losses = _completed(search.losses(choices), relevance) if step > 1 else whole
            wanted = _with_numbers_of(first, losses) if as_flow else losses
            choices = choose(wanted, exponent, 1.0 - (1.0 - share) * step / STEPS)
            done += 1
        candidates.append(choices)
    errors = []
    for candidate in candidates:
        progress("choose", done, total)
        errors.append(search.error(candidate))
        done += 1
    return candidates[int(np.argmin(errors))]


def unit_losses(
    graph: Graph, plan: Plan, coupling: Coupling, relevance: Mapping[int, float], value: Mapping[str, Doubles], weights: frozenset[str],
    dataset: Dataset, *, samples: int | None = None, seed: int = 0, threads: int = 0,
    progress: Callable[[str, int, int | None], None] = lambda *_: None,
) -> dict[int, float]:  # fmt: skip
    """What each unit is worth while none is gone yet. Arguments as those of `improve_units`. Raises DataError, ModelError."""
    progress("choose", 0, 1)
    search = _search(graph, plan, coupling, value, weights, dataset, samples, seed, threads)
    return _completed(search.losses(()), relevance)


def _search(
    graph: Graph, plan: Plan, coupling: Coupling, value: Mapping[str, Doubles], weights: frozenset[str], dataset: Dataset,
    samples: int | None, seed: int, threads: int,
) -> _Search:  # fmt: skip
    """With half of the samples to solve with, the others to judge."""
    feeds = samples_of(graph, dataset, 2 * SAMPLES if samples is None else min(samples, 2 * SAMPLES), seed)
    half = (len(feeds) + 1) // 2
    return _Search(graph, plan, coupling, value, weights, feeds[:half], feeds[half:] or feeds, seed, threads)


def _completed(losses: Mapping[int, float], relevance: Mapping[int, float]) -> dict[int, float]:
    """Losses, and for units that no layer reads their R, in proportion; R alone where nothing is known to be lost."""
    known = [unit for unit in losses if unit in relevance]
    lost = sum(losses[unit] for unit in known)
    if not lost > 0:
        return dict(relevance)
    scale = lost / max(sum(relevance[unit] for unit in known), 1e-300)
    return {unit: scale * own for unit, own in relevance.items()} | dict(losses)


def _with_numbers_of(first: Sequence[Choice], losses: Mapping[int, float]) -> dict[int, float]:
    """Losses, out of reach for as many units of each group as flow's choice leaves it, the best ones."""
    found, beyond = dict(losses), BEYOND * max(losses.values(), default=0.0)
    for choice in first:
        left = len(choice.group.free) - len(choice.removed)
        for unit in sorted(choice.group.free, key=lambda unit: -losses.get(unit, 0.0))[:left]:
            found[unit] = losses.get(unit, 0.0) + beyond
    return found


class _Search:
    """Sweeps over one network with other units gone each time."""

    def __init__(
        self, graph: Graph, plan: Plan, coupling: Coupling, value: Mapping[str, Doubles], weights: frozenset[str], feeds: Sequence[Feed],
        unseen: Sequence[Feed], seed: int, threads: int,
    ) -> None:  # fmt: skip
        self._graph, self._plan, self._coupling = graph, plan, coupling
        self._value = {name: own**EXPONENT for name, own in value.items()}
        self._whole = keep_all(plan, weights)
        self._layers = [layer for layer in plan.layers if layer.inside is None and not refusal(plan, layer, weights)]
        self._feeds, self._unseen, self._seed, self._threads = feeds, unseen, seed, threads
        self._variances: dict[str, Doubles] = {}
        self._worths: dict[str, Doubles] = {}
        self._wanted = emitted(graph.model, unseen, threads)

    def losses(self, choices: Sequence[Choice]) -> dict[int, float]:
        """What each unit that layers read is worth while others are gone; 0 for those that are gone."""
        found: dict[int, float] = {}

        def visit(layer: Layer, equations: Equations) -> dict[str, NDArray[Any]]:
            new, appraisal = equations.appraised(int(np.prod(layer.view.shape[2:])), additions=False)
            if layer.name not in self._variances:  # in the first sweep nothing is gone
                self._variances[layer.name] = equations.variance()
            variance = self._variances[layer.name]
            value = np.where(variance > 0, self._value[layer.name] / np.where(variance > 0, variance, 1.0), 0.0)
            if layer.groups > 1 and layer.in_per_group == 1:  # what it reads is what it makes: the next layer says what that is worth
                return new
            if equations.met:  # else it reads other rows than before, or none
                each = (appraisal.worth * value[:, None]).reshape(layer.groups, -1, layer.in_per_group).sum(1).reshape(-1)
                self._worths[layer.name] = each
            each = self._worths.get(layer.name, np.zeros(0))
            for unit, loss in zip(self._coupling.inputs[layer.key].tolist(), each.tolist(), strict=True):
                if unit >= 0:
                    found[unit] = found.get(unit, 0.0) + loss
            return new

        self._sweep(choices, visit)
        return found

    def error(self, choices: Sequence[Choice]) -> float:
        """Of the outputs of the repaired model, as a part of their variance, the mean over outputs."""
        model = self._sweep(choices, lambda layer, equations: equations.solved()[0])
        return distance(self._wanted, emitted(model, self._unseen, self._threads))

    def _sweep(self, choices: Sequence[Choice], visit: Visit) -> onnx.ModelProto:
        """Solve every layer for without the units that go; the model with the new weights."""
        removed = frozenset(unit for choice in choices for unit in choice.removed)
        flags = initializer_masks(self._plan, unit_masks(self._graph, self._plan, self._coupling, removed, self._whole))
        masked = apply_weights(self._graph.model, applied(self._graph, flags)) if flags else self._graph.model
        numbers = np.array(sorted(removed), np.int64)
        gone = {layer.weight: np.isin(self._coupling.outputs[layer.key], numbers) for layer in self._layers}
        new = sweep(
            self._graph, Graph(masked), self._plan, self._layers, self._feeds, flags, gone, visit, seed=self._seed, threads=self._threads
        )
        return apply_weights(masked, new) if new else masked
