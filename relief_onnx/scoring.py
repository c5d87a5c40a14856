"""Importance scores: how much each connection, or each single weight, contributes to its neuron or filter.

All scores of one output unit, its bias among them, sum to 1; a unit without any contribution has zeros.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relief_onnx.aside import beside
from relief_onnx.calibrate import Measurement
from relief_onnx.errors import DataError
from relief_onnx.graph import Graph
from relief_onnx.layers import Layer, Plan
from relief_onnx.model import write_atomically
from relief_onnx.options import Options
from relief_onnx.probes import norms_name
from relief_onnx.streaming import (
    ChannelMean,
    Contribution,
    KernelNorm,
    MeanImage,
    OffsetMean,
    ResponseNorm,
    kernel_statistic,
    response_positions,
)

__all__ = ["CRITERIA", "LayerScore", "Scores", "criterion_of", "magnitudes", "measurements", "normalise", "read_scores", "write_scores"]

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class LayerScore:
    """Shares of one layer: `score` and `bias_score` [out], each row with its bias summing to 1.

    `score` is [out, in per group] at connection granularity, [out, in per group, *kernel] at weight granularity. Of the criterion flow
    `relevance` [out] is R of every unit, and `means` [in channels, *kernel] what each weight meets on average (see `compensate`).
    Of an embedding table `counts` [rows] is how often the samples used each row.
    """

    weight: str
    node: str
    score: Doubles
    bias_score: Doubles
    relevance: Doubles | None = None
    means: Doubles | None = None
    counts: Doubles | None = None

    @property
    def flow(self) -> Doubles:
        """What share of the network's output activity passes through each connection or weight, shaped as `score`."""
        assert self.relevance is not None
        return self.score * self.relevance.reshape(-1, *(1,) * (self.score.ndim - 1))


Scores = Mapping[str, LayerScore]  # by node name


def _fast(layer: Layer, weight: NDArray[Any]) -> Contribution:
    return MeanImage(layer.geometry) if layer.geometry is not None else ChannelMean(layer.input_axis)


def _seen(layer: Layer, power: int) -> Contribution:
    return OffsetMean(layer.geometry, power) if layer.geometry is not None else ChannelMean(layer.input_axis, power)


Make = Callable[[Layer, NDArray[Any]], Contribution]

# granularity -> criterion -> what to measure for a layer; None needs no data.
CRITERIA: Mapping[str, Mapping[str, Make | None]] = {
    "connection": {
        "relief": kernel_statistic,
        "relief-fast": _fast,
        "wanda": lambda layer, weight: ChannelMean(layer.input_axis, 2),
        "magnitude": None,
    },
    # A single weight has no norm over positions in it, so the mean over the samples may come first: relief costs what relief-fast does.
    "weight": {
        "relief": lambda layer, weight: _seen(layer, 1),
        "relief-fast": lambda layer, weight: _seen(layer, 1),
        "wanda": lambda layer, weight: _seen(layer, 2),
        "magnitude": None,
    },
}


def _score_shape(layer: Layer, granularity: str) -> tuple[int, ...]:
    """The shape of a layer's scores and masks."""
    return layer.view.shape if granularity == "weight" else layer.view.shape[:2]


def magnitudes(graph: Graph, layer: Layer) -> NDArray[Any]:
    """|W| in canonical layout [out, in per group, *kernel], float32 or float64."""
    weight: NDArray[Any] = np.abs(layer.view.apply(graph.array(layer.weight)))
    return weight if weight.dtype in (np.float32, np.float64) else weight.astype(np.float32)


Inside = dict[str, tuple[Layer, NDArray[Any]]]


def measurements(
    graph: Graph, plan: Plan, criterion: str, granularity: str = "connection"
) -> tuple[list[Measurement], dict[str, Contribution], Inside]:
    """What to measure for a criterion: what listens to which tensor, the statistic of each layer by name, and layers measured in the graph.

    Layers that read the same tensor in the same way share a statistic where it does not depend on their weights.
    """
    make = CRITERIA[granularity][criterion]
    wanted: list[Measurement] = []
    statistics: dict[str, Contribution] = {}
    inside: Inside = {}
    shared: dict[tuple[Any, ...], Contribution] = {}
    for layer in plan.layers if make is not None else ():
        weight = layer.view.apply(graph.array(layer.weight))
        element, shape = graph.types.get(layer.input, (0, None))
        positions = response_positions(layer, shape, element == 1) if make is kernel_statistic else None
        if positions is not None:
            statistics[layer.name] = ResponseNorm(layer, positions)
            inside[norms_name(layer)] = (layer, weight)
            wanted.append(Measurement(norms_name(layer), statistics[layer.name]))
            continue
        made = make(layer, weight) if make is not None else None
        key = (layer.reads, layer.input_axis, layer.geometry, layer.name if isinstance(made, KernelNorm) else "")
        if made is not None and key not in shared:
            shared[key] = made
            wanted.append(Measurement(layer.reads, made))
        statistics[layer.name] = shared[key]
    return wanted, statistics, inside


def normalise(graph: Graph, layer: Layer, statistic: Contribution | None, granularity: str = "connection") -> LayerScore:
    """Shares from a fed statistic; without one, from the weights alone (as a connection, a kernel counts with its norm)."""
    magnitude = magnitudes(graph, layer)
    if statistic is None:
        squares = np.square(magnitude, dtype=np.float64).reshape(*_score_shape(layer, granularity), -1)
        contribution, factor = np.sqrt(squares.sum(-1)), 1.0
    else:
        contribution, factor = statistic.contributions(layer, magnitude)
    contribution = contribution * abs(layer.scale)
    bias = np.zeros(layer.out_channels)
    if layer.bias is not None:
        value = layer.bias.view.apply(graph.array(layer.bias.name)).astype(np.float64)
        bias = np.abs(value) * abs(layer.bias.factor) * factor
    rows = contribution.reshape(layer.out_channels, -1)
    total = rows.sum(1) + bias
    safe = np.where(total > 0, total, 1.0)
    shares = beside((rows / safe[:, None]).reshape(contribution.shape), graph.array(layer.weight))
    return LayerScore(layer.weight, layer.name, shares, bias / safe)


def write_scores(scores: Scores, path: Path) -> None:
    """scores.npz: `W/score`, `W/bias_score` per weight; a shared weight's further readers as `W@NODE/...`. Raises OutputError.

    Of the criterion flow also `W/relevance` [out], `W/flow` (shaped as the score) and `W/input_mean` [in channels, *kernel]; of an
    embedding table `W/row_counts` [rows].
    """
    arrays: dict[str, NDArray[Any]] = {}
    for layer in scores.values():
        key = f"{layer.weight}@{layer.node}" if f"{layer.weight}/score" in arrays else layer.weight
        arrays[f"{key}/score"], arrays[f"{key}/bias_score"] = layer.score, layer.bias_score
        if layer.relevance is not None:
            arrays[f"{key}/relevance"], arrays[f"{key}/flow"] = layer.relevance, layer.flow
        if layer.means is not None:
            arrays[f"{key}/input_mean"] = layer.means
        if layer.counts is not None:
            arrays[f"{key}/row_counts"] = layer.counts
    write_arrays(arrays, path)


def write_arrays(arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    """A compressed .npz, whole or not at all, the same bytes for the same arrays."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED)
    write_atomically(path, content.getvalue())


def read_scores(path: Path, plan: Plan, granularity: str, tables: Sequence[Layer] = ()) -> dict[str, LayerScore]:
    """Scores from a file, checked against the model and the granularity; of embedding tables only those asked for (all their readers).

    Raises DataError naming file and weight.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; measure it with relief-onnx score") from error
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} is not a score file (.npz); measure it with relief-onnx score") from error
    found: dict[str, LayerScore] = {}
    for weight, layers in {**plan.by_weight(), **Plan(tuple(tables), ()).by_weight()}.items():
        for i, layer in enumerate(layers):
            key = weight if i == 0 else f"{weight}@{layer.name}"
            found[layer.name] = _checked(path, key, layer, arrays, granularity)
    return found


def _checked(path: Path, key: str, layer: Layer, arrays: Mapping[str, NDArray[Any]], granularity: str) -> LayerScore:
    parts: Sequence[tuple[str, tuple[int, ...]]] = (
        (f"{key}/score", _score_shape(layer, granularity)),
        (f"{key}/bias_score", (layer.out_channels,)),
    )
    by_flow = any(name.endswith("/relevance") for name in arrays)
    if by_flow:
        parts = (*parts, (f"{key}/relevance", (layer.out_channels,)))
    if layer.is_table:
        parts = (*parts, (f"{key}/row_counts", (layer.in_per_group,)))
    elif by_flow:
        parts = (*parts, (f"{key}/input_mean", (layer.groups * layer.in_per_group, *layer.view.shape[2:])))
    for name, shape in parts:
        if name not in arrays:
            raise DataError(f"{path} has no {name}; it was measured on another model, measure again with relief-onnx score")
        other = next((item for item in CRITERIA if item != granularity and arrays[name].shape == _score_shape(layer, item)), None)
        if arrays[name].shape != shape and other is not None and name.endswith("/score"):
            raise DataError(
                f"{path} was measured with --granularity {other}: {name} is {list(arrays[name].shape)}, {granularity} granularity needs "
                f"{list(shape)}; measure again with relief-onnx score --granularity {granularity}, or prune with --granularity {other} or "
                f"channel+{other}"
            )
        if arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
            raise DataError(f"{path}: {name} is {list(arrays[name].shape)}, the model needs {list(shape)} finite numbers; measure again")
    fields = {"bias_score": "bias_score", "row_counts": "counts", "input_mean": "means"}
    values = {name.removeprefix(f"{key}/"): arrays[name].astype(float) for name, _ in parts}
    return LayerScore(layer.weight, layer.name, **{fields.get(name, name): value for name, value in values.items()})


def criterion_of(scores: Scores, options: Options) -> str:
    """What a score file holds decides: R of every unit makes it flow."""
    if all(score.relevance is not None for score in scores.values()):
        return options.criterion if options.by_flow else "flow"
    return options.criterion if not options.by_flow else "relief"
