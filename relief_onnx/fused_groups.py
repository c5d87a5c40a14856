"""GroupQueryAttention of onnxruntime laid open: several heads of queries share each head of keys and values.

Keys and values of before come first, then those of this call, whatever the lengths of the samples; what a sample has none of is masked, so
the output is that of the fused node. What is handed on lies as the node has it where all samples are as long as what came before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx

from relief_onnx.fused_place import MAIN, Found, Place
from relief_onnx.moves import Barrier

__all__ = ["group_query_attention"]

_PAST, _LENGTHS, _TOTAL, _CACHES, _PLACES = (3, 4), 5, 6, (7, 8), 9
_UNKNOWN = {10: "adds to its scores", 11: "has sinks", 12: "has rounded keys", 13: "has rounded values"}
_ODD = ("local_window_size", "softcap", "smooth_softmax", "qk_output", "rotary_interleaved")
_LEAST = 11
_NEVER = -1e9  # added to scores of keys that do not count


def group_query_attention(place: Place) -> None:
    """Queries [batch, tokens, heads * size], keys and values [batch, tokens, groups * size], or all side by side; lengths less one."""
    place.need(_LEAST, "what stands for it")
    said = [why for slot, why in _UNKNOWN.items() if place.input(slot)]
    said += [f"has {name}" for name in _ODD if place.values.get(name) not in (None, 0, 0.0, -1)]
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
    whole = not packed or sum(sizes) == place.size(0, 2)
    if min(sizes) < 1 or sizes[1] != sizes[2] or sizes[0] != heads * width or sizes[1] != groups * width or heads % groups or not whole:
        raise Barrier(f"its sizes {sizes} are not those of {heads} heads in {groups} groups")
    rotates = bool(place.values.get("do_rotary", 0))
    if rotates and (place.size(_CACHES[0], 1) != width // 2 or place.input(_PLACES)):
        raise Barrier("it rotates a part of each head, or by places that are given")
    if place.input(_PAST[0]) and not (place.output(1) and place.output(2)):
        raise Barrier("it has a past and hands nothing on")
    parts = _split(place, sizes) if packed else [place.input(slot) for slot in range(3)]
    query = place.op("q", "Reshape", parts[0], place.ints("q/sizes", 0, 0, groups, heads // groups, width))
    query = place.op("q_turned", "Transpose", query, perm=[0, 2, 3, 1, 4])
    keys, values = (_headed(place, name, parts[slot], groups, width) for name, slot in (("k", 1), ("v", 2)))
    tokens = place.op("tokens", "Gather", place.op("tokens_sizes", "Shape", place.input(0)), _whole(place, "tokens_axis", 1), axis=0)
    # [batch], or [batch, 1] as some exporters write them.
    lengths = place.op("lengths", "Cast", place.input(_LENGTHS), to=onnx.TensorProto.INT64)
    lengths = place.op("lengths_line", "Reshape", lengths, place.ints("lengths_line/sizes", -1))
    before = place.op("past", "Sub", place.op("past_end", "Add", lengths, _whole(place, "one", 1)), tokens)
    # The longest sample never has less; so that the node's input is read.
    longest = place.op("longest", "Cast", place.input(_TOTAL), to=onnx.TensorProto.INT64)
    before = place.op("past_most", "Min", place.op("past_counts", "Max", before, _whole(place, "none", 0)), longest)
    before = place.axes("past_apart", "Unsqueeze", before, 1)
    steps = place.op("steps", "Range", _whole(place, "first", 0), tokens, _whole(place, "step", 1))
    if rotates:
        places = place.op("places", "Add", before, steps)
        names = zip(("cos", "sin"), _CACHES, strict=True)
        turns = [place.op(f"turn_{name}", "Gather", place.input(slot), places, axis=0) for name, slot in names]
        query = _rotated(place, "q", query, turns, (1, 2))
        keys = _rotated(place, "k", keys, turns, (1,))
    held = [place.input(slot) for slot in _PAST]
    if all(held):
        keys, values = (
            place.op(f"all_{name}", "Concat", past, new, output=place.output(at) if place.is_read(at) else "", axis=2)
            for at, name, past, new in ((1, "k", held[0], keys), (2, "v", held[1], values))
        )
    else:
        for at, part in ((1, "k_rotated" if rotates else "k_turned"), (2, "v_turned")):
            if place.is_read(at):
                _emitted(place, part, at)
        keys, values = (place.parts[part].output[0] for part in ("k_rotated" if rotates else "k_turned", "v_turned"))
    apart = [place.axes(f"{name}_apart", "Unsqueeze", one, 2) for name, one in (("k", keys), ("v", values))]
    scores = place.op(MAIN, "MatMul", query, place.op("k_again", "Transpose", apart[0], perm=[0, 1, 2, 4, 3]))
    scale = float(place.values.get("scale", 0.0)) or 1 / math.sqrt(width)
    scores = place.op("scaled", "Mul", scores, place.number("scale", scale, place.input(0)))
    scores = place.op("masked", "Add", scores, _mask(place, keys, tokens, before, steps))
    mixed = place.op("mixed", "MatMul", place.op("softmax", "Softmax", scores, axis=-1), apart[1])
    together = place.op("mixed_turned", "Transpose", mixed, perm=[0, 3, 1, 2, 4])
    place.op("together", "Reshape", together, place.ints("together/sizes", 0, 0, -1), output=place.output(0))
    place.free |= {("q", 1), ("k", 1), ("v", 1)}
    place.rebuild = _again


def _whole(place: Place, role: str, value: int) -> str:
    return place.constant(role, np.asarray(value, np.int64))


def _split(place: Place, sizes: Sequence[int]) -> list[str]:
    """Queries, keys and values that come side by side."""
    place.need(13, "its packed queries, keys and values")
    place.free.add(("split", 1))
    return list(place.op("split", "Split", place.input(0), place.ints("split/sizes", *sizes), outputs=3, axis=-1))


def _headed(place: Place, role: str, x: str, count: int, width: int) -> str:
    apart = place.op(role, "Reshape", x, place.ints(f"{role}/sizes", 0, 0, count, width))
    return str(place.op(f"{role}_turned", "Transpose", apart, perm=[0, 2, 1, 3]))


def _emitted(place: Place, role: str, slot: int) -> None:
    """A part emits an output of the fused node: all who read it read that."""
    part = place.parts[role]
    old, part.output[0] = part.output[0], place.output(slot)
    for other in place.parts.values():
        other.input[:] = [part.output[0] if name == old else name for name in other.input]


def _rotated(place: Place, role: str, x: str, turns: list[str], axes: tuple[int, ...]) -> str:
    """Halves of each head [..., tokens, size] turned against each other by angles that depend on the place."""
    cos, sin = (place.axes(f"{role}_{name}", "Unsqueeze", turn, *axes) for name, turn in zip(("cos", "sin"), turns, strict=True))
    half = place.size(_CACHES[0], 1)
    ends = [place.ints(f"{role}_half/{at}", at * half) for at in range(3)]
    a, b = (place.op(f"{role}_half{at}", "Slice", x, ends[at], ends[at + 1], place.ints(f"{role}_half{at}/axes", -1)) for at in range(2))
    first = place.op(f"{role}_a", "Sub", place.op(f"{role}_ac", "Mul", a, cos), place.op(f"{role}_bs", "Mul", b, sin))
    second = place.op(f"{role}_b", "Add", place.op(f"{role}_as", "Mul", a, sin), place.op(f"{role}_bc", "Mul", b, cos))
    return str(place.op(f"{role}_rotated", "Concat", first, second, axis=-1))


def _mask(place: Place, keys: str, tokens: str, before: str, steps: str) -> str:
    """What is added to the scores [batch, groups, heads, queries, keys]: nothing for what came before and is the sample's, and for keys of
    this call up to the query's own."""
    every = place.op("keys", "Gather", place.op("keys_sizes", "Shape", keys), _whole(place, "keys_axis", 2), axis=0)
    space = place.op("space", "Sub", every, tokens)
    columns = place.op("columns", "Range", _whole(place, "columns_first", 0), every, _whole(place, "columns_step", 1))
    old = place.op("old", "Less", columns, before)  # [batch, keys]
    inside = place.op("inside", "Less", columns, place.axes("space_apart", "Unsqueeze", space, 0))
    own = place.op("own", "Sub", columns, space)
    later = place.op("later", "Greater", own, place.axes("rows", "Unsqueeze", steps, 1))  # [queries, keys]
    new = place.op("new", "Not", place.op("not_new", "Or", later, inside))
    known = place.axes("known", "Unsqueeze", place.op("both", "And", old, inside), 1)
    counts = place.op("counts", "Or", known, new)  # [batch, queries, keys]
    zero, never = place.number("zero", 0.0, place.input(0)), place.number("never", _NEVER, place.input(0))
    return place.axes("mask", "Unsqueeze", place.op("added", "Where", counts, zero, never), 1, 2)


def _again(place: Place, found: Found) -> bool:
    """Whole groups may have gone, or as many heads of each; heads keep their size."""
    targets = [found.value(role, 1) for role in "qkv"]
    if any(target is None for target in targets):
        return False
    query, key, value = ([int(size) for size in target.reshape(-1)] for target in targets if target is not None)
    before = [int(size) for size in place.constants[place.parts["q"].input[1]]]
    if len(query) != 5 or len(key) != 4 or key != value or query[2] != key[2] or query[4] != before[4] or key[3] != before[4]:
        return False
    if min(*query[2:], *key[2:]) < 1 or query[:2] != [0, 0] or key[:2] != [0, 0]:
        return False
    found.set("num_heads", query[2] * query[3])
    found.set("kv_num_heads", query[2])
    return True
