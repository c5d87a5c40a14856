"""What choosing masks again will take, estimated beforehand, and what is left out so that it stays within a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from relief_onnx.layers import Layer
from relief_onnx.solve import BLOCK, LEAST_BLOCK, SOLVE_FLOPS, operations

__all__ = ["WORK", "Effort", "plan_effort"]

# Floating point operations for all inverses and worths of a choice: five to ten minutes of one core.
WORK = 2e12


@dataclass(frozen=True)
class Effort:
    """flops: estimated in all; wanted: what it would be without the bound. layer_flops: bound of one layer in one sweep.

    rounds: of exchange. left: weights that are not looked at.
    """

    flops: float
    wanted: float
    layer_flops: float
    rounds: int
    left: tuple[str, ...]


def plan_effort(layers: Sequence[Layer], densities: Sequence[float], rounds: int, share: float, limit: float | None = None) -> Effort:
    """What has to be left out so that all of it takes `limit` (WORK).

    densities: part of the weights that is there in each sweep before the number is reached; share: in each of the `rounds` after it.
    First the blocks of features that are solved for together get smaller, then there are fewer rounds, then the largest layers are left.
    """
    limit = WORK if limit is None else limit
    kept, flops, count = list(layers), SOLVE_FLOPS, rounds
    wanted = estimate = _estimate(kept, densities, count, share, flops)
    while estimate > limit:
        smaller = _estimate(kept, densities, count, share, flops / 2)
        if smaller < estimate or flops > SOLVE_FLOPS / 64:
            flops, estimate = flops / 2, smaller
            continue
        if count:
            count -= 1
        elif kept:
            kept.remove(max(kept, key=lambda layer: _layer(layer, max(densities, default=share), False, flops)))
        else:
            break
        estimate = _estimate(kept, densities, count, share, flops)
    names = {layer.weight for layer in kept}
    return Effort(estimate, wanted, flops, count, tuple(layer.weight for layer in layers if layer.weight not in names))


def _estimate(layers: Sequence[Layer], densities: Sequence[float], rounds: int, share: float, limit: float) -> float:
    sweeps = sum(_layer(layer, density, False, limit) for layer in layers for density in densities)
    return sweeps + rounds * sum(_layer(layer, share, True, limit) for layer in layers)


def _layer(layer: Layer, density: float, additions: bool, limit: float) -> float:
    """Of one layer in one sweep: all units have equations of their own, but where everything is there still."""
    units = layer.out_channels // layer.groups
    features = 1
    for size in layer.view.shape[1:]:
        features *= size
    distinct = 1 if density >= 1 else units
    size = min(BLOCK, features)

    def at(size: int) -> float:
        return layer.groups * operations(distinct, units, features, density, size, additions)

    while size > LEAST_BLOCK and at(size) > limit:
        size //= 2
    return at(size)
