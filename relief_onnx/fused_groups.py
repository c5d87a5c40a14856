"""GroupQueryAttention of onnxruntime laid open: several heads of queries share each head of keys and values.

Keys and values of before come first, then those of this call, whatever the lengths of the samples; what a sample has none of is masked, so
the output is that of the fused node. What is handed on lies as the node has it where all samples are as long as what came before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx

from relief_onnx.fused_attention import headed, length, whole
from relief_onnx.fused_place import MAIN, Found, Place
from relief_onnx.fused_rotary import turned_heads
from relief_onnx.moves import Barrier

__all__ = ["counts_left", "group_query_attention", "handed_on", "heads_again", "mixed", "scored"]

_PAST, _LENGTHS, _TOTAL, _CACHES, _PLACES = (3, 4), 5, 6, (7, 8), 9
_UNKNOWN = {10: "adds to its scores", 11: "has sinks", 12: "has rounded keys", 13: "has rounded values"}
_ODD = ("smooth_softmax", "qk_output")
_LEAST = 11
_NEVER = -1e9  # added to scores of keys that do not count


def group_query_attention(place: Place) -> None:
    """Queries [batch, tokens, heads * size], keys and values [batch, tokens, groups * size], or all side by side; lengths less one."""
    place.need(_LEAST, "what stands for it")
    said = [why for slot, why in _UNKNOWN.items() if place.input(slot)]
    said += [f"has {name}" for name in _ODD if place.values.get(name) not in (None, 0, 0.0, -1)]
    said += ["has a window of nothing"] if place.values.get("local_window_size") == 0 else []
    if said:
        raise Barrier(f"it {said[0]}, which is not known here")
    if not all(place.input(slot) for slot in (_LENGTHS, _TOTAL)) or bool(place.input(1)) != bool(place.input(2)):
        raise Barrier("it has no lengths, or keys without values")
    packed = not place.input(1)
    if any(place.rank(slot) != 3 for slot in range(1 if packed else 3)):
        raise Barrier("its queries, keys and values are not tensors of three axes")
    heads, groups = int(place.values["num_heads"]), int(place.values["kv_num_heads"])
    sizes = [place.size(slot, 2) for slot in range(3)]
    if packed:
        sizes = [sizes[0] // (heads + 2 * groups) * count for count in (heads, groups, groups)]
    width = sizes[0] // heads
    fits = not packed or sum(sizes) == place.size(0, 2)
    if min(sizes) < 1 or sizes[1] != sizes[2] or sizes[0] != heads * width or sizes[1] != groups * width or heads % groups or not fits:
        raise Barrier(f"its sizes {sizes} are not those of {heads} heads in {groups} groups")
    rotates = bool(place.values.get("do_rotary", 0))
    turned = (2 * place.size(_CACHES[0], 1), width)
    if rotates and (place.input(_PLACES) or not 0 < turned[0] <= width):
        raise Barrier("it rotates by places that are given, or how much of each head it rotates is not known")
    if place.input(_PAST[0]) and not (place.output(1) and place.output(2)):
        raise Barrier("it has a past and hands nothing on")
    parts = _split(place, sizes) if packed else [place.input(slot) for slot in range(3)]
    query = place.op("q", "Reshape", parts[0], place.ints("q/sizes", 0, 0, groups, heads // groups, width))
    query = place.op("q_turned", "Transpose", query, perm=[0, 2, 3, 1, 4])
    keys, values = (headed(place, name, parts[slot], groups, width) for name, slot in (("k", 1), ("v", 2)))
    tokens = length(place, "tokens", place.input(0), 1)
    # [batch], or [batch, 1] as some exporters write them.
    lengths = place.op("lengths", "Cast", place.input(_LENGTHS), to=onnx.TensorProto.INT64)
    lengths = place.op("lengths_line", "Reshape", lengths, place.ints("lengths_line/sizes", -1))
    before = place.op("past", "Sub", place.op("past_end", "Add", lengths, whole(place, "one", 1)), tokens)
    # The longest sample never has less; so that the node's input is read.
    longest = place.op("longest", "Cast", place.input(_TOTAL), to=onnx.TensorProto.INT64)
    before = place.op("past_most", "Min", place.op("past_counts", "Max", before, whole(place, "none", 0)), longest)
    before = place.axes("past_apart", "Unsqueeze", before, 1)
    steps = place.op("steps", "Range", whole(place, "first", 0), tokens, whole(place, "step", 1))
    places = place.op("places", "Add", before, steps)
    if rotates:
        names = zip(("cos", "sin"), _CACHES, strict=True)
        turns = [place.op(f"turn_{name}", "Gather", place.input(slot), places, axis=0) for name, slot in names]
        interleaved = bool(place.values.get("rotary_interleaved", 0))
        query = turned_heads(place, "q", query, turns, (1, 2), turned, interleaved)
        keys = turned_heads(place, "k", keys, turns, (1,), turned, interleaved)
    if all(place.input(slot) for slot in _PAST):
        keys = place.op("all_k", "Concat", place.input(_PAST[0]), keys, axis=2)
        values = place.op("all_v", "Concat", place.input(_PAST[1]), values, axis=2)
    handed_on(place, keys, values)
    scores = scored(place, query, keys, width)
    scores = place.op("masked", "Add", scores, _mask(place, keys, tokens, before, places))
    context = mixed(place, place.op("softmax", "Softmax", scores, axis=-1), values)
    together = place.op("mixed_turned", "Transpose", context, perm=[0, 3, 1, 2, 4])
    place.op("together", "Reshape", together, place.ints("together/sizes", 0, 0, -1), output=place.output(0))
    place.free |= {("q", 1), ("k", 1), ("v", 1)}
    place.rebuild = _again


def _split(place: Place, sizes: Sequence[int]) -> list[str]:
    """Queries, keys and values that come side by side."""
    place.need(13, "its packed queries, keys and values")
    place.free.add(("split", 1))
    return list(place.op("split", "Split", place.input(0), place.ints("split/sizes", *sizes), outputs=3, axis=-1))


def scored(place: Place, query: str, keys: str, width: int) -> str:
    """Scores [batch, groups, heads of a group, queries, keys] from queries laid out so and keys [batch, groups, keys, size]."""
    turned = place.op("k_again", "Transpose", place.axes("k_apart", "Unsqueeze", keys, 2), perm=[0, 1, 2, 4, 3])
    scores = place.op(MAIN, "MatMul", query, turned)
    scale = float(place.values.get("scale", 0.0)) or 1 / math.sqrt(width)
    scores = place.op("scaled", "Mul", scores, place.number("scale", scale, place.input(0)))
    cap = float(place.values.get("softcap", 0.0))
    if not cap:
        return str(scores)
    limit = place.number("cap", cap, place.input(0))
    return str(place.op("capped", "Mul", place.op("bent", "Tanh", place.op("uncapped", "Div", scores, limit)), limit))


def mixed(place: Place, shares: str, values: str) -> str:
    """Values [batch, groups, keys, size] mixed by those shares: [batch, groups, heads of a group, queries, size]."""
    return str(place.op("mixed", "MatMul", shares, place.axes("v_apart", "Unsqueeze", values, 2)))


def handed_on(place: Place, keys: str, values: str) -> None:
    """Keys and values as outputs 1 and 2, where they are read."""
    for slot, role, states in ((1, "k", keys), (2, "v", values)):
        if place.is_read(slot):
            place.op(f"present_{role}", "Identity", states, output=place.output(slot))


def _mask(place: Place, keys: str, tokens: str, before: str, places: str) -> str:
    """What is added to the scores [batch, groups, heads, queries, keys]: nothing for the sample's own keys up to the query's place.

    before: how many each sample [batch, 1] has of what came before. places: of the queries [batch, queries].
    """
    every = length(place, "keys", keys, 2)
    columns = place.op("columns", "Range", whole(place, "columns_first", 0), every, whole(place, "columns_step", 1))
    space = place.op("space", "Sub", every, tokens)
    old = place.op("old", "Less", columns, place.axes("space_apart", "Unsqueeze", space, 0))
    own = place.op("own_places", "Add", place.op("own", "Sub", columns, space), before)
    at = place.axes("keys_at", "Unsqueeze", place.op("key_places", "Where", old, columns, own), 1)  # [batch, 1, keys]
    held = place.op("held", "Or", place.op("new", "Not", old), place.op("filled", "Less", columns, before))
    rows = place.axes("rows", "Unsqueeze", places, 2)
    up_to = place.op("up_to", "Not", place.op("later", "Greater", at, rows))
    counts = place.op("counts", "And", place.axes("held_apart", "Unsqueeze", held, 1), up_to)  # [batch, queries, keys]
    window = int(place.values.get("local_window_size", -1))
    if window >= 0:
        near = place.op("near", "Greater", place.op("reach", "Add", at, whole(place, "window", window)), rows)
        counts = place.op("counts_near", "And", counts, near)
    zero, never = place.number("zero", 0.0, place.input(0)), place.number("never", _NEVER, place.input(0))
    return place.axes("mask", "Unsqueeze", place.op("added", "Where", counts, zero, never), 1, 2)


def counts_left(place: Place, found: Found, role: str) -> list[int]:
    """The numbers of heads, and their size, that a Reshape of that role names now; nothing where it says other things than before."""
    now, before = found.value(role, 1), place.constants[place.parts[role].input[1]]
    if now is None or not np.array_equal(np.minimum(now, 1), np.minimum(before, 1)):
        return []
    return [int(size) for size in now if size > 0]


def heads_again(place: Place, found: Found, names: tuple[str, str], narrower: bool) -> bool:
    """Set how many heads of queries and of keys are left: whole groups may have gone, or as many heads of each.

    narrower: whether heads may have another size than before; scores are then scaled as they were. False where parts do not agree.
    """
    left = [counts_left(place, found, role) for role in "qkv" if role in found.parts]
    before = int(place.constants[place.parts["q"].input[1]][-1])
    if not all(left) or len({sizes[0] for sizes in left}) > 1 or (not narrower and {sizes[-1] for sizes in left} != {before}):
        return False
    groups, heads, width = left[0]
    if any(sizes[-1] != width for sizes in left[1:2]):
        return False
    for name, count in zip(names, (groups * heads, groups), strict=True):
        if place.values.get(name):  # with heads apart none or 0 is no number of heads
            found.set(name, count)
    if width != before and not place.values.get("scale"):
        found.set("scale", 1 / math.sqrt(before))
    return True


def _again(place: Place, found: Found) -> bool:
    return heads_again(place, found, ("num_heads", "kv_num_heads"), narrower=False)
