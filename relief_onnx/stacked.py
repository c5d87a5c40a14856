"""Products with a stack of weights, one for each group of rows (experts, ensembles, heads), laid open as one MatMul for each of them.

x [..., groups, rows, in] times W [groups, in, out]: x is split along its groups (or read by all of them, where it has none), each part
meets its own matrix, and the results are joined again. Where all matrices keep their shapes alike, they are put back as one stack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from relief_onnx.aside import array_of
from relief_onnx.fused_place import Found, Place
from relief_onnx.moves import Barrier

__all__ = ["added_behind", "bias_of", "lay_out", "names_behind", "stack_of", "stacked_matmul", "stored_stack"]

# Weights of one node that are laid open.
MOST = 512
# From here on constants that were added to the products wait until the node is put back, which has two inputs.
BIAS_SLOT = 2


def stacked_matmul(place: Place) -> None:
    """A row of `fused_rows`. Raises Barrier, without a reason where this is no stack of weights."""
    stack = place.graph.initializers.get(place.input(1))
    many = [size for size in stack.dims[:-2] if size != 1] if stack is not None else []
    if stack is None or not many:
        raise Barrier("")
    shape, rank = list(stack.dims), place.rank(0)
    if len(many) > 1:
        raise Barrier("there are groups along several axes")
    if rank is None or rank < 2:
        raise Barrier("the shape of its input is not known")
    value = stored_stack(place, 1).reshape(-1, *shape[-2:])
    back = len(shape) - shape.index(many[0])  # the axis of the groups, from the end
    own, result = 1 if rank < back else place.size(0, rank - back), max(rank, len(shape))
    if own not in (1, many[0]):
        raise Barrier("how many groups of rows its input has is not known")
    lay_out(place, place.input(0), None if own == 1 else rank - back, place.input(1), value, result - rank, result - back, place.output(0))
    place.rebuild = partial(_rebuilt, lead=shape[:-2], back=back, names=names_behind(place))


def stored_stack(place: Place, slot: int) -> NDArray[Any]:
    """The weight that a node reads there. Raises Barrier where it cannot be taken apart."""
    name = place.input(slot)
    stored = place.graph.initializers.get(name)
    if stored is None or len(place.graph.uses[name]) > 1 or place.graph.is_output(name):
        raise Barrier("its weight, one for each group of rows, is computed, or others read it too")
    return array_of(stored)


def lay_out(place: Place, x: str, axis: int | None, weight: str, value: NDArray[Any], missing: int, joined: int, output: str = "") -> str:
    """Parts for x times each of the matrices `value` [groups, in, out], which are named after `weight`. Raises Barrier.

    axis: of the groups in x; None: all matrices meet the whole of it. missing: axes that the results have in front of those of x.
    joined: the axis of the groups in the result.
    """
    groups = len(value)
    if groups > MOST:
        raise Barrier(f"there are {groups} groups of rows; up to {MOST} are laid open")
    products = []
    for group, part in enumerate([x] * groups if axis is None else _split(place, x, axis, groups)):
        name, role = place.unused(f"{weight}/{group}"), str(group)
        place.constants[name] = value[group]
        place.free.add((role, 1))
        place.extra[role] = BIAS_SLOT + group
        y = place.op(role, "MatMul", part, name)
        products.append(place.axes(f"{group}/rank", "Unsqueeze", y, *range(missing)) if missing else y)
    return str(place.op("joined", "Concat", *products, axis=joined, output=output))


def stack_of(found: Found, groups: int) -> NDArray[Any] | None:
    """The matrices as they are now [groups, in, out]; None where their shapes differ, or one of them is no stored tensor any more."""
    values = [found.value(str(group), 1) for group in range(groups)]
    there = [value for value in values if value is not None and values[0] is not None and value.shape == values[0].shape]
    return np.stack(there) if len(there) == groups else None


def bias_of(found: Found, stack: NDArray[Any]) -> NDArray[Any] | None:
    """What was added to the products [groups, out]; None where that is no vector. The node then has its own two inputs again."""
    del found.node.input[BIAS_SLOT:]
    result = np.zeros((len(stack), stack.shape[2]), stack.dtype)
    for role, name in found.biases.items():
        stored = found.constants.get(name)
        value = None if stored is None else array_of(stored)
        if value is None or value.size != stack.shape[2]:
            return None
        result[int(role)] = value.reshape(-1)
    return result


def names_behind(place: Place) -> tuple[str, str]:
    """Kept free for `added_behind`: what the node emits, and a constant that is added to it."""
    return place.unused(f"{place.output(0)}/product"), place.unused(f"{place.output(0)}/bias")


def added_behind(place: Place, found: Found, value: NDArray[Any], names: tuple[str, str]) -> None:
    """Add a constant to what the node emits."""
    tensor, name = names
    found.new[name] = value
    found.after.append(helper.make_node("Add", [tensor, name], [place.output(0)], name=f"{place.name}/bias"))
    found.node.output[0] = tensor


def _split(place: Place, x: str, axis: int, groups: int) -> list[str]:
    if place.graph.opset < 13:
        return list(place.op("split", "Split", x, outputs=groups, axis=axis, split=[1] * groups))
    return list(place.op("split", "Split", x, place.ints("split/sizes", *[1] * groups), outputs=groups, axis=axis))


def _rebuilt(place: Place, found: Found, lead: Sequence[int], back: int, names: tuple[str, str]) -> bool:
    """The matrices as one stack, and what was added to their products behind it."""
    stack = stack_of(found, math.prod(lead))
    bias = None if stack is None else bias_of(found, stack)
    if stack is None or bias is None:
        return False
    found.new[place.input(1)] = stack.reshape(*lead, *stack.shape[1:])
    if found.biases:
        added_behind(place, found, bias.reshape(len(bias), *[1] * (back - 2), -1), names)
    return True
