"""Heads that a fused node turns by angles of each token's place, as plain operators."""

from __future__ import annotations

from collections.abc import Sequence

from relief_onnx.fused_place import Place

__all__ = ["turned_heads"]


def turned_heads(
    place: Place, role: str, x: str, turns: Sequence[str], axes: Sequence[int], sizes: tuple[int, int], interleaved: bool, output: str = ""
) -> str:
    """Entries of x [.., size of a head] turned in pairs by the angles [batch, tokens, pairs] with those cosines and sines.

    axes: those of x that the angles do not have. sizes: of the part of a head that is turned, its first entries, and of a head.
    A pair is an entry of the part's first half and one of its second, or, interleaved, two neighbours.
    """
    size, width = sizes
    cos, sin = (place.axes(f"{role}_{name}", "Unsqueeze", turn, *axes) for name, turn in zip(("cos", "sin"), turns, strict=True))

    def taken(part: str, start: int, stop: int, step: int = 1) -> str:
        limits = (("start", start), ("stop", stop), ("axis", -1), ("step", step))
        return str(place.op(f"{role}_{part}", "Slice", x, *(place.ints(f"{role}_{part}/{name}", value) for name, value in limits)))

    ends = ((0, size, 2), (1, size, 2)) if interleaved else ((0, size // 2), (size // 2, size))
    a, b = (taken(f"half{at}", *limits) for at, limits in enumerate(ends))
    pair = [
        place.op(f"{role}_a", "Sub", place.op(f"{role}_ac", "Mul", a, cos), place.op(f"{role}_bs", "Mul", b, sin)),
        place.op(f"{role}_b", "Add", place.op(f"{role}_as", "Mul", a, sin), place.op(f"{role}_bc", "Mul", b, cos)),
    ]
    if interleaved:
        beside = [place.axes(f"{role}_apart{at}", "Unsqueeze", one, -1) for at, one in enumerate(pair)]
        line = place.ints(f"{role}_line/sizes", *[0] * (2 + len(axes)), size)
        pair = [place.op(f"{role}_line", "Reshape", place.op(f"{role}_pairs", "Concat", *beside, axis=-1), line)]
    rest = [taken("rest", size, width)] if size < width else []
    return str(place.op(f"{role}_rotated", "Concat", *pair, *rest, output=output, axis=-1))
