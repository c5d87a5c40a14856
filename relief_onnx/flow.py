"""Flow: what share of the network's output activity passes through each connection (DESIGN section 2, and docs/flow.md).

Within a neuron a connection's share is the part of the neuron's variance that it brings in, w^2 Var(x) / sum of these; R of the neuron
says what part of the output's activity the neuron carries (`relevance`). Their product is the flow, comparable over the whole network.
One calibration pass, no labels, no gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relief_onnx.activity import Activity
from relief_onnx.aside import beside, is_mapped
from relief_onnx.calibrate import Measurement
from relief_onnx.embeddings import TableMeasure
from relief_onnx.graph import Graph
from relief_onnx.grouping import Grouping
from relief_onnx.layers import Layer, Plan
from relief_onnx.relevance import Ask, Even, asks, propagate
from relief_onnx.scoring import LayerScore, magnitudes
from relief_onnx.streaming import InputMeans, Moment, as_read
from relief_onnx.tracks import follow

__all__ = ["DEFAULT_RULE", "FlowMeasure", "FlowRule", "passed_evenly"]

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class FlowRule:
    """What counts as activity. docs/flow.md compares the choices.

    absolute: mean |x|, as in the paper's score, with the bias; otherwise Var(x) + `constant` * mean(x)^2, without it.
    bits: samples fall into 2^bits groups that are ranked apart and averaged (see `grouping`).
    exponent: of R where connections are ranked.
    balance: how much a layer gains that kept little (see `cut`).
    """

    absolute: bool = False
    constant: float = 1e-2
    bits: int = 4
    exponent: float = 0.75
    balance: float = 1.0

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The means that have to be measured to join branches."""
        return ("absolute",) if self.absolute else ("signed", "squares")

    def activity(self, means: Mapping[str, Doubles]) -> Doubles:
        """Activity from the means of x and x^2, or of |x|."""
        if self.absolute:
            return means["absolute"]
        square = np.square(means["signed"])
        return np.maximum(means["squares"] - square, 0.0) + self.constant * square


DEFAULT_RULE = FlowRule()


class FlowMeasure:
    """What the criterion listens to in the calibration pass, and the scores that follow."""

    def __init__(
        self, graph: Graph, plan: Plan, granularity: str, rule: FlowRule = DEFAULT_RULE, grouping: Grouping | None = None,
        tables: Sequence[Layer] = (),
    ) -> None:  # fmt: skip
        """`tables`: readers of embedding tables that are to have R too; R of the layers does not depend on them."""
        self._graph, self._plan, self._granularity, self._rule = graph, plan, granularity, rule
        self._grouping = None if rule.absolute else grouping
        self._tables = TableMeasure.of(graph, tables)
        # R of tables comes from a walk of its own, in which they count as layers.
        self._walks = [(plan, follow(graph, plan))]
        if tables:
            full = Plan((*plan.layers, *tables), ())
            self._walks.append((full, follow(graph, full)))
            self._plan = plan = Plan(tuple(layer for layer in full.layers if not layer.is_table), ())
        wanted = dict.fromkeys(ask for own, tracks in self._walks for ask in asks(graph, own, tracks))
        self._asked = {ask: Activity(ask[1], rule.moments, self._grouping) for ask in wanted}
        power = 1 if rule.absolute else 2
        self._inputs, self.measurements = _inputs(plan, lambda axis: InputMeans(axis, power=power, signed=True))
        self.measurements += self._tables.measurements
        self._channels: dict[str, Activity] = {}
        shared: dict[tuple[str, int], Activity] = {}
        # Rows of what runs in a body cannot be told apart by sample.
        for layer in [layer for layer in plan.layers if layer.inside is None] if self._groups > 1 else ():
            key = (layer.reads, layer.input_axis)
            if key not in shared:
                shared[key] = Activity(key[1:], rule.moments, self._grouping)
                self.measurements.append(Measurement(layer.reads, shared[key]))
            self._channels[layer.name] = shared[key]
        for ask, activity in self._asked.items():
            value = graph.constant(ask[0])
            if value is None:
                self.measurements.append(Measurement(ask[0], activity))
            else:
                activity.add(value)

    @property
    def _groups(self) -> int:
        return 1 if self._grouping is None else self._grouping.groups

    def with_rule(self, rule: FlowRule) -> FlowMeasure:
        """The same measurements under another rule that needs the same moments."""
        if rule.moments != self._rule.moments:
            raise ValueError("another rule needs other moments; measure again")
        other = copy.copy(self)
        other._rule = rule
        return other

    def scores(self, weights: Mapping[str, float]) -> dict[str, LayerScore]:
        """Shares, R and means of every layer after the pass. `weights`: of outputs, 1 where not named.

        Over groups of samples flow and R are means; a share is a connection's part of the flow into its unit.
        """
        parts = {layer.name: beside(self._parts(layer), self._graph.array(layer.weight)) for layer in self._plan.layers}
        flows: dict[str, Doubles] = {}
        relevance: dict[str, Doubles] = {}
        for group, weight in self._weights():
            shares = _Shares(self, parts, group)
            totals = {layer.name: shares.both(layer.name)[1] for layer in self._plan.layers}
            found = self._propagated(_Coarse(shares), totals, weights, group)
            for layer in self._tables.lookups:
                relevance[layer.name] = relevance.get(layer.name, 0.0) + weight * found[layer.name]
            for name, share in shares.items():
                own = found[name]
                flow = (share if self._granularity == "weight" else _coarse(share)) * own.reshape(-1, *(1,) * (self._rank(share) - 1))
                flows[name] = beside(flows[name] + weight * flow if name in flows else weight * flow, parts[name])
                relevance[name] = relevance[name] + weight * own if name in relevance else weight * own
        scores = {
            layer.name: self._score(layer, parts[layer.name], flows[layer.name], relevance[layer.name]) for layer in self._plan.layers
        }
        return scores | self._tables.scores(relevance)

    def _rank(self, share: Doubles) -> int:
        return share.ndim if self._granularity == "weight" else 2

    def _score(self, layer: Layer, part: Doubles, flow: Doubles, relevance: Doubles) -> LayerScore:
        share, bias, _ = self._shares(layer, part, None)
        plain = share if self._granularity == "weight" else _coarse(share)
        units = relevance.reshape(-1, *(1,) * (flow.ndim - 1))
        score = beside(np.where(units > 0, flow / np.where(units > 0, units, 1.0), plain), part)
        means = self._inputs[layer.name].input_means(layer)
        return LayerScore(layer.weight, layer.name, score, bias, relevance, means)

    def _weights(self) -> list[tuple[int | None, float]]:
        """Groups that hold samples, with their shares of them."""
        if self._groups == 1 or not self._channels:
            return [(None, 1.0)]
        shares = next(iter(self._channels.values())).weights
        return [(group, float(share)) for group, share in enumerate(shares) if share > 0]

    def _activity(self, statistic: Activity, group: int | None) -> Doubles:
        """Activity within a group is how far its samples are from the mean of all."""
        if self._rule.absolute or group is None:
            return self._rule.activity({moment: statistic.mean(moment) for moment in self._rule.moments})
        center = statistic.mean("signed")
        away = statistic.mean("squares", group) - 2 * center * statistic.mean("signed", group) + np.square(center)
        found: Doubles = np.maximum(away, 0.0) + self._rule.constant * np.square(center)
        return found

    def _propagated(
        self, shares: Mapping[str, Doubles], totals: Mapping[str, Doubles], weights: Mapping[str, float], group: int | None
    ) -> dict[str, Doubles]:
        """R of every layer's outputs [out] by name; that of tables from the walk in which they count."""

        def activity(ask: Ask) -> Doubles:
            return self._activity(self._asked[ask], group)

        def variation(ask: Ask) -> Doubles:
            if self._rule.absolute:
                return np.ones_like(activity(ask))
            squares = self._asked[ask].mean("squares", group)
            found: Doubles = activity(ask) / np.where(squares > 0, squares, 1.0)
            return found

        found: dict[str, Doubles] = {}
        for plan, tracks in self._walks:
            walked = propagate(self._graph, plan, tracks, activity, variation, shares, weights, not self._rule.absolute, totals)
            found = {**walked.outputs, **found}
        return found

    def _parts(self, layer: Layer) -> Doubles:
        """What each weight brings in, over all samples [out, in per group, *kernel]."""
        statistic, magnitude = self._inputs[layer.name], magnitudes(self._graph, layer).astype(np.float64) * abs(layer.scale)
        names: tuple[Moment, ...] = self._rule.moments
        activity = self._rule.activity({moment: statistic.input_means(layer, moment) for moment in names})
        part: Doubles = (magnitude if self._rule.absolute else np.square(magnitude)) * as_read(layer, activity)
        return part

    def _shares(self, layer: Layer, part: Doubles, group: int | None) -> tuple[Doubles, Doubles, Doubles]:
        """(share of each weight [out, in per group, *kernel], of the bias [out], their sum [out]), in a group of samples or over all."""
        if group is not None and layer.name in self._channels:
            channels = self._channels[layer.name]
            every = self._activity(channels, None).reshape(-1)
            own = self._activity(channels, group).reshape(-1)
            ratio = as_read(layer, own / np.where(every > 0, every, 1.0))
            part = part * ratio.reshape(*ratio.shape, *(1,) * (part.ndim - 2))
        bias = np.zeros(layer.out_channels)
        if self._rule.absolute and layer.bias is not None:
            bias = np.abs(layer.bias.view.apply(self._graph.array(layer.bias.name)).astype(np.float64)) * abs(layer.bias.factor)
        total = part.reshape(layer.out_channels, -1).sum(1) + bias
        safe = np.where(total > 0, total, 1.0)
        return part / safe.reshape(-1, *(1,) * (part.ndim - 1)), bias / safe, total


class _Shares(Mapping[str, Doubles]):
    """Shares of each weight, by layer name; of layers whose weights lie in files they are computed anew at each reading."""

    def __init__(self, measure: FlowMeasure, parts: Mapping[str, Doubles], group: int | None) -> None:
        self._measure, self._parts, self._group = measure, parts, group
        self._layers = {layer.name: layer for layer in measure._plan.layers}
        self._held: dict[str, tuple[Doubles, Doubles]] = {}

    def both(self, name: str) -> tuple[Doubles, Doubles]:
        """The shares [out, in per group, *kernel], and what each unit takes in altogether [out]."""
        if name in self._held:
            return self._held[name]
        share, _, total = self._measure._shares(self._layers[name], self._parts[name], self._group)
        if not is_mapped(self._parts[name]):
            self._held[name] = share, total
        return share, total

    def __getitem__(self, name: str) -> Doubles:
        return self.both(name)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class _Coarse(_Shares):
    """The same of connections [out, in per group]."""

    def __init__(self, shares: _Shares) -> None:
        self._layers, self._shares = shares._layers, shares

    def __getitem__(self, name: str) -> Doubles:
        return _coarse(self._shares[name])


def _coarse(share: Doubles) -> Doubles:
    """Of connections [out, in per group], from shares of single weights."""
    total: Doubles = share.reshape(*share.shape[:2], -1).sum(-1)
    return total


class MeanMeasure:
    """The means that `compensate` needs, for criteria that do not measure them."""

    def __init__(self, plan: Plan) -> None:
        self._inputs, self.measurements = _inputs(plan, lambda axis: InputMeans(axis, power=2, signed=True))
        self._plan = plan

    def means(self) -> dict[str, Doubles]:
        """What each weight meets on average after the pass, by layer name: [in channels, *kernel]."""
        return {layer.name: self._inputs[layer.name].input_means(layer) for layer in self._plan.layers}


def _inputs(plan: Plan, make: Callable[[int | None], InputMeans]) -> tuple[dict[str, InputMeans], list[Measurement]]:
    """A statistic of what each layer reads, by name; layers that read the same share it."""
    shared: dict[tuple[str, int | None], InputMeans] = {}
    found = {}
    for layer in plan.layers:
        key = (layer.reads, None if layer.is_convolution else layer.input_axis)
        found[layer.name] = shared.setdefault(key, shared.get(key) or make(key[1]))
    return found, [Measurement(name, statistic) for (name, _), statistic in shared.items()]


def passed_evenly(graph: Graph, plan: Plan) -> tuple[Even, ...]:
    """The nodes that pass relevance on evenly, because nobody described them; needs no data."""
    tracks = follow(graph, plan)

    def one(ask: Ask) -> Doubles:
        shape: tuple[Any, ...] = graph.shape(ask[0]) or ()
        return np.ones([size if axis in ask[1] and isinstance(size, int) else 1 for axis, size in enumerate(shape)])

    shares = {layer.name: np.full(layer.view.shape[:2], 1.0 / layer.in_per_group) for layer in plan.layers}
    return propagate(graph, plan, tracks, one, one, shares, {}).evenly
