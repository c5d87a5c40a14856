"""Rows for resizing and sampling at given places.

Resizing is separable: along each axis an output is a weighted sum of a few inputs. Where and with which weights depends on sizes only
and is computed once for each size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.interpreter.registry import Table
from relief_onnx.interpreter.values import as_list

__all__ = ["ROWS"]

ROWS = Table()
op = ROWS.op


@dataclass(frozen=True)
class Plan:
    """How one axis is resized: lengths before and after, scale, the part that tf_crop_and_resize takes, and the modes."""

    size: int
    wanted: int
    scale: float
    start: float
    end: float
    mode: str
    coordinates: str
    nearest: str
    a: float
    exclude: bool
    antialias: bool


def _coordinates(plan: Plan) -> Tensor:
    """Where in the input each output lies: in single precision, which decides ties as onnxruntime does."""
    place = torch.arange(plan.wanted, dtype=torch.float32)
    if plan.coordinates == "asymmetric":
        return place / plan.scale
    if plan.coordinates == "align_corners":
        return place * (plan.size - 1) / (plan.wanted - 1) if plan.wanted > 1 else place
    if plan.coordinates == "tf_crop_and_resize":
        if plan.wanted == 1:
            return place + 0.5 * (plan.start + plan.end) * (plan.size - 1)
        return plan.start * (plan.size - 1) + place * (plan.end - plan.start) * (plan.size - 1) / (plan.wanted - 1)
    if plan.coordinates == "tf_half_pixel_for_nn":
        return (place + 0.5) / plan.scale
    if plan.coordinates == "pytorch_half_pixel" and plan.wanted == 1:
        return place
    shift = 0.0
    if plan.coordinates == "half_pixel_symmetric":
        shift = float(plan.size / 2 * (1 - plan.wanted / (np.float32(plan.scale) * np.float32(plan.size))))
    return shift + (place + 0.5) / plan.scale - 0.5


NEAREST = {
    "round_prefer_floor": lambda x, scale: torch.ceil(x - 0.5),
    "round_prefer_ceil": lambda x, scale: torch.floor(x + 0.5),
    "floor": lambda x, scale: torch.floor(x),
    "ceil": lambda x, scale: torch.ceil(x),
    "simple": lambda x, scale: torch.ceil(x) if scale < 1 else torch.floor(x),  # before opset 11, as onnxruntime does
}


def _triangle(x: Tensor, a: float) -> Tensor:
    return (1 - x.abs()).clamp(0)


def _cubic(x: Tensor, a: float) -> Tensor:
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


KERNELS = {"linear": (_triangle, 1), "cubic": (_cubic, 2)}


@lru_cache(maxsize=512)
def _taps(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Places [wanted, taps], their weights, and which outputs lie outside [wanted]."""
    x = _coordinates(plan)
    outside = (x < 0) | (x > plan.size - 1)
    if plan.mode == "nearest":
        places = NEAREST[plan.nearest](x, plan.scale).clamp(0, plan.size - 1).long()[:, None]
        return places, torch.ones(plan.wanted, 1, dtype=torch.float64), outside
    kernel, reach = KERNELS[plan.mode]
    squeeze = min(plan.scale, 1.0) if plan.antialias else 1.0
    half = math.ceil(reach / squeeze)
    places = torch.floor(x)[:, None] + torch.arange(1 - half, 1 + half)
    weights = kernel((places - x[:, None]) * squeeze, plan.a)
    if plan.exclude:
        weights = torch.where((places >= 0) & (places < plan.size), weights, 0.0)
    if plan.exclude or plan.antialias:
        weights = weights / weights.sum(1, keepdim=True)
    return places.clamp(0, plan.size - 1).long(), weights, outside


def _along(x: Tensor, axis: int, plan: Plan, extrapolation: float) -> Tensor:
    """One axis resized."""
    if plan.size == plan.wanted and plan.scale == 1 and plan.coordinates != "tf_crop_and_resize":
        return x
    places, weights, outside = _taps(plan)
    columns = weights.to(x) if x.is_floating_point() else weights.to(x.device)
    shape = [1] * x.dim()
    shape[axis] = plan.wanted
    if plan.mode == "nearest":
        y = x.index_select(axis, places[:, 0].to(x.device))
    else:
        parts = (x.index_select(axis, places[:, tap].to(x.device)) * columns[:, tap].reshape(shape) for tap in range(places.shape[1]))
        y = torch.stack(list(parts)).sum(0)
    if plan.coordinates == "tf_crop_and_resize" and bool(outside.any()):
        y = torch.where(outside.to(x.device).reshape(shape), torch.tensor(extrapolation, dtype=y.dtype, device=x.device), y)
    return y


def _native(x: Tensor, plans: Sequence[Plan]) -> Tensor | None:
    """torch's own function for images where it computes the same, else None."""
    if x.dim() != 4 or not x.is_floating_point() or any(plan.size != plan.wanted for plan in plans[:2]):
        return None
    sizes, spatial = [plan.wanted for plan in plans[2:]], plans[2:]
    if any(abs(plan.scale * plan.size - plan.wanted) > 1e-6 for plan in spatial) or spatial[0].antialias or min(sizes) < 1:
        return None
    if spatial[0].mode == "nearest":
        plain = all(torch.equal(_taps(plan)[0][:, 0], torch.arange(plan.wanted) * plan.size // plan.wanted) for plan in spatial)
        return F.interpolate(x, sizes, mode="nearest") if plain and spatial[0].coordinates != "tf_crop_and_resize" else None
    if spatial[0].mode == "linear" and not spatial[0].exclude:
        if spatial[0].coordinates == "align_corners":
            return F.interpolate(x, sizes, mode="bilinear", align_corners=True)
        if spatial[0].coordinates in ("half_pixel", "pytorch_half_pixel") and min(sizes) > 1:
            return F.interpolate(x, sizes, mode="bilinear", align_corners=False)
    return None


def _resized(x: Tensor, plans: Sequence[Plan], extrapolation: float = 0.0) -> Tensor:
    found = _native(x, plans)
    if found is not None:
        return found
    for axis, plan in enumerate(plans):
        x = _along(x, axis, plan, extrapolation)
    return x


def _length(size: float, scale: float) -> int:
    """In single precision, as onnxruntime does: 5 times 1.8 is 9."""
    return int(np.float32(size) * np.float32(scale))


@op("Resize", host=(1,))
def resize_10(x: Tensor, scales: list[float], *, mode: str = "nearest") -> Tensor:
    """Opset 10, and Upsample before it: coordinates divided by the scale."""
    kind = "linear" if mode == "bilinear" else mode
    return _resized(
        x,
        [
            Plan(size, _length(size, scale), scale, 0.0, 1.0, kind, "asymmetric", "simple", -0.75, False, False)
            for size, scale in zip(x.shape, scales, strict=True)
        ],
    )


op("Upsample", host=(1,))(resize_10)


def _targets(sizes: list[int], scales: list[float], sources: list[int], policy: str) -> tuple[list[int], list[float]]:
    """Lengths and scales for wanted `sizes`, one scale for all axes where the policy keeps the aspect ratio."""
    if policy == "stretch":
        return sizes, scales
    one = (min if policy == "not_larger" else max)(scales)
    return [math.floor(one * source + 0.5) for source in sources], [one] * len(sizes)


@op("Resize", since=11, host=(1, 2, 3))
def resize(
    x: Tensor,
    roi: list[float] | None = None,
    scales: list[float] | None = None,
    sizes: list[int] | None = None,
    *,
    antialias: int = 0,
    axes: list[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    chosen = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    count = len(chosen)
    bounds = as_list(roi) if coordinate_transformation_mode == "tf_crop_and_resize" and roi else [0.0] * count + [1.0] * count
    sources = [x.shape[axis] for axis in chosen]
    if sizes:
        wanted, factors = _targets(
            sizes, [size / source for size, source in zip(sizes, sources, strict=True)], sources, keep_aspect_ratio_policy
        )
    else:
        factors = as_list(scales)
        shares = [bounds[count + place] - bounds[place] for place in range(count)]
        wanted = [_length(source * share, factor) for source, share, factor in zip(sources, shares, factors, strict=True)]
    plans = [Plan(size, size, 1.0, 0.0, 1.0, mode, "asymmetric", nearest_mode, cubic_coeff_a, False, False) for size in x.shape]
    for place, axis in enumerate(chosen):
        plans[axis] = Plan(
            sources[place],
            wanted[place],
            factors[place],
            bounds[place],
            bounds[count + place],
            mode,
            coordinate_transformation_mode,
            nearest_mode,
            cubic_coeff_a,
            bool(exclude_outside),
            bool(antialias),
        )
    return _resized(x, plans, extrapolation_value)


SAMPLING = {"bilinear": "bilinear", "linear": "bilinear", "nearest": "nearest", "bicubic": "bicubic", "cubic": "bicubic"}


@op("GridSample")
def grid_sample(x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "bilinear", padding_mode: str = "zeros") -> Tensor:
    return F.grid_sample(x, grid, SAMPLING[mode], padding_mode, bool(align_corners))


@op("AffineGrid", host=(1,))
def affine_grid(theta: Tensor, size: list[Any], *, align_corners: int = 0) -> Tensor:
    return F.affine_grid(theta, size, bool(align_corners))
