"""Attention as onnxruntime's optimisers fuse it: projections, heads, masks and the mixing of values in one node."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx

from relief_onnx.fused_place import MAIN, Found, Place
from relief_onnx.moves import Barrier
from relief_onnx.sources import Source, trace_constant

__all__ = ["attention", "headed", "length", "multi_head_attention", "whole"]


def attention(place: Place) -> None:
    """One packed projection [in, q + k + v] of x [batch, tokens, in], then attention; with a past, keys and values of before come first."""
    x, weight, bias, past = (place.input(slot) for slot in (0, 1, 2, 4))
    if any(place.values.get(name) for name in ("do_rotary", "past_present_share_buffer")) or place.input(6):
        raise Barrier("it rotates or shares its past, which is not known here")
    if place.rank(1) != 2 or place.size(1, 1) < 0 or place.rank(0) not in (None, 3):
        raise Barrier("its packed weight is no matrix")
    count = int(place.values["num_heads"])
    sizes = [int(size) for size in place.values.get("qkv_hidden_sizes", ())] or [place.size(1, 1) // 3] * 3
    if len(sizes) != 3 or sizes[0] != sizes[1] or sum(sizes) != place.size(1, 1) or any(size % count for size in sizes):
        raise Barrier(f"its sizes {sizes} are not those of {count} heads")
    total = place.op(MAIN, "MatMul", x, weight)
    if bias:
        total = place.op("bias", "Add", total, bias)
    else:
        place.extra[MAIN] = 2
    query, key, value = _split(place, total, sizes)
    widths = [size // count for size in sizes]
    present = place.is_read(1)
    keys, values = headed(place, "k", key, count, widths[1]), headed(place, "v", value, count, widths[2])
    if past:
        before = [place.op(f"past_{name}", "Gather", past, place.constant(f"at_{name}", np.asarray(at, np.int64)), axis=0)
                  for at, name in enumerate("kv")]  # fmt: skip
        keys = place.op("all_k", "Concat", before[0], keys, axis=2)
        values = place.op("all_v", "Concat", before[1], values, axis=2)
    if present:
        both = [place.axes(f"present_{name}", "Unsqueeze", one, 0) for name, one in (("k", keys), ("v", values))]
        place.op("present", "Concat", *both, output=place.output(1), axis=0)
    _mix(place, headed(place, "q", query, count, widths[0]), keys, values, widths, (3, 5), bool(place.values.get("unidirectional", 0)))
    place.rebuild = _packed_again


def _split(place: Place, total: str, sizes: Sequence[int]) -> list[str]:
    if place.graph.opset < 13:
        return list(place.op("split", "Split", total, outputs=3, axis=-1, split=sizes))
    found = place.op("split", "Split", total, place.ints("split/sizes", *sizes), outputs=3, axis=-1)
    place.free.add(("split", 1))
    return list(found)


def headed(place: Place, role: str, x: str, count: int, width: int, output: str = "") -> str:
    """[batch, tokens, heads * width] as [batch, heads, tokens, width]."""
    apart = place.op(role, "Reshape", x, place.ints(f"{role}/sizes", 0, 0, count, width))
    place.free.add((role, 1))
    return str(place.op(f"{role}_turned", "Transpose", apart, output=output, perm=[0, 2, 1, 3]))


def _mix(
    place: Place, query: str, keys: str, values: str, widths: Sequence[int], masks: tuple[int, int], causal: bool
) -> None:  # fmt: skip
    """Softmax of scaled products of queries and keys, plus masks, times values; heads side by side again.

    masks: inputs with the mask of keys and with what is added to the scores.
    """
    turned = place.op("k_again", "Transpose", keys, perm=[0, 1, 3, 2])
    scale = float(place.values.get("scale", 0.0)) or 1 / math.sqrt(widths[0])
    scores = place.op("scores", "MatMul", query, turned)
    scores = place.op("scaled", "Mul", scores, place.number("scale", scale, place.input(0)))
    least = float(place.values.get("mask_filter_value", -10000.0))
    if place.input(masks[0]):
        scores = place.op("masked", "Add", scores, _masked(place, masks[0], keys, least))
    if causal:
        scores = place.op("before", "Add", scores, _later(place, scores, least))
    if place.input(masks[1]):
        scores = place.op("added", "Add", scores, place.input(masks[1]))
    mixed = place.op("mixed", "MatMul", place.op("softmax", "Softmax", scores, axis=-1), values)
    together = place.op("mixed_turned", "Transpose", mixed, perm=[0, 2, 1, 3])
    place.op("together", "Reshape", together, place.ints("together/sizes", 0, 0, -1), output=place.output(0))


def _masked(place: Place, slot: int, keys: str, least: float) -> str:
    """What is added to the scores [batch, heads, queries, keys]: `least` where a key does not count."""
    mask, rank = place.input(slot), place.rank(slot)
    place.need(9, "its mask")
    zero = place.number("counts", 0.0, place.input(0))
    if rank == 1:
        batch = place.graph.dims(place.input(0))
        lengths = place.graph.dims(mask)
        if batch is None or lengths is None or batch[0] != lengths[0]:
            raise Barrier(f"{mask} may list more than the length of each sample")
        place.need(11, "its mask of lengths")
        count = length(place, "keys", keys, 2)
        place_of = place.op("key_places", "Range", whole(place, "first", 0), count, whole(place, "step", 1))
        each = place.axes("lengths", "Unsqueeze", place.op("lengths_long", "Cast", mask, to=onnx.TensorProto.INT64), 1)
        counts, axes = place.op("key_counts", "Less", place_of, each), [1, 2]
    elif rank in (2, 3):
        element = place.graph.types[mask][0]
        none = place.constant("none", np.asarray(0, onnx.helper.tensor_dtype_to_np_dtype(element)))
        counts = mask if element == onnx.TensorProto.BOOL else place.op("key_counts", "Greater", mask, none)
        axes = [1, 2] if rank == 2 else [1]
    else:
        raise Barrier(f"its mask {mask} has {'an unknown number of' if rank is None else rank} axes")
    chosen = place.op("mask", "Where", counts, zero, place.number("least", least, place.input(0)))
    return place.axes("mask_apart", "Unsqueeze", chosen, *axes)


def whole(place: Place, role: str, value: int) -> str:
    """A whole number, stored."""
    return place.constant(role, np.asarray(value, np.int64))


def length(place: Place, role: str, x: str, axis: int) -> str:
    """The size of an axis, as a number."""
    return str(place.op(f"{role}_length", "Gather", place.op(f"{role}_sizes", "Shape", x), whole(place, f"{role}_axis", axis), axis=0))


def _later(place: Place, scores: str, least: float) -> str:
    """`least` where a key comes after its query; queries are the last of the keys."""
    place.need(11, "its causal mask")
    queries, keys = length(place, "row", scores, 2), length(place, "column", scores, 3)
    step, zero = whole(place, "causal_step", 1), whole(place, "causal_first", 0)
    before = place.op("causal_before", "Sub", keys, queries)
    rows = place.op("causal_rows", "Range", before, keys, step)
    columns = place.op("causal_columns", "Range", zero, keys, step)
    later = place.op("causal_later", "Greater", columns, place.axes("causal_each", "Unsqueeze", rows, 1))
    both = (place.number("causal_least", least, place.input(0)), place.number("causal_zero", 0.0, place.input(0)))
    return str(place.op("causal", "Where", later, *both))


def multi_head_attention(place: Place) -> None:
    """Attention of queries, keys and values [batch, tokens, hidden] that are projected before, with one bias for all three.

    Keys and values of before [batch, heads, tokens, size], where given, come first; all of them may be handed on.
    """
    if place.input(8) or place.input(9) or place.is_read(3) or bool(place.input(6)) != bool(place.input(7)):
        raise Barrier("it shares its past or hands on its scores, which is not known here")
    if any(place.rank(slot) != 3 for slot in range(3)):
        raise Barrier("its queries, keys and values are not three tensors of three axes")
    count, sizes = int(place.values["num_heads"]), [place.size(slot, 2) for slot in range(3)]
    if min(sizes) < 1 or sizes[0] != sizes[1] or any(size % count for size in sizes):
        raise Barrier(f"its sizes {sizes} are not those of {count} heads")
    parts = [place.input(slot) for slot in range(3)]
    if place.input(3):
        parts = _biased(place, parts, sizes)
    widths = [size // count for size in sizes]
    # What emits the keys and values that are handed on, where they are.
    given = ["", *(place.output(slot) if place.is_read(slot) else "" for slot in (1, 2))]
    made = ["" if place.input(6) else name for name in given]
    roles = zip("qkv", parts, widths, made, strict=True)
    query, keys, values = (headed(place, role, x, count, width, output) for role, x, width, output in roles)
    if place.input(6):
        keys = place.op("all_k", "Concat", place.input(6), keys, output=given[1], axis=2)
        values = place.op("all_v", "Concat", place.input(7), values, output=given[2], axis=2)
    _mix(place, query, keys, values, widths, (4, 5), bool(place.values.get("unidirectional", 0)))
    place.rebuild = _apart_again


def _biased(place: Place, parts: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """Each part gets its own piece of the packed bias, a stored tensor of its own."""
    source = trace_constant(place.graph, place.input(3))
    if not isinstance(source, Source) or source.path:
        raise Barrier(f"its bias {place.input(3)} is not stored")
    pieces = np.split(place.graph.array(source.name), np.cumsum(sizes)[:-1])
    found = []
    for role, x, piece in zip("qkv", parts, pieces, strict=True):
        place.free.add((f"{role}_bias", 1))
        found.append(place.op(f"{role}_bias", "Add", x, place.constant(f"{role}_bias", piece)))
    return found


def _heads(place: Place, found: Found) -> tuple[int, list[int]] | None:
    """How many heads are left and how wide they are for queries, keys and values; None where they differ."""
    targets = [found.value(role, 1) for role in "qkv"]
    if any(target is None for target in targets):
        return None
    lists = [[int(size) for size in target.reshape(-1)] for target in targets if target is not None]
    if any(sizes[:2] != [0, 0] or len(sizes) != 4 for sizes in lists) or len({sizes[2] for sizes in lists}) > 1:
        return None
    count, widths = lists[0][2], [sizes[3] for sizes in lists]
    if widths[0] != widths[1] or min(count, *widths) < 1:
        return None
    before = [int(size) for size in place.constants[place.parts["q"].input[1]]]
    found.set("num_heads", count)
    if widths[0] != before[3] and not place.values.get("scale"):
        found.set("scale", 1 / math.sqrt(before[3]))
    return count, widths


def _packed_again(place: Place, found: Found) -> bool:
    heads = _heads(place, found)
    if heads is None:
        return False
    count, widths = heads
    sizes = [count * width for width in widths]
    if "qkv_hidden_sizes" in place.values or len(set(sizes)) > 1:
        found.set("qkv_hidden_sizes", sizes)
    return True


def _apart_again(place: Place, found: Found) -> bool:
    if _heads(place, found) is None:
        return False
    if not place.input(3):
        return True
    pieces = [found.value(f"{role}_bias", 1) for role in "qkv"]
    whole = [piece for piece in pieces if piece is not None]
    if len(whole) == 3:
        alone = len(place.graph.uses[place.input(3)]) == 1
        found.node.input[3] = place.input(3) if alone else f"{place.output(0)}/bias"
        found.new[found.node.input[3]] = np.concatenate(whole)
        return True
    joined = f"{place.output(0)}/bias/joined"
    names = [found.parts[f"{role}_bias"].input[1] for role in "qkv"]
    found.before.append(onnx.helper.make_node("Concat", names, [joined], name=joined, axis=0))
    found.node.input[3] = joined
    return True
