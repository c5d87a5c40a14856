"""A view: how a weight initializer's layout maps to the canonical layout [out, in per group, *kernel].

Exporters let a weight reach its node through Transpose, Reshape, Squeeze and the like. A `View` remembers those steps, so that
a mask or a repaired weight that is computed in the canonical layout can be written back in the initializer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["View"]

Step = tuple[str, tuple[int, ...]]
_FORWARD: Mapping[str, Callable[[NDArray[Any], tuple[int, ...]], NDArray[Any]]] = {
    "transpose": np.transpose,
    "reshape": np.reshape,
    "spread": np.broadcast_to,
}


@dataclass(frozen=True)
class View:
    """A chain of transposes and reshapes from `source` shape to `shape`, which can be inverted; one that was `spread` cannot."""

    source: tuple[int, ...]
    shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> View:
        """The identity view of an initializer with that shape."""
        return cls(shape, shape)

    def transpose(self, *permutation: int) -> View:
        """Permute the axes, as numpy.transpose."""
        if permutation == tuple(range(len(self.shape))):
            return self
        shape = tuple(self.shape[axis] for axis in permutation)
        return replace(self, shape=shape, steps=(*self.steps, ("transpose", permutation)))

    def reshape(self, *shape: int) -> View:
        """Reshape to `shape`; one entry may be -1."""
        if -1 in shape:
            known = -int(np.prod(shape))
            shape = tuple(int(np.prod(self.shape)) // known if size == -1 else size for size in shape)
        if shape == self.shape:
            return self
        return replace(self, shape=shape, steps=(*self.steps, ("reshape", shape)))

    def spread(self, *shape: int) -> View:
        """Let one number stand for all of that shape."""
        return replace(self, shape=shape, steps=(*self.steps, ("spread", shape)))

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """From the initializer's layout to the canonical one."""
        for kind, argument in self.steps:
            array = _FORWARD[kind](array, argument)
        return array

    def invert(self, array: NDArray[Any]) -> NDArray[Any]:
        """From the canonical layout back to the initializer's. Raises ValueError where one number stands for several."""
        if any(kind == "spread" for kind, _ in self.steps):
            raise ValueError(f"one number stands for all of {list(self.shape)}")
        shapes = [self.source]
        for kind, argument in self.steps:
            shapes.append(tuple(shapes[-1][axis] for axis in argument) if kind == "transpose" else argument)
        for (kind, argument), before in zip(reversed(self.steps), reversed(shapes[:-1]), strict=True):
            array = array.transpose(np.argsort(argument)) if kind == "transpose" else array.reshape(before)
        return array

    def source_axis(self, axis: int) -> int | None:
        """The initializer's axis that is this canonical axis, whole and unmixed; None where a reshape mixed it."""
        if self.shape[axis] == 1 or any(kind == "spread" for kind, _ in self.steps):
            return None
        shapes = [self.source]
        for kind, argument in self.steps:
            shapes.append(tuple(shapes[-1][i] for i in argument) if kind == "transpose" else argument)
        for (kind, argument), before, after in zip(reversed(self.steps), reversed(shapes[:-1]), reversed(shapes[1:]), strict=True):
            if kind == "transpose":
                axis = argument[axis]
                continue
            # A reshape keeps an axis whole when the number of elements on either side of it is the same before and after.
            left = int(np.prod(after[:axis]))
            matches = [i for i, size in enumerate(before) if size == after[axis] and int(np.prod(before[:i])) == left]
            if not matches:
                return None
            axis = matches[0]
        return axis
