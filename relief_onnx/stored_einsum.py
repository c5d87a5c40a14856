"""Einsum with a stored operand (a dense layer over several axes, as in Keras's attention) laid open as a MatMul with a weight [in, out].

"abc,cde->abde" takes x [a, b, c] to heads [d, e]: the weight is read as [c, de], the result as [a, b, de] and then [a, b, d, e].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from onnx import helper

from relief_onnx.aside import array_of
from relief_onnx.contractions import einsum_labels
from relief_onnx.fused_place import MAIN, Found, Place
from relief_onnx.moves import Barrier
from relief_onnx.sources import Source, trace_constant

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
    if sorted((*inner, *made)) != sorted(weight) or not inner or not made:
        raise Barrier("an axis of its weight is one of its input and of its output too")
    if sorted((*inner, *kept)) != sorted(x) or sorted((*kept, *made)) != sorted(result):
        raise Barrier("it adds up an axis of its input or of its weight alone")
    sizes = {label: place.size(own, axis) for axis, label in enumerate(weight)}
    if min(sizes.values()) < 1:
        raise Barrier("the shape of its weight is not known")
    columns = _joined(place, "weight", place.input(own), list(weight), inner, made, sizes)
    rows = _joined(place, "rows", data, list(x), kept, inner, sizes)
    turned = [*kept, *made] != list(result)
    spread = len(made) > 1
    y = place.op(MAIN, "MatMul", rows, columns, output="" if turned or spread else place.output(0))
    if spread:
        shape = place.ints("spread/shape", *[0] * len(kept), *(sizes[label] for label in made))
        y = place.op("spread", "Reshape", y, shape, output="" if turned else place.output(0))
    if turned:
        order = [*kept, *made]
        place.op("turned", "Transpose", y, perm=[order.index(label) for label in result], output=place.output(0))
    if turned or spread:
        place.extra[MAIN] = BIAS_SLOT
        names = [place.unused(f"{place.output(0)}/{what}") for what in ("product", "bias")]
        place.rebuild = partial(_rebuilt, made=made, result=result, sizes=sizes, names=names)


def _rebuilt(
    place: Place, found: Found, made: Sequence[str], result: Sequence[str], sizes: Mapping[str, int], names: Sequence[str]
) -> bool:
    """A bias that the layer got is added to what the Einsum emits, along the axes of its result."""
    if MAIN not in found.biases:
        return True
    bias = found.constants.get(found.node.input.pop(BIAS_SLOT))
    if bias is None or math.prod(bias.dims) != math.prod(sizes[label] for label in made):
        return False
    turned = array_of(bias).reshape([sizes[label] for label in made])
    turned = turned.transpose([made.index(label) for label in result if label in made])
    tensor, name = names
    found.new[name] = turned.reshape([sizes[label] if label in made else 1 for label in result])
    found.after.append(helper.make_node("Add", [tensor, name], [place.output(0)], name=f"{place.name}/bias"))
    found.node.output[0] = tensor
    return True


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
