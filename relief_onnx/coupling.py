"""Which channels live and die together: the result of one walk over the graph with the operator table (see `walk`).

Every output channel of a layer is a *unit*, a number; so is every channel that a stored table (an embedding) or padding brings in.
Units that meet in an element-wise operator are one; a unit that some operator needs is pinned, with the reason. Initializers whose
axes follow units (weights, biases, normalisation parameters) are tied to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from relief_onnx.groupnorms import GroupNorm
from relief_onnx.views import View

__all__ = ["Coupling", "Tie", "Units", "ZeroReader", "line_of"]

Units = NDArray[np.int64]


@dataclass(frozen=True)
class Tie:
    """An initializer whose `axis` has one entry per unit. `zeroable`: a unit with zeros there is switched off."""

    initializer: str
    axis: int
    units: Units
    zeroable: bool = True


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
    `restored` norms over groups that still count channels that are gone, by their first node.
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

    def line(self, tensor: str, axis: int) -> Units:
        """The units along one axis of a tensor."""
        return line_of(self.pictures[tensor], axis)


def line_of(picture: Units, axis: int) -> Units:
    """The units along one axis; all lines are alike because what is left must be a box."""
    return np.moveaxis(picture, axis, 0).reshape(picture.shape[axis], -1)[:, 0]
