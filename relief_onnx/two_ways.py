"""Bidirectional recurrent nodes: each direction loses hidden units of its own, and the same number as the other.

A node has one `hidden_size`, but nothing ties place k of one direction to place k of the other. So the walk gives them units of their own
(`Coupling.ways` has them, a row for each direction); before units are ranked, `paired` couples the best of one direction with the best of
the other, the second with the second, and so on; surgery takes away as many in each (`balanced`). What is left of a tensor with the
directions along one axis and their units along another is still a box; its rows are other units in each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from relief_onnx.coupling import Coupling, Units
from relief_onnx.unions import UnionFind

__all__ = ["balanced", "chosen_columns", "composed", "crossed", "paired", "rows_of"]

Places = NDArray[np.intp]


def rows_of(picture: Units, ways: Sequence[Units]) -> Units | None:
    """The units [directions, hidden] of a picture that has one recurrent node's along two axes, the directions first; else None."""
    long = tuple(size for size in picture.shape if size > 1)
    if len(long) != 2:
        return None
    return next((rows for rows in ways if rows.shape == long and np.array_equal(picture.reshape(long), rows)), None)


def paired(coupling: Coupling, values: Mapping[int, float] | None = None) -> Coupling:
    """Couple each unit of one direction with one of the other: by place, or by rank where the worth of units is given.

    Units that can go are paired with such; any left over, of which one direction has more, stay with what is pinned.
    """
    if not coupling.ways:
        return coupling
    units = UnionFind()
    units.fresh(1 + max(int(own.max()) for own in (*coupling.pictures.values(), *coupling.outputs.values(), *coupling.inputs.values())))
    for rows in coupling.ways:
        first, *others = (_ranked(units.canonical(row), values, coupling.pinned) for row in rows)
        for other in others:
            # What both directions hold already is paired with itself.
            shared = Counter(first) & Counter(other)
            for a, b in zip(_without(first, shared), _without(other, shared), strict=True):
                units.unite(a, b)
    # Nodes that share some of their units may have got in each other's way: then by place.
    while True:
        uneven = [rows for rows in coupling.ways if (np.diff(np.sort(units.canonical(rows), 1), axis=0) != 0).any()]
        if not uneven:
            break
        for rows in uneven:
            for row in rows[1:]:
                for a, b in zip(rows[0].tolist(), row.tolist(), strict=True):
                    units.unite(a, b)
    return _renumbered(coupling, units)


def _ranked(row: Units, values: Mapping[int, float] | None, pinned: Mapping[int, str]) -> list[int]:
    """Pinned units first, then the best."""
    table = values or {}
    worth = [(values is not None and unit not in pinned, -table.get(unit, 0.0), place) for place, unit in enumerate(row.tolist())]
    return [int(row[place]) for _, _, place in sorted(worth)]


def _without(row: Sequence[int], shared: Mapping[int, int]) -> list[int]:
    left, found = dict(shared), []
    for unit in row:
        if left.get(unit, 0):
            left[unit] -= 1
        else:
            found.append(unit)
    return found


def _renumbered(coupling: Coupling, units: UnionFind) -> Coupling:
    def canonical(own: Units) -> Units:
        return units.canonical(own)

    pinned: dict[int, str] = {}
    for unit, why in coupling.pinned.items():
        pinned.setdefault(units.root(unit) if unit >= 0 else unit, why)
    return replace(
        coupling,
        pictures={name: canonical(own) for name, own in coupling.pictures.items()},
        ties=[replace(tie, units=canonical(tie.units)) for tie in coupling.ties],
        inputs={key: canonical(own) for key, own in coupling.inputs.items()},
        outputs={key: canonical(own) for key, own in coupling.outputs.items()},
        pinned=pinned,
        ways=[canonical(rows) for rows in coupling.ways],
    )


def balanced(units: set[int], ways: Sequence[Units], values: Mapping[int, int]) -> set[int]:
    """Of those units as many as can go so that every direction of a node loses the same number; those of the lowest value stay."""
    left, before = set(units), -1
    while len(left) != before:
        before = len(left)
        for rows in ways:
            gone = [[unit for unit in row.tolist() if unit in left] for row in rows]
            fewest = min(len(row) for row in gone)
            for row in gone:
                stay = sorted(dict.fromkeys(row), key=lambda unit: (values.get(unit, 0), unit))
                count = len(row)
                for unit in stay:
                    if count <= fewest:
                        break
                    count -= row.count(unit)
                    left.discard(unit)
    return left


# -- what is left of a weight -------------------------------------------------------------------------------------------------


def chosen_columns(flags: NDArray[np.bool_]) -> Places:
    """The places [kept] that are True, of flags [inputs] or the same in each row of [directions, inputs]; else [directions, kept]."""
    if flags.ndim == 1 or (flags == flags[:1]).all():
        return np.flatnonzero(flags.reshape(-1, flags.shape[-1])[0])
    return np.stack([np.flatnonzero(row) for row in flags])


def crossed(rows: Places, columns: Places) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of a box [rows, columns] of a weight; columns [directions, kept] are other ones for each direction's rows."""
    if columns.ndim == 1:
        return rows[:, None], columns[None]
    return rows[:, None], np.repeat(columns, len(rows) // len(columns), 0)


def composed(first: Places, second: Places) -> Places:
    """What is left of columns after a second cut, in terms of the first one's weight."""
    if first.ndim == 1:
        return first[second]
    return first[:, second] if second.ndim == 1 else np.take_along_axis(first, second, 1)
