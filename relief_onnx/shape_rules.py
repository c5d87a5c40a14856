"""How operators make sizes from sizes: a table of the frequent ones, and of those whose targets may be computed at run time.

A rule takes a Step and returns the sizes of the first output, or a list for the first outputs; None where the rank is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce

import numpy as np

from relief_onnx.dims import ONE, ZERO, Dim, product
from relief_onnx.shape_scope import Dims, Step
from relief_onnx.spatial_rules import SPATIAL_RULES

__all__ = ["SHAPE_RULES", "ShapeRule", "folded_axes", "slices"]

ShapeRule = Callable[[Step], Dims | list[Dims | None] | None]

# Ends of a Slice from here on mean "to the end".
FAR = 1 << 31


def _same(step: Step) -> Dims | None:
    return step.dims()


def _meet(step: Step, shapes: Iterable[Dims | None]) -> Dims | None:
    """Multidirectional broadcasting."""
    found = list(shapes)
    if not found or None in found:
        return None
    return reduce(lambda a, b: _broadcast(step, a, b), [shape for shape in found if shape is not None])


def _broadcast(step: Step, a: Dims, b: Dims) -> Dims:
    rank = max(len(a), len(b))
    pairs = zip((ONE,) * (rank - len(a)) + a, (ONE,) * (rank - len(b)) + b, strict=True)
    return tuple(step.symbols.broadcast(one, other) for one, other in pairs)


def _elementwise(step: Step) -> Dims | None:
    if step.opset < 7:  # One-sided broadcasting along an axis.
        return step.dims()
    return _meet(step, (step.dims(slot) for slot in range(step.count)))


def _shape(step: Step) -> Dims:
    dims = step.dims()
    if dims is None:
        return step.fresh(1)
    first, last = step.attributes.get("start", 0), step.attributes.get("end")
    return (Dim.of(len(dims[first:last])),)


def _scalar(step: Step) -> Dims:
    return ()


def _reshape(step: Step) -> Dims | None:
    dims = step.dims()
    target = [Dim.of(size) for size in step.attributes["shape"]] if "shape" in step.attributes else step.vector(1)
    if target is None:
        length = step.dims(1)
        return step.fresh(length[0].coefficient) if length is not None and length[0].value is not None else None
    sizes: list[Dim | None] = []
    for axis, size in enumerate(target):
        if size == ZERO and not step.attributes.get("allowzero", 0):
            sizes.append(dims[axis] if dims is not None else None)
        else:
            # A symbol that may be negative may be -1.
            sizes.append(size if step.symbols.is_size(size) else None)
    open_axes = [axis for axis, size in enumerate(sizes) if size is None]
    if dims is not None and len(open_axes) == 1:
        rest = product(size for size in sizes if size is not None)
        total = product(dims)
        if total.coefficient and rest.coefficient:
            sizes[open_axes[0]] = step.symbols.floor(total, rest)
    return tuple(step.symbols.fresh() if size is None else size for size in sizes)


def _flatten(step: Step) -> Dims | None:
    dims, axis = step.dims(), step.attributes.get("axis", 1)
    return None if dims is None else (product(dims[:axis]), product(dims[axis:]))


def _transpose(step: Step) -> Dims | None:
    dims = step.dims()
    return None if dims is None else tuple(dims[axis] for axis in step.attributes.get("perm", range(len(dims))[::-1]))


def _squeeze(step: Step) -> Dims | None:
    dims, axes = step.dims(), step.integers(1, "axes")
    if dims is None:
        return None
    if axes is not None:
        drop = {axis % len(dims) for axis in axes}
        return tuple(size for axis, size in enumerate(dims) if axis not in drop)
    if not step.given(1, "axes"):
        # Without axes every 1 goes; whether a symbol is 1 is not known.
        return None if any(size.symbols for size in dims) else tuple(size for size in dims if size != ONE)
    count = step.dims(1)
    return step.fresh(len(dims) - count[0].coefficient) if count and count[0].value is not None else None


def _unsqueeze(step: Step) -> Dims | None:
    dims, axes = step.dims(), step.integers(1, "axes")
    if dims is None:
        return None
    if axes is None:
        count = step.dims(1)
        return step.fresh(len(dims) + count[0].coefficient) if count and count[0].value is not None else None
    new = {axis % (len(dims) + len(axes)) for axis in axes}
    rest = iter(dims)
    return tuple(ONE if axis in new else next(rest) for axis in range(len(dims) + len(axes)))


def _concat(step: Step) -> Dims | None:
    shapes = [step.dims(slot) for slot in range(step.count)]
    whole = [shape for shape in shapes if shape is not None]
    if not whole:
        return None
    axis = step.attributes.get("axis", 1) % len(whole[0])
    if len(whole) < len(shapes):
        merged = [step.symbols.fresh() if i == axis else sizes[0] for i, sizes in enumerate(zip(*whole, strict=True))]
        return tuple(merged)
    return tuple(
        reduce(step.symbols.add, sizes) if i == axis else min(sizes, key=lambda size: len(size.symbols))
        for i, sizes in enumerate(zip(*whole, strict=True))
    )


def _split(step: Step) -> list[Dims | None] | None:
    dims, count = step.dims(), len(step.node.output)
    if dims is None:
        return None
    axis = step.attributes.get("axis", 0) % len(dims)
    if step.given(1, "split"):
        given = step.vector(1) if step.has(1) else [Dim.of(size) for size in step.attributes["split"]]
        parts = list(step.fresh(count)) if given is None else given
    elif step.opset < 18 or dims[axis].divided(Dim.of(count)) is not None:
        parts = [step.symbols.floor(dims[axis], Dim.of(count))] * count
    else:
        chunk = step.symbols.ceil(dims[axis], count)
        taken = chunk * Dim.of(count - 1)
        parts = [chunk] * (count - 1) + [step.symbols.sub(dims[axis], taken)]
    return [(*dims[:axis], part, *dims[axis + 1 :]) for part in parts]


def _gather(step: Step) -> Dims | None:
    data, picked = step.dims(0), step.dims(1)
    if data is None or picked is None:
        return None
    axis = step.attributes.get("axis", 0) % len(data)
    return data[:axis] + picked + data[axis + 1 :]


def _second(step: Step) -> Dims | None:
    return step.dims(1)


def _gather_nd(step: Step) -> Dims | None:
    data, indices, batch = step.dims(0), step.dims(1), step.attributes.get("batch_dims", 0)
    if data is None or indices is None or indices[-1].value is None:
        return None
    return indices[:-1] + data[batch + indices[-1].coefficient :]


def slices(step: Step) -> list[tuple[int, Dim, Dim, Dim]] | None:
    """The (axis, start, end, step) rows of a Slice; None where the axes are not known."""
    dims = step.dims()
    if dims is None:
        return None
    if "starts" in step.attributes:
        bounds = [[Dim.of(value) for value in step.attributes[name]] for name in ("starts", "ends")]
    else:
        bounds = [row for row in (step.vector(1), step.vector(2)) if row is not None]
    every = list(range(len(bounds[0]))) if bounds else None
    axes = step.integers(3, "axes") if step.given(3, "axes") else every
    if axes is None:
        return None
    starts, ends = bounds if len(bounds) == 2 else (None, None)
    strides = step.vector(4) if step.has(4) else [ONE] * len(axes)
    lost = [step.symbols.fresh(size=False) for _ in axes]
    rows = zip(axes, starts or lost, ends or lost, strides or lost, strict=True)
    return [(axis % len(dims), start, end, stride) for axis, start, end, stride in rows]


def _slice(step: Step) -> Dims | None:
    dims, rows = step.dims(), slices(step)
    if dims is None:
        return None
    if rows is None:
        return step.fresh(len(dims))
    sizes = list(dims)
    for axis, start, end, stride in rows:
        sizes[axis] = _sliced(step, dims[axis], start, end, stride)
    return tuple(sizes)


def _sliced(step: Step, size: Dim, start: Dim, end: Dim, stride: Dim) -> Dim:
    """How many positions lie between start and end."""
    key = ("slice", size, start, end, stride)
    if stride == Dim.of(-1) and start == Dim.of(-1) and not end.symbols and end.coefficient < -FAR + 1:
        return size
    if None not in (size.value, start.value, end.value, stride.value):
        return Dim.of(len(range(size.coefficient)[start.coefficient : end.coefficient : stride.coefficient]))
    if stride.value is None or stride.coefficient < 1:
        return step.symbols.memo(key)
    first, last = _clamped(step, size, start), _clamped(step, size, end)
    if first is None or last is None:
        return step.symbols.memo(key)
    length = step.symbols.sub(last, first)
    certain = step.symbols.is_size(length) or step.symbols.span(last, first)[0] >= 0
    return step.symbols.ceil(length, stride.coefficient) if certain else step.symbols.memo(key)


def _clamped(step: Step, size: Dim, position: Dim) -> Dim | None:
    """A start or end of a Slice as a position from 0 to `size`; None where it is not clear how it is clamped."""
    if not position.symbols and position.coefficient >= FAR - 1:
        return size
    if not position.symbols and position.coefficient < 0:
        # Negative positions count from the end.
        position = step.symbols.add(size, position)
    if not step.symbols.is_size(position):
        return None
    low, high = step.symbols.span(position, size)
    return position if high <= 0 else size if low >= 0 else None


def _tile(step: Step) -> Dims | None:
    dims, repeats = step.dims(), step.vector(1)
    if dims is None or repeats is None:
        return None if dims is None else step.fresh(len(dims))
    return tuple(size * repeat for size, repeat in zip(dims, repeats, strict=True))


def _expand(step: Step) -> Dims | None:
    dims, target = step.dims(), step.vector(1)
    if dims is not None and target is not None:
        return _broadcast(step, dims, tuple(target))
    length = step.dims(1)
    if dims is None or length is None or length[0].value is None:
        return None
    return step.fresh(max(len(dims), length[0].coefficient))


def _filled(step: Step) -> Dims | None:
    target, length = step.vector(0), step.dims(0)
    if target is not None:
        return tuple(target)
    return step.fresh(length[0].coefficient) if length is not None and length[0].value is not None else None


def _range(step: Step) -> Dims | None:
    bounds = [step.vector(slot) for slot in range(3)]
    rows = [row[0] for row in bounds if row]
    if len(rows) < 3:
        arrays = [step.scope.array(name) for name in step.node.input]
        if any(array is None for array in arrays):
            return step.fresh(1)
        low, high, by = (float(np.asarray(array).reshape(-1)[0]) for array in arrays)
        return (Dim.of(max(int(np.ceil((high - low) / by)), 0)),)
    start, limit, stride = rows
    if None not in (start.value, limit.value, stride.value):
        return (Dim.of(len(range(start.coefficient, limit.coefficient, stride.coefficient))),)
    length = step.symbols.sub(limit, start)
    if stride.value is None or stride.coefficient < 1 or not step.symbols.is_size(length):
        return (step.symbols.memo(("range", start, limit, stride)),)
    return (step.symbols.ceil(length, stride.coefficient),)


def _pad(step: Step) -> Dims | None:
    dims = step.dims()
    if dims is None:
        return None
    attribute = step.attributes.get("pads", step.attributes.get("paddings"))
    pads = [Dim.of(value) for value in attribute] if attribute is not None else step.vector(1)
    axes = step.integers(3) if step.has(3) else list(range(len(dims)))
    if pads is None or axes is None:
        return step.fresh(len(dims))
    sizes = list(dims)
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        sizes[axis] = step.symbols.add(step.symbols.add(dims[axis], before), after)
    return tuple(sizes)


def _matmul(step: Step) -> Dims | None:
    a, b = step.dims(0), step.dims(1)
    if a is None or b is None:
        return None
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    return _broadcast(step, a[:-2], b[:-2]) + rows + columns


def _gemm(step: Step) -> Dims:
    a, b = step.dims(0) or step.fresh(2), step.dims(1) or step.fresh(2)
    return a[int(bool(step.attributes.get("transA")))], b[int(not step.attributes.get("transB"))]


def _einsum(step: Step) -> Dims | None:
    left, arrow, right = step.attributes["equation"].replace(" ", "").partition("->")
    shapes = [step.dims(slot) for slot in range(step.count)]
    if not arrow or "." in left:
        raise ValueError("left to the standard's own inference")
    sizes: dict[str, Dim] = {}
    for letters, shape in zip(left.split(","), shapes, strict=True):
        for letter, size in zip(letters, shape or step.fresh(len(letters)), strict=True):
            sizes[letter] = step.symbols.broadcast(sizes.get(letter, ONE), size)
    return tuple(sizes[letter] for letter in right)


def folded_axes(step: Step, rank: int) -> list[int] | None:
    """The axes that a Reduce operator folds; None where they are not known."""
    axes = step.integers(1, "axes")
    if axes is None and step.given(1, "axes"):
        return None
    if not axes:
        return [] if step.attributes.get("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(axis % rank for axis in axes)


def _reduce(step: Step) -> Dims | None:
    dims, keep = step.dims(), step.attributes.get("keepdims", 1)
    axes = None if dims is None else folded_axes(step, len(dims))
    if dims is None or axes is None:
        count = step.dims(1)
        if dims is None or not (keep or (count and count[0].value)):
            return None
        return step.fresh(len(dims) if keep or not count else len(dims) - count[0].coefficient)
    return tuple(ONE if axis in axes else size for axis, size in enumerate(dims) if keep or axis not in axes)


def _arg(step: Step) -> Dims | None:
    dims, keep = step.dims(), step.attributes.get("keepdims", 1)
    if dims is None:
        return None
    folded = step.attributes.get("axis", 0) % len(dims)
    return tuple(ONE if axis == folded else size for axis, size in enumerate(dims) if keep or axis != folded)


def _top(step: Step) -> list[Dims | None] | None:
    dims, count = step.dims(), step.vector(1) if step.has(1) else [Dim.of(step.attributes["k"])]
    if dims is None:
        return None
    axis = step.attributes.get("axis", -1) % len(dims)
    best = (*dims[:axis], count[0] if count else step.symbols.fresh(), *dims[axis + 1 :])
    return [best, best]


def _nonzero(step: Step) -> Dims | None:
    dims = step.dims()
    return None if dims is None else (Dim.of(len(dims)), step.symbols.fresh())


def _vectorized(step: Step) -> Dims | None:
    """Rows of all inputs side by side."""
    dims, widths = step.dims(), step.attributes.get("inputdimensions")
    return None if dims is None or widths is None else (dims[0] if len(dims) > 1 else ONE, Dim.of(sum(widths)))


SAME = """Abs Acos Acosh Asin Asinh Atan Atanh BatchNormalization BitwiseNot Cast CastLike Ceil Celu Clip Cos Cosh CumSum Dropout Elu Erf
Exp Floor Gelu GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu
Log LogSoftmax LpNormalization MeanVarianceNormalization Mish Neg Not PRelu RMSNormalization Reciprocal Relu Round Scatter ScatterElements
ScatterND Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Trilu
ai.onnx.ml.Binarizer ai.onnx.ml.Imputer ai.onnx.ml.Normalizer ai.onnx.ml.Scaler"""
BROADCAST = """Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or
Pow Sub Sum Where Xor"""
REDUCE = "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"

SHAPE_RULES: dict[str, ShapeRule] = (
    dict.fromkeys(SAME.split(), _same)
    | dict.fromkeys(BROADCAST.split(), _elementwise)
    | dict.fromkeys(REDUCE.split(), _reduce)
    | SPATIAL_RULES
    | {
        "Shape": _shape, "Size": _scalar, "Reshape": _reshape, "Flatten": _flatten, "Transpose": _transpose, "Squeeze": _squeeze,
        "Unsqueeze": _unsqueeze, "Concat": _concat, "Split": _split, "Gather": _gather, "GatherElements": _second, "GatherND": _gather_nd,
        "Slice": _slice, "Tile": _tile, "Expand": _expand, "ConstantOfShape": _filled, "Range": _range, "Pad": _pad, "MatMul": _matmul,
        "Gemm": _gemm, "Einsum": _einsum, "ArgMax": _arg, "ArgMin": _arg, "TopK": _top, "NonZero": _nonzero,
        "ai.onnx.ml.FeatureVectorizer": _vectorized,
    }
)  # fmt: skip
