"""Models as every later step sees them: what hides its weights (fused, quantised or nested nodes) laid open, and the way back.

A *pass* rewrites what it knows into standard operators with float initializers that carry the names of the stored tensors, so that
scoring, coupling, repair, surgery and training need to know nothing of it. Its `Restore` writes the result back in the form of the file:
where a rewritten place was cut beyond recognition, what stands there stays, since it computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx

from relief_onnx.datatypes import Kept
from relief_onnx.lifting import fixed_branches
from relief_onnx.rearranged import rearranged

__all__ = ["PASSES", "Lowered", "Pass", "Restore", "lower"]

# From the rewritten model, cut or not, back to the form of the file. Kept: what surgery left of each weight (empty: all of it).
Restore = Callable[[onnx.ModelProto, Kept], onnx.ModelProto]
# A rewritten copy of a model and the way back, or None where there is nothing to do.
Pass = Callable[[onnx.ModelProto], tuple[onnx.ModelProto, Restore] | None]

PASSES: tuple[Pass, ...] = (fixed_branches, rearranged)


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


def lower(model: onnx.ModelProto, passes: Sequence[Pass] = PASSES) -> Lowered:
    """Apply the passes one after the other."""
    restores: list[Restore] = []
    for rewrite in passes:
        found = rewrite(model)
        if found is not None:
            model, restore = found
            restores.append(restore)
    return Lowered(model, tuple(restores))
