"""Einsum with a stored operand (a dense layer over several axes, as in Keras's attention) laid open as a MatMul with a weight [in, out].

"abc,cde->abde" takes x [a, b, c] to heads [d, e]: the weight is read as [c, de], the result as [a, b, de] and then [a, b, d, e].
"abdc,dce->abde" has a weight for each d, which are laid open as a stack of them is (see `stacked`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray

from relief_onnx.aside import array_of
from relief_onnx.contractions import einsum_labels
from relief_onnx.fused_place import MAIN, Found, Place
from relief_onnx.moves import Barrier
from relief_onnx.sources import Source, trace_constant
from relief_onnx.stacked import added_behind, bias_of, lay_out, names_behind, stack_of, stored_stack

__all__ = ["stored_einsum"]

# Where a constant that was added to the product waits until the Einsum is put back, which has two inputs.
BIAS_SLOT = 2


def stored_einsum(place: Place) -> None:
    """A row of `fused_rows`. Raises Barrier where no operand is stored, or where the product is no layer."""
    stored = [isinstance(trace_constant(place.graph, place.input(slot)), Source) for slot in range(len(place.node.input))]
    if len(stored) != 2 or sum(stored) != 1:
        raise Barrier("it is no product of one tensor and one weight")
    (x, weight), result = einsum_labels(place.graph, place.node)
    if stored[0]:
        x, weight = weight, x
    data, own = place.input(int(stored[0])), int(stored[1])
    inner = [label for label in weight if label not in result]
    made = [label for label in result if label not in x]
    kept = [label for label in x if label not in weight]
    each = [label for label in weight if label in x and label in result]
    if not inner or not made:
        raise Barrier("its weight is no matrix: each number of it meets one of the input, or makes one of the output")
    whole = ((*inner, *each, *made), weight), ((*inner, *each, *kept), x), ((*kept, *each, *made), result)
    if any(sorted(found) != sorted(labels) for found, labels in whole):
        raise Barrier("it adds up an axis of its input or of its weight alone")
    sizes = {label: place.size(own, axis) for axis, label in enumerate(weight)}
    if min(sizes.values()) < 1:
        raise Barrier("the shape of its weight is not known")
    order, turned = [*kept, *each, *made], [*kept, *each, *made] != list(result)
    spread = len(each) > 1 or len(made) > 1
    output = "" if turned or spread else place.output(0)
    names = names_behind(place)
    if each:
        stack = stored_stack(place, own).transpose([weight.index(label) for label in (*each, *inner, *made)])
        stack = stack.reshape([math.prod(sizes[label] for label in part) for part in (each, inner, made)])
        rows = _grouped(place, data, list(x), kept, each, inner, sizes)
        y = lay_out(place, rows, len(kept), place.input(own), stack, 0, len(kept), output)
        place.rebuild = partial(_stacked, own=own, weight=weight, parts=(each, inner, made), result=result, sizes=sizes, names=names)
    else:
        columns = _joined(place, "weight", place.input(own), list(weight), inner, made, sizes)
        rows = _joined(place, "rows", data, list(x), kept, inner, sizes)
        y = place.op(MAIN, "MatMul", rows, columns, output=output)
        if turned or spread:
            place.extra[MAIN] = BIAS_SLOT
            place.rebuild = partial(_rebuilt, made=made, result=result, sizes=sizes, names=names)
    if spread:
        shape = place.ints("spread/shape", *[0] * len(kept), *(sizes[label] for label in (*each, *made)))
        y = place.op("spread", "Reshape", y, shape, output="" if turned else place.output(0))
    if turned:
        place.op("turned", "Transpose", y, perm=[order.index(label) for label in result], output=place.output(0))


def _rebuilt(
    place: Place, found: Found, made: Sequence[str], result: Sequence[str], sizes: Mapping[str, int], names: tuple[str, str]
) -> bool:
    """A bias that the layer got is added to what the Einsum emits, along the axes of its result."""
    if MAIN not in found.biases:
        return True
    bias = found.constants.get(found.node.input.pop(BIAS_SLOT))
    if bias is None or math.prod(bias.dims) != math.prod(sizes[label] for label in made):
        return False
    added_behind(place, found, _as_result(array_of(bias), made, result, sizes), names)
    return True


def _stacked(
    place: Place, found: Found, own: int, weight: Sequence[str], parts: Sequence[Sequence[str]], result: Sequence[str],
    sizes: Mapping[str, int], names: tuple[str, str],
) -> bool:  # fmt: skip
    """The matrices of all groups as the weight again, if it has axes for their sizes, and what was added to their products behind it."""
    each, inner, made = parts
    stack = stack_of(found, math.prod(sizes[label] for label in each))
    bias = None if stack is None else bias_of(found, stack)
    if stack is None or bias is None:
        return False
    now = dict(sizes)
    for part, size in ((inner, stack.shape[1]), (made, stack.shape[2])):
        if len(part) > 1 and size != math.prod(sizes[label] for label in part):
            return False
        now |= {part[0]: size} if len(part) == 1 else {}
    order = [*each, *inner, *made]
    found.new[place.input(own)] = stack.reshape([now[label] for label in order]).transpose([order.index(label) for label in weight])
    if found.biases:
        added_behind(place, found, _as_result(bias, [*each, *made], result, now), names)
    return True


def _as_result(value: NDArray[Any], labels: Sequence[str], result: Sequence[str], sizes: Mapping[str, int]) -> NDArray[Any]:
    """Numbers for all entries of some axes, in their order, as a tensor that can be added to the result."""
    turned = value.reshape([sizes[label] for label in labels]).transpose([labels.index(label) for label in result if label in labels])
    return turned.reshape([sizes[label] if label in labels else 1 for label in result])


def _grouped(place: Place, x: str, labels: list[str], kept: list[str], each: list[str], inner: list[str], sizes: Mapping[str, int]) -> str:
    """x with axes [*kept, groups, in]."""
    order = [*kept, *each, *inner]
    if order != labels:
        x = place.op("rows/turned", "Transpose", x, perm=[labels.index(label) for label in order])
    if len(each) == len(inner) == 1:
        return x
    shape = [math.prod(sizes[label] for label in part) for part in (each, inner)]
    return str(place.op("rows", "Reshape", x, place.ints("rows/shape", *[0] * len(kept), *shape)))


def _joined(place: Place, role: str, tensor: str, labels: list[str], first: list[str], last: list[str], sizes: dict[str, int]) -> str:
    """The tensor with axes [*first, *last], those of the weight joined to one: all of `first` where they are its own, and `last`."""
    order = [*first, *last]
    if order != labels:
        tensor = place.op(f"{role}/turned", "Transpose", tensor, perm=[labels.index(label) for label in order])
    if role == "weight":
        shape = [math.prod(sizes[label] for label in part) for part in (first, last)]
        many = len(first) > 1 or len(last) > 1
    else:
        shape, many = [*[0] * len(first), math.prod(sizes[label] for label in last)], len(last) > 1
    return str(place.op(role, "Reshape", tensor, place.ints(f"{role}/shape", *shape))) if many else tensor
