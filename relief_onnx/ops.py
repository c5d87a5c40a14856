"""The operator table: what each operator does to channels. Algorithms walk it and never name an operator.

A *picture* of a tensor is an array of the tensor's rank with size 1 on every axis that is not tracked. Three kinds of picture
travel through a graph in the same way: unit numbers (which channel is this), known constants, and whether anybody reads it.
A row says how a node carries pictures from its inputs to its outputs:

* `carry`    moves pictures (Reshape, Concat, pooling ...): a pure function of arrays;
* `mix`      element-wise: inputs are broadcast against each other, so channels that meet must live or die together;
* `affine`   like `mix`, with per-channel parameters on axis 1 (BatchNormalization ...);
* no row     a barrier: the operator may see every channel, so none of its inputs' channels can go.

`constant` says what happens to a channel that is the same everywhere: "kept" unchanged, "computed" by running the operator on it,
"zero" only 0 survives (as 0), "lost".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.graph import Graph, attributes

__all__ = ["OPERATORS", "Barrier", "OperatorRow", "Picture", "row_of"]

Picture = NDArray[Any]
Carry = Callable[[Graph, onnx.NodeProto, Sequence[Picture]], list[Picture]]


class Barrier(Exception):  # noqa: N818  (not an error: a refusal with its reason)
    """A node that cannot carry pictures; the message says why. Always caught by the walk, which pins the channels it touches."""


@dataclass(frozen=True)
class OperatorRow:
    """One operator's effect on channels. `data` are the inputs that carry pictures (None: all).

    `absorbs_zero`: one input that is 0 makes the result 0, whatever the others are (finite, as activations are).
    """

    kind: str
    carry: Carry | None = None
    data: tuple[int, ...] | None = (0,)
    constant: str = "lost"
    absorbs_zero: bool = False


def _same(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
    return [pictures[0]]


def _spatial(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
    """Works inside each channel: axes from 2 on must not be tracked."""
    (picture,) = pictures
    if any(size > 1 for size in picture.shape[2:]):
        raise Barrier("it works over axes whose positions are tracked")
    return [picture]


def _transpose(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
    return [pictures[0].transpose(attributes(node).get("perm"))]


def _static(graph: Graph, name: str) -> tuple[int | None, ...]:
    shape = graph.shape(name)
    if shape is None:
        raise Barrier(f"the shape of {name} is not known")
    return tuple(size if isinstance(size, int) else None for size in shape)


def _reshape(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
    """Axes before the tracked one may be anything; from there on sizes must be known."""
    (picture,) = pictures
    before, after = _static(graph, node.input[0]), _static(graph, node.output[0])
    if len(node.input) > 1 and picture.size > 1 and graph.constant(node.input[1]) is None:
        raise Barrier("its target shape is computed at run time")
    tracked = [axis for axis, size in enumerate(picture.shape) if size > 1]
    if not tracked:
        return [np.full((1,) * len(after), picture.reshape(-1)[0], picture.dtype)]
    for i in range(tracked[0], -1, -1):
        if None in before[i:]:
            break
        total = int(np.prod([size for size in before[i:] if size is not None]))
        for j in range(len(after), -1, -1):
            if None in after[j:]:
                break
            if int(np.prod([size for size in after[j:] if size is not None])) == total:
                full = np.broadcast_to(picture.reshape(picture.shape[i:]), before[i:])  # type: ignore[arg-type]
                return [_squeezed(full.reshape((1,) * j + after[j:]))]  # type: ignore[arg-type, operator]
    raise Barrier("it mixes a tracked axis with one of unknown size")


def _squeezed(picture: Picture) -> Picture:
    """Size 1 again on every axis along which nothing changes."""
    for axis in range(picture.ndim):
        first = picture.take([0], axis)
        if picture.shape[axis] > 1 and bool(np.all(_equal(picture, first))):
            picture = first
    return picture


def _equal(a: Picture, b: Picture) -> NDArray[np.bool_]:
    if a.dtype.kind == "f":
        result: NDArray[np.bool_] = (a == b) | (np.isnan(a) & np.isnan(b))
        return result
    equal: NDArray[np.bool_] = a == b
    return equal


def _axes(graph: Graph, node: onnx.NodeProto, slot: int = 1) -> tuple[int, ...] | None:
    values = attributes(node)
    if "axes" in values:
        return tuple(values["axes"])
    if len(node.input) <= slot or not node.input[slot]:
        return None
    constant = graph.constant(node.input[slot])
    if constant is None:
        raise Barrier("its axes are computed at run time")
    return tuple(int(axis) for axis in constant.reshape(-1))


def _squeeze(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
    (picture,) = pictures
    axes = _axes(graph, node)
    if axes is None:
        axes = tuple(i for i, size in enumerate(_static(graph, node.input[0])) if size == 1)
    return [np.squeeze(picture, tuple(axis % picture.ndim for axis in axes))]


def _unsqueeze(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
    return [np.expand_dims(pictures[0], _axes(graph, node) or ())]


def _concat(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
    axis = attributes(node)["axis"] % pictures[0].ndim
    if all(picture.size == 1 for picture in pictures) and len({picture.item() for picture in pictures}) == 1:
        return [pictures[0]]
    others = [max(picture.shape[i] for picture in pictures) for i in range(pictures[0].ndim)]
    parts = []
    for name, picture in zip(node.input, pictures, strict=True):
        size = _static(graph, name)[axis]
        if size is None:
            raise Barrier(f"the size of {name} along the joined axis is not known")
        parts.append(np.broadcast_to(picture, (*others[:axis], size, *others[axis + 1 :])))
    return [np.concatenate(parts, axis)]


def _split(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
    (picture,) = pictures
    axis = attributes(node).get("axis", 0) % picture.ndim
    if picture.shape[axis] == 1:
        return [picture] * len(node.output)
    sizes = [_static(graph, name)[axis] for name in node.output]
    if None in sizes:
        raise Barrier("the sizes of its parts are not known")
    return list(np.split(picture, np.cumsum(sizes)[:-1], axis))


def _reduce(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
    (picture,) = pictures
    values = attributes(node)
    axes = _axes(graph, node)
    if axes is None:
        axes = tuple(range(picture.ndim)) if not values.get("noop_with_empty_axes", 0) else ()
    axes = tuple(axis % picture.ndim for axis in axes)
    if any(picture.shape[axis] > 1 for axis in axes):
        raise Barrier("it sums over channels")
    return [picture if values.get("keepdims", 1) else np.squeeze(picture, axes)]


def _along_axis(default: int, whole_tail: bool = False) -> Carry:
    """Softmax and the like: the axis (and all after it, for old versions) must not be tracked."""

    def carry(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
        picture = pictures[0]
        tail = whole_tail or graph.opset < 13
        axis = attributes(node).get("axis", 1 if default == -1 and graph.opset < 13 and not whole_tail else default)
        seen = range(axis % picture.ndim, picture.ndim) if tail else (axis % picture.ndim,)
        if any(picture.shape[i] > 1 for i in seen):
            raise Barrier("it looks at all channels together")
        return [picture]

    return carry


def _resize(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
    (picture,) = pictures
    before, after = _static(graph, node.input[0]), graph.shape(node.output[0])
    for axis, size in enumerate(picture.shape):
        if size > 1 and (axis > 1 or after is None or after[axis] != before[axis] or _sizes_are_given(node)):
            raise Barrier("it resizes a tracked axis, or names its size")
    return [picture]


def _sizes_are_given(node: onnx.NodeProto) -> bool:
    return len(node.input) > 3 and bool(node.input[3])


def _pad(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
    (picture,) = pictures
    pads = attributes(node).get("pads")
    if pads is None:
        constant = graph.constant(node.input[1]) if len(node.input) > 1 else None
        if constant is None or (len(node.input) > 3 and node.input[3]):
            raise Barrier("its padding is computed at run time or given for some axes only")
        pads = constant.reshape(-1).tolist()
    if any(size > 1 and (pads[axis] or pads[axis + picture.ndim]) for axis, size in enumerate(picture.shape)):
        raise Barrier("it pads a tracked axis")
    return [picture]


def _flatten(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
    (picture,) = pictures
    axis = attributes(node).get("axis", 1)
    if any(size > 1 for size in picture.shape[:axis]):
        raise Barrier("it flattens a tracked axis into the batch")
    return _reshape(graph, node, pictures)


def _shape(graph: Graph, node: onnx.NodeProto, pictures: Sequence[Picture]) -> list[Picture]:
    """Harmless where only sizes of untracked axes are taken out of the result."""
    (picture,) = pictures
    axes = range(picture.ndim)[attributes(node).get("start", 0) : attributes(node).get("end", picture.ndim)]
    tracked = {place for place, axis in enumerate(axes) if picture.shape[axis] > 1}
    for use in graph.uses.get(node.output[0], []) if tracked else []:
        reader = graph.nodes[use.node]
        take = _TAKEN.get(reader.op_type) if use.slot == 0 else None
        taken = take(graph, reader, len(axes)) if take is not None else None
        if taken is None or taken & tracked:
            raise Barrier(f"{reader.op_type} node {graph.names[use.node]} reads the number of channels")
    return [np.full(1, -1, np.int64).astype(picture.dtype)]


def _gathered(graph: Graph, node: onnx.NodeProto, rank: int) -> set[int] | None:
    indices = graph.constant(node.input[1])
    return None if indices is None else {int(index) % rank for index in indices.reshape(-1)}


def _sliced(graph: Graph, node: onnx.NodeProto, rank: int) -> set[int] | None:
    values = attributes(node)
    parts = [values.get(key) for key in ("starts", "ends", "axes", "steps")]
    for slot, name in enumerate(node.input[1:5]):
        constant = graph.constant(name) if name else None
        if name and constant is None:
            return None
        parts[slot] = None if constant is None else constant.reshape(-1).tolist()
    starts, ends, _, steps = parts
    if starts is None or ends is None:
        return None
    return set(range(rank)[slice(int(starts[0]), int(ends[0]), int(steps[0]) if steps else 1)])


_TAKEN: Mapping[str, Callable[[Graph, onnx.NodeProto, int], set[int] | None]] = {"Gather": _gathered, "Slice": _sliced}


def _rows(names: str, row: OperatorRow) -> dict[str, OperatorRow]:
    return dict.fromkeys(names.split(), row)


OPERATORS: Mapping[str, OperatorRow] = {
    **_rows(
        "LeakyRelu Elu Selu Celu Tanh Softsign HardSwish Mish Gelu Erf Neg Floor Ceil Round Sign Sin Cos Atan Asin Acos "
        "Tan Sinh Cosh Asinh Acosh Atanh Log Reciprocal ThresholdedRelu Shrink Swish "
        "Relu Sigmoid HardSigmoid Softplus Exp Abs Sqrt",
        OperatorRow("mix", constant="computed"),
    ),
    **_rows("Clip Cast", OperatorRow("mix", constant="computed")),
    **_rows("Add Sub Div Pow Max Min Sum Mean", OperatorRow("mix", data=None, constant="computed")),
    **_rows("Mul", OperatorRow("mix", data=None, constant="computed", absorbs_zero=True)),
    **_rows("PRelu", OperatorRow("mix", data=None, constant="computed")),
    **_rows("BatchNormalization", OperatorRow("affine", constant="computed")),
    **_rows("InstanceNormalization", OperatorRow("affine")),
    **_rows("Identity Dropout", OperatorRow("carry", _same, constant="kept")),
    **_rows("MaxPool GlobalAveragePool GlobalMaxPool", OperatorRow("carry", _spatial, constant="kept")),
    **_rows("AveragePool LpPool GlobalLpPool", OperatorRow("carry", _spatial, constant="zero")),
    **_rows("Transpose", OperatorRow("carry", _transpose, constant="kept")),
    **_rows("Reshape", OperatorRow("carry", _reshape, constant="kept")),
    **_rows("Flatten", OperatorRow("carry", _flatten, constant="kept")),
    **_rows("Squeeze", OperatorRow("carry", _squeeze, constant="kept")),
    **_rows("Unsqueeze", OperatorRow("carry", _unsqueeze, constant="kept")),
    **_rows("Concat", OperatorRow("carry", _concat, data=None, constant="kept")),
    **_rows("Split", OperatorRow("carry", _split, constant="kept")),
    **_rows("ReduceMean ReduceMax ReduceMin", OperatorRow("carry", _reduce, constant="kept")),
    **_rows("ReduceSum ReduceL1 ReduceL2 ReduceSumSquare", OperatorRow("carry", _reduce, constant="zero")),
    **_rows("Softmax LogSoftmax", OperatorRow("carry", _along_axis(-1))),
    **_rows("LayerNormalization", OperatorRow("carry", _along_axis(-1, whole_tail=True))),
    **_rows("Resize Upsample", OperatorRow("carry", _resize, constant="zero")),
    **_rows("Pad", OperatorRow("carry", _pad)),
    **_rows("Shape", OperatorRow("carry", _shape)),
}


def row_of(node: onnx.NodeProto) -> OperatorRow | None:
    """The table's row for a node; None makes it a barrier."""
    return OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
