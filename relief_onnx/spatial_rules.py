"""Sizes of what convolutions, pools, resizing and recurrent operators return: [N, C, *space] and [T, D, N, H]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from relief_onnx.dims import ONE, Dim
from relief_onnx.shape_scope import Dims, Step

__all__ = ["SPATIAL_RULES"]

# Sizes times scales with no larger power of two below the line are exact in float32.
EXACT_FRACTION = 64

SpatialRule = Callable[[Step], Dims | list[Dims | None] | None]


def _window(step: Step, size: Dim, axis: int, kernel: int) -> Dim:
    """Positions of a window along one axis of the space; `axis` counts from 0."""
    values, symbols = step.attributes, step.symbols
    rank = len(values.get("kernel_shape", ())) or len(step.dims(1) or ()) - 2
    stride = values.get("strides", [1] * rank)[axis]
    reach = values.get("dilations", [1] * rank)[axis] * (kernel - 1) + 1
    auto = values.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        return symbols.ceil(size, stride)
    pads = values.get("pads", [0] * (2 * rank)) if auto != "VALID" else [0] * (2 * rank)
    room = pads[axis] + pads[axis + rank] - reach
    if not values.get("ceil_mode", 0):
        return symbols.floor(symbols.add(size, Dim.of(room + stride)), Dim.of(stride))
    if size.value is None:
        # A last window that would start in the padding is left out, which a formula of symbols cannot say.
        return size if (stride, room) == (1, -1) else symbols.memo(("ceil window", size, stride, room, pads[axis]))
    count = -(-(size.coefficient + room) // stride) + 1
    return Dim.of(count - 1 if (count - 1) * stride >= size.coefficient + pads[axis] else count)


def _space(step: Step, sizes: Sequence[Dim], kernel: Sequence[int | None]) -> Dims:
    return tuple(
        step.symbols.fresh() if length is None else _window(step, size, axis, length)
        for axis, (size, length) in enumerate(zip(sizes, kernel, strict=True))
    )


def _kernel(step: Step) -> Sequence[int | None]:
    weight = step.dims(1)
    if "kernel_shape" in step.attributes:
        return list(step.attributes["kernel_shape"])
    return [size.value for size in (weight or ())[2:]]


def _conv(step: Step) -> Dims | None:
    weight = step.dims(1)
    dims = step.dims(0) or (None if weight is None else step.fresh(len(weight)))
    if dims is None:
        return None
    channels = step.symbols.fresh() if weight is None else weight[0]
    kernel = _kernel(step) if weight is not None or "kernel_shape" in step.attributes else [None] * (len(dims) - 2)
    return (dims[0], channels, *_space(step, dims[2:], kernel))


def _transposed(step: Step) -> Dims | None:
    weight, values = step.dims(1), step.attributes
    dims = step.dims(0) or (None if weight is None else step.fresh(len(weight)))
    if dims is None or weight is None:
        return None if dims is None else step.fresh(len(dims))
    channels = weight[1] * Dim.of(values.get("group", 1))
    if values.get("output_shape"):
        return (dims[0], channels, *map(Dim.of, values["output_shape"][-(len(dims) - 2) :]))
    rank, kernel = len(dims) - 2, _kernel(step)
    strides, extra = values.get("strides", [1] * rank), values.get("output_padding", [0] * rank)
    pads, dilations = values.get("pads", [0] * (2 * rank)), values.get("dilations", [1] * rank)
    auto = values.get("auto_pad", "NOTSET")
    space: list[Dim] = []
    for axis, (size, length) in enumerate(zip(dims[2:], kernel, strict=True)):
        if length is None:
            space.append(step.symbols.fresh())
            continue
        margin = extra[axis] + dilations[axis] * (length - 1) + 1 - strides[axis]
        if auto == "NOTSET":
            margin -= pads[axis] + pads[axis + rank]
        elif auto != "VALID":
            margin = 0
        space.append(step.symbols.add(size * Dim.of(strides[axis]), Dim.of(margin)))
    return (dims[0], channels, *space)


def _pool(step: Step) -> list[Dims | None] | None:
    dims = step.dims()
    if dims is None:
        return None
    pooled = (*dims[:2], *_space(step, dims[2:], _kernel(step)))
    return [pooled, pooled]


def _global(step: Step) -> Dims | None:
    dims = step.dims()
    return None if dims is None else dims[:2] + (ONE,) * (len(dims) - 2)


def _resize(step: Step) -> Dims | None:
    """Resize since 11 has (X, roi, scales, sizes), before it (X, scales); Upsample may have its scales as an attribute."""
    dims, values = step.dims(), step.attributes
    if dims is None:
        return None
    sizes = step.vector(3)
    slot = 2 if step.node.op_type == "Resize" and step.opset > 10 else 1
    axes = [axis % len(dims) for axis in values.get("axes", range(len(dims)))]
    found = dict(enumerate(dims))
    if sizes is not None and values.get("keep_aspect_ratio_policy", "stretch") == "stretch":
        found |= dict(zip(axes, sizes, strict=True))
    elif step.has(3):
        found |= {axis: step.symbols.fresh() for axis in axes}
    else:
        found |= {axis: _scaled(step, dims[axis], slot, number) for number, axis in enumerate(axes)}
    return tuple(found.values())


def _scaled(step: Step, size: Dim, slot: int, number: int) -> Dim:
    """floor(size * scale); a fresh symbol where float32, in which runtimes calculate, would round otherwise."""
    scales = step.vector(slot)
    if scales is not None and scales[number].coefficient > 0:
        return size * scales[number]
    array = step.scope.array(step.node.input[slot]) if step.has(slot) else step.attributes.get("scales")
    if array is None:
        return step.symbols.fresh()
    scale = np.float32(np.asarray(array).reshape(-1)[number])
    over, under = float(scale).as_integer_ratio()
    if over > 0 and under <= EXACT_FRACTION:
        return step.symbols.floor(size * Dim.of(over), Dim.of(under))
    if size.value is None:
        return step.symbols.memo(("scaled", size, float(scale)))
    exact, rounded = int(np.floor(float(scale) * size.coefficient)), int(np.float32(size.coefficient) * scale)
    return Dim.of(exact) if exact == rounded else step.symbols.fresh()


def _recurrent(step: Step) -> list[Dims | None]:
    """Y [T, D, N, H] and the last states [D, N, H]; with layout 1 N comes first."""
    dims, recurrence, values = step.dims(0) or step.fresh(3), step.dims(2), step.attributes
    hidden = Dim.of(values["hidden_size"]) if "hidden_size" in values else recurrence[2] if recurrence else step.symbols.fresh()
    directions = Dim.of(2 if values.get("direction", "forward") == "bidirectional" else 1)
    if values.get("layout", 0):
        last = (dims[0], directions, hidden)
        return [(dims[0], dims[1], directions, hidden), last, last]
    last = (directions, dims[1], hidden)
    return [(dims[0], *last), last, last]


def _to_space(step: Step) -> Dims | None:
    dims, block = step.dims(), Dim.of(step.attributes["blocksize"])
    if dims is None:
        return None
    return (dims[0], step.symbols.floor(dims[1], block * block), *(size * block for size in dims[2:]))


def _to_depth(step: Step) -> Dims | None:
    dims, block = step.dims(), Dim.of(step.attributes["blocksize"])
    if dims is None:
        return None
    return (dims[0], dims[1] * block * block, *(step.symbols.floor(size, block) for size in dims[2:]))


def _spectrum(step: Step) -> Dims | None:
    """[N, frames, frequencies, 2]; ONNX's own inference counts the frequencies of a one-sided spectrum wrong."""
    dims = step.dims()
    return None if dims is None else (dims[0], *step.fresh(2), Dim.of(2))


SPATIAL_RULES: dict[str, SpatialRule] = {
    "Conv": _conv, "ConvTranspose": _transposed, "MaxPool": _pool, "AveragePool": _pool, "LpPool": _pool, "GlobalAveragePool": _global,
    "GlobalMaxPool": _global, "GlobalLpPool": _global, "Resize": _resize, "Upsample": _resize, "LSTM": _recurrent, "GRU": _recurrent,
    "RNN": _recurrent, "DepthToSpace": _to_space, "SpaceToDepth": _to_depth, "STFT": _spectrum,
}  # fmt: skip
