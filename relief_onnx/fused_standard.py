"""ONNX's own Attention and RotaryEmbedding (opset 23 and later) laid open: heads, masks, past and turned heads as plain operators."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from relief_onnx.fused_attention import headed, length, whole
from relief_onnx.fused_groups import counts_left, handed_on, heads_again, mixed, scored
from relief_onnx.fused_place import Found, Place
from relief_onnx.fused_rotary import turned_heads
from relief_onnx.moves import Barrier

__all__ = ["attention", "rotary_embedding"]

# The least number, which stands for keys that do not count: in masks onnxruntime takes it for -inf. By element type, else that of floats.
_LEAST: Mapping[int, float] = {
    onnx.TensorProto.FLOAT16: float(np.finfo(np.float16).min), onnx.TensorProto.DOUBLE: float(np.finfo(np.float64).min),
}  # fmt: skip
_WINDOWS = ("left_window_size", "right_window_size")
_MASK, _PAST, _FILLED, _SCORES = 3, (4, 5), 6, 3


def attention(place: Place) -> None:
    """Queries, keys and values [batch, tokens, heads * size] or [batch, heads, tokens, size]; heads of queries share those of keys."""
    if place.is_read(_SCORES):
        raise Barrier("it hands on its scores, which is not known here")
    if any(place.values.get(name, -1) >= 0 for name in _WINDOWS):
        raise Barrier("it has a window, which is not known here")
    if bool(place.input(_PAST[0])) != bool(place.input(_PAST[1])):
        raise Barrier("it has keys of before without values, or values without keys")
    heads, groups, widths = _sizes(place)
    flat = place.rank(0) == 3
    if flat:
        query = place.op("q", "Reshape", place.input(0), place.ints("q/sizes", 0, 0, groups, heads // groups, widths[0]))
        query = place.op("q_turned", "Transpose", query, perm=[0, 2, 3, 1, 4])
        keys, values = (headed(place, role, place.input(slot), groups, widths[slot]) for slot, role in ((1, "k"), (2, "v")))
    else:
        query = place.op("q", "Reshape", place.input(0), place.ints("q/sizes", 0, groups, heads // groups, -1, widths[0]))
        keys, values = place.input(1), place.input(2)
    if place.input(_PAST[0]):
        keys = place.op("all_k", "Concat", place.input(_PAST[0]), keys, axis=2)
        values = place.op("all_v", "Concat", place.input(_PAST[1]), values, axis=2)
    handed_on(place, keys, values)
    scores = scored(place, query, keys, widths[0])
    mask, conditions = _mask(place, heads, groups), _near(place, scores)
    if mask and _is_flags(place):
        conditions.append(mask)
    elif mask:
        scores = place.op("masked", "Add", scores, mask)
        if not _is_finite(place):
            conditions.append(place.op("mask_counts", "Greater", mask, _least(place)))
    context = mixed(place, _softmax(place, scores, conditions), values)
    if flat:
        context = place.op("mixed_turned", "Transpose", context, perm=[0, 3, 1, 2, 4])
    sizes = (0, 0, -1) if flat else (0, heads, -1, widths[2])
    place.op("together", "Reshape", context, place.ints("together/sizes", *sizes), output=place.output(0))
    place.free |= {("q", 1), ("k", 1), ("v", 1), ("together", 1)}
    place.rebuild = _again


def _sizes(place: Place) -> tuple[int, int, list[int]]:
    """Heads of queries, heads of keys and values, and how wide heads of queries, keys and values are."""
    ranks = {place.rank(slot) for slot in range(3)}
    if ranks == {3}:
        counts = [int(place.values.get(name, 0)) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
        widths = [place.size(slot, 2) // max(count, 1) for slot, count in enumerate(counts)]
        fits = all(place.size(slot, 2) == count * width for slot, (count, width) in enumerate(zip(counts, widths, strict=True)))
    elif ranks == {4}:
        counts, widths = ([place.size(slot, axis) for slot in range(3)] for axis in (1, 3))
        fits = counts[1] == counts[2]
    else:
        raise Barrier("its queries, keys and values are not three tensors of three axes or of four")
    if min(*counts, *widths) < 1 or widths[0] != widths[1] or counts[0] % counts[1] or not fits:
        raise Barrier(f"its heads {counts} of sizes {widths} do not fit each other, or are not known")
    return counts[0], counts[1], widths


def _is_flags(place: Place) -> bool:
    return place.graph.types[place.input(_MASK)][0] == onnx.TensorProto.BOOL


def _is_finite(place: Place) -> bool:
    stored = place.graph.constant(place.input(_MASK))
    return stored is not None and bool((stored > _least_of(place)).all())


def _mask(place: Place, heads: int, groups: int) -> str:
    """The mask [queries, keys], [heads, queries, keys] or [batch, heads, queries, keys] with an axis for groups of heads; or nothing."""
    name, rank = place.input(_MASK), place.rank(_MASK)
    if not name or rank == 2:
        return name
    if rank not in (3, 4):
        raise Barrier(f"its mask {name} has {'an unknown number of' if rank is None else rank} axes")
    if groups not in (1, heads) and place.size(_MASK, rank - 3) != 1:
        raise Barrier(f"its mask {name} tells heads apart that share keys and values")
    return place.axes("mask_apart", "Unsqueeze", name, rank - 3 if groups == 1 else rank - 2)


def _near(place: Place, scores: str) -> list[str]:
    """Which keys each query may see by their places [.., queries, keys], as flags to be met all."""
    filled, causal = place.input(_FILLED), bool(place.values.get("is_causal", 0))
    if not causal and not filled:
        return []
    queries, keys = length(place, "rows", scores, 3), length(place, "columns", scores, 4)
    zero, one = whole(place, "first", 0), whole(place, "step", 1)
    columns = place.op("columns", "Range", zero, keys, one)
    flags = []
    if filled:
        filled = place.axes("filled", "Unsqueeze", filled, 1, 2, 3, 4)
        flags.append(place.op("is_filled", "Less", columns, filled))
    if causal:
        rows = place.axes("rows_apart", "Unsqueeze", place.op("rows", "Range", zero, queries, one), 1)
        if place.input(_PAST[0]):
            rows = place.op("rows_after", "Add", rows, length(place, "before", place.input(_PAST[0]), 2))
        elif filled:
            rows = place.op("rows_after", "Add", rows, place.op("before", "Sub", filled, queries))
        flags.append(place.op("is_before", "LessOrEqual", columns, rows))
    return flags


def _softmax(place: Place, scores: str, conditions: list[str]) -> str:
    """Shares of the keys that meet all conditions; a query that none of them meets has no shares."""
    if not conditions:
        return _precise(place, scores)
    counts = conditions[0]
    for number, other in enumerate(conditions[1:]):
        counts = place.op(f"counts{number}", "And", counts, other)
    shares = _precise(place, place.op("seen", "Where", counts, scores, _least(place)))
    return str(place.op("shares", "Where", counts, shares, place.number("none", 0.0, place.input(0))))


def _least_of(place: Place) -> float:
    return _LEAST.get(place.graph.types[place.input(0)][0], float(np.finfo(np.float32).min))


def _least(place: Place) -> str:
    return place.number("least", _least_of(place), place.input(0))


def _precise(place: Place, scores: str) -> str:
    """Softmax, in the element type that the node names."""
    own = place.graph.types[place.input(0)][0]
    inner = int(place.values.get("softmax_precision", 0)) or own
    if inner == own:
        return str(place.op("softmax", "Softmax", scores, axis=-1))
    wide = place.op("softmax", "Softmax", place.op("widened", "Cast", scores, to=inner), axis=-1)
    return str(place.op("narrowed", "Cast", wide, to=own))


def _again(place: Place, found: Found) -> bool:
    return heads_again(place, found, ("q_num_heads", "kv_num_heads"), narrower=True)


def rotary_embedding(place: Place) -> None:
    """Pairs of entries of each head [batch, tokens, heads * size] or [batch, heads, tokens, size], turned by angles of each token."""
    flat = place.rank(0) == 3
    if place.rank(0) not in (3, 4):
        raise Barrier(f"{place.input(0)} has not three axes, nor four")
    count = int(place.values.get("num_heads", 0)) if flat else place.size(0, 1)
    width = place.size(0, 2) // max(count, 1) if flat else place.size(0, 3)
    size = int(place.values.get("rotary_embedding_dim", 0)) or width
    if min(count, width) < 1 or (flat and place.size(0, 2) != count * width) or size > width or size % 2:
        raise Barrier(f"its heads, {count} of size {width}, are not known or cannot be turned in pairs")
    turns = [place.input(1), place.input(2)]
    if place.input(3):
        turns = [place.op(f"turn_{name}", "Gather", turn, place.input(3), axis=0) for name, turn in zip(("cos", "sin"), turns, strict=True)]
    sizes = (0, 0, count, width) if flat else (0, count, -1, width)
    heads, interleaved = place.op("heads", "Reshape", place.input(0), place.ints("heads/sizes", *sizes)), place.values.get("interleaved", 0)
    end = "" if flat else place.output(0)
    heads = turned_heads(place, "x", heads, turns, (2,) if flat else (1,), (size, width), bool(interleaved), end)
    if flat:
        place.op("together", "Reshape", heads, place.ints("together/sizes", 0, 0, -1), output=place.output(0))
    place.free.add(("heads", 1))
    place.rebuild = _turned_again


def _turned_again(place: Place, found: Found) -> bool:
    left = counts_left(place, found, "heads")
    if not left or left[-1] != place.constants[place.parts["heads"].input[1]][-1]:
        return False
    if place.values.get("num_heads"):
        found.set("num_heads", left[0])
    return True
