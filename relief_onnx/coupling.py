"""Which channels live and die together: the result of one walk over the graph with the operator table (see `walk`).

Every output channel of a layer is a *unit*, a number; so is every channel that a stored table (an embedding) or padding brings in.
Units that meet in an element-wise operator are one; a unit that some operator needs is pinned, with the reason. Initializers whose
axes follow units (weights, biases, normalisation parameters) are tied to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relief_onnx.groupnorms import GroupNorm
from relief_onnx.views import View

__all__ = ["Coupling", "Tie", "Units", "ZeroReader", "line_of"]

Units = NDArray[np.int64]


@dataclass(frozen=True)
class Tie:
    """An initializer whose `axis` has one entry per unit. `zeroable`: a unit with zeros there is switched off.

    `across`: an axis along which the units are others in each entry, as in the directions of an LSTM; then `units` are [across, axis].
    """

    initializer: str
    axis: int
    units: Units
    zeroable: bool = True
    across: int | None = None

    def spread(self, flags: NDArray[np.bool_], rank: int) -> NDArray[np.bool_]:
        """Flags of its units, to be broadcast against an initializer with `rank` axes."""
        if self.across is None:
            return flags.reshape([-1 if axis == self.axis else 1 for axis in range(rank)])
        ordered = flags if self.across < self.axis else flags.T
        sizes = {self.across: flags.shape[0], self.axis: flags.shape[1]}
        return ordered.reshape([sizes.get(axis, 1) for axis in range(rank)])

    def holding(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of its units have anything in an array of flags like the initializer, as `units` are."""
        own = (self.axis,) if self.across is None else (self.across, self.axis)
        found: NDArray[np.bool_] = np.asarray(flags.any(tuple(axis for axis in range(flags.ndim) if axis not in own)))
        return found.T if self.across is not None and self.across > self.axis else found

    def taken(self, array: NDArray[Any], keep: NDArray[np.bool_]) -> NDArray[Any]:
        """What is left of the initializer. keep: flags of its units, as many True in each row."""
        if self.across is None:
            return array.compress(keep, self.axis)
        rows = [np.take(array, [row], self.across).compress(flags, self.axis) for row, flags in enumerate(keep)]
        return np.concatenate(rows, self.across)


@dataclass(frozen=True)
class ZeroReader:
    """A node that reads every channel of a tensor, but not those that are 0: `factors` are (tensor, axis), one zero is enough.

    Node -1 is whoever reads an output of the model.
    """

    node: int
    factors: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Coupling:
    """The result of the walk. Unit numbers are canonical: equal numbers are coupled.

    `constants` are the nodes that read constants only; `sources` initializers that emit channels (embeddings),
    `restored` norms over groups that still count channels that are gone, by their first node, `ways` the units [directions, hidden]
    of recurrent nodes whose directions may lose other units, though as many.
    """

    pictures: Mapping[str, Units]
    ties: Sequence[Tie]
    inputs: Mapping[int, Units]
    outputs: Mapping[int, Units]
    pinned: Mapping[int, str]
    barriers: frozenset[int]
    constants: frozenset[int]
    sources: Mapping[str, View]
    zero_readers: Sequence[ZeroReader]
    restored: Mapping[int, GroupNorm]
    ways: Sequence[Units] = ()

    def line(self, tensor: str, axis: int) -> Units:
        """The units along one axis of a tensor."""
        return line_of(self.pictures[tensor], axis)


def line_of(picture: Units, axis: int) -> Units:
    """The units along one axis; all lines are alike because what is left must be a box."""
    return np.moveaxis(picture, axis, 0).reshape(picture.shape[axis], -1)[:, 0]
