"""Models as every later step sees them: what hides its weights (fused, quantised or nested nodes) laid open, and the way back.

A *pass* rewrites what it knows into standard operators with float initializers that carry the names of the stored tensors, so that
scoring, coupling, repair, surgery and training need to know nothing of it. Its `Restore` writes the result back in the form of the file:
where a rewritten place was cut beyond recognition, what stands there stays, since it computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.datatypes import Kept
from relief_onnx.fills import lay_open_fills
from relief_onnx.fused import lay_open
from relief_onnx.integer_biases import float_biases
from relief_onnx.lifting import fixed_branches
from relief_onnx.quantised import lower_quantised
from relief_onnx.quantised_open import open_packed
from relief_onnx.rearranged import rearranged
from relief_onnx.recurrent_layers import join_biases, split_biases
from relief_onnx.rounded import store_rounded

__all__ = ["INNER_PASSES", "PASSES", "RUNNING_PASSES", "STORED_PASSES", "Lowered", "Pass", "Restore", "lower"]

# From the rewritten model, cut or not, back to the form of the file. Kept: what surgery left of each weight (empty: all of it).
Restore = Callable[[onnx.ModelProto, Kept], onnx.ModelProto]
# A rewritten copy of a model and the way back, or None where there is nothing to do.
Pass = Callable[[onnx.ModelProto], tuple[onnx.ModelProto, Restore] | None]

PASSES: tuple[Pass, ...] = (fixed_branches, lay_open_fills, open_packed, float_biases, store_rounded, lower_quantised, lay_open, rearranged)


def _halves(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Restore] | None:
    """A pass: biases of recurrent nodes in two halves, as `model.prepare` has them in the main graph."""
    split = split_biases(model)
    return None if split is model else (split, lambda edited, kept: join_biases(edited, model))


def _rearranged(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Restore] | None:
    """A pass: `rearranged`, biases whole again on the way back."""
    found = rearranged(model)
    if found is None:
        return None
    result, back = found
    return result, lambda edited, kept: join_biases(back(edited, kept), model)


# For the body of a node (see `loops`).
INNER_PASSES: tuple[Pass, ...] = (_halves, open_packed, float_biases, store_rounded, lower_quantised, lay_open)
# For one that runs.
RUNNING_PASSES: tuple[Pass, ...] = (*INNER_PASSES, _rearranged)
# For a model of floats whose weights are to be stored as integers.
STORED_PASSES: tuple[Pass, ...] = (fixed_branches, lay_open, _rearranged)


@runtime_checkable
class _Settling(Protocol):
    """A way back that knows which numbers the file's form can hold (see `requantise`)."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What changes besides values."""

    def settled(self, model: onnx.ModelProto, flags: Mapping[str, NDArray[np.bool_]]) -> tuple[onnx.ModelProto, Restore]:
        """The model with such numbers, and the way back from there."""


@dataclass(frozen=True)
class Lowered:
    """`model` computes what the file's model does. `restores` lead back, the last one first."""

    model: onnx.ModelProto
    restores: tuple[Restore, ...] = ()

    def restored(self, model: onnx.ModelProto, kept: Kept | None = None) -> onnx.ModelProto:
        """An edited `model` in the form of the file. kept: rows and columns that surgery left of each weight."""
        for restore in reversed(self.restores):
            model = restore(model, kept or {})
        return model

    def settled(self, model: onnx.ModelProto, flags: Mapping[str, NDArray[np.bool_]]) -> tuple[onnx.ModelProto, Lowered]:
        """An edited `model`, not cut yet, with values that the file's form can hold, and the way back from there.

        flags: by initializer, what stays.
        """
        restores: list[Restore] = []
        for restore in self.restores:
            if isinstance(restore, _Settling):
                model, settled = restore.settled(model, flags)
                restores.append(settled)
            else:
                restores.append(restore)
        return model, replace(self, restores=tuple(restores))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the way back changes besides values."""
        found: list[str] = []
        for restore in self.restores:
            if isinstance(restore, _Settling):
                found += restore.notes
        return tuple(found)


def lower(model: onnx.ModelProto, passes: Sequence[Pass] = PASSES) -> Lowered:
    """Apply the passes one after the other."""
    restores: list[Restore] = []
    for rewrite in passes:
        found = rewrite(model)
        if found is not None:
            model, restore = found
            restores.append(restore)
    return Lowered(model, tuple(restores))
