"""How much more, or less, an error of a layer's sums does to the outputs than R says: measured, layer by layer.

A weight's worth is an error of its neuron, as a part of the neuron's variance, times R^EXPONENT. That ranks neurons of a layer. Of two
layers it does not know what gates, softmax and norms make of an error. So each layer is pruned and solved for by itself in a network that
is whole otherwise: what the outputs lose by that, over what the worths of the layer foresaw, is its factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.contest import distance, emitted
from relief_onnx.layers import Layer
from relief_onnx.surgery import apply_weights

__all__ = ["Trials", "factors"]

# How far from the middle of all a factor may be.
RANGE = 1e3
# Below this part of the largest error foreseen there is only noise.
NOISE = 1e-6


@dataclass
class Trials:
    """New initializers of layers that are solved for by themselves, and the errors foreseen, by layer; W and R of a node are one."""

    new: dict[int | str, dict[str, NDArray[Any]]] = field(default_factory=dict)
    foreseen: dict[int | str, float] = field(default_factory=dict)
    weights: dict[int | str, list[str]] = field(default_factory=dict)

    def add(self, layer: Layer, new: Mapping[str, NDArray[Any]], errors: NDArray[np.float64], value: NDArray[np.float64]) -> None:
        """errors: mean squared errors of rows [out]; value: what a unit of it counts for [out]."""
        key = layer.name if layer.recurrent is None else layer.node
        self.new.setdefault(key, {}).update(new)
        self.foreseen[key] = max(self.foreseen.get(key, 0.0), float(errors @ value))
        self.weights.setdefault(key, []).append(layer.weight)


def factors(model: onnx.ModelProto, trials: Trials, feeds: Sequence[Mapping[str, NDArray[Any]]], threads: int) -> dict[str, float]:
    """The factor of each weight; 1 is the middle of all, which is what layers have that lost nothing in their trial."""
    wanted = emitted(model, feeds, threads)
    found: dict[str, float] = {}
    least = NOISE * max(trials.foreseen.values(), default=0.0)
    for key, new in trials.new.items():
        if new and trials.foreseen[key] > least:
            error = distance(wanted, emitted(apply_weights(model, new), feeds, threads))
            if np.isfinite(error):
                found |= dict.fromkeys(trials.weights[key], error / trials.foreseen[key])
    known = np.array([own for own in found.values() if own > 0])
    middle = float(np.exp(np.log(known).mean())) if len(known) else 1.0
    return {weight: float(np.clip(own / middle, 1 / RANGE, RANGE)) for weight, own in found.items()}
