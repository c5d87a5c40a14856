"""Inputs to which the file gives no shape: the number of axes that they have in the data, while we work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx.dataset import Dataset
from relief_onnx.datatypes import Kept
from relief_onnx.errors import DataError
from relief_onnx.lowering import Restore

__all__ = ["unranked", "with_ranks"]

_BATCH = 32


@dataclass(frozen=True)
class _Unranked:
    """The way back: the file goes on to say nothing of these shapes. ranks: what the data say, by input."""

    ranks: Mapping[str, int]

    @property
    def notes(self) -> tuple[str, ...]:
        """What holds for such inputs only."""
        return tuple(
            f"the file gives input {name} no shape; channels are followed for {rank} axes, which it has in the data"
            for name, rank in self.ranks.items()
        )

    def settled(self, model: onnx.ModelProto, flags: Mapping[str, NDArray[np.bool_]]) -> tuple[onnx.ModelProto, _Unranked]:
        """As it is: no values are changed here."""
        return model, self

    def __call__(self, model: onnx.ModelProto, kept: Kept) -> onnx.ModelProto:
        restored = onnx.ModelProto()
        restored.CopyFrom(model)
        for info in restored.graph.input:
            if info.name in self.ranks:
                info.type.tensor_type.ClearField("shape")
        return restored


def unranked(model: onnx.ModelProto) -> list[str]:
    """The inputs to which a model gives no shape."""
    stored = {item.name for item in model.graph.initializer}
    tensors = [item for item in model.graph.input if item.type.HasField("tensor_type") and item.name not in stored]
    return [item.name for item in tensors if not item.type.tensor_type.HasField("shape")]


def with_ranks(model: onnx.ModelProto, dataset: Dataset, *, samples: int | None, seed: int) -> tuple[onnx.ModelProto, tuple[Restore, ...]]:
    """A model whose inputs without a shape have as many axes as in the samples, sizes open, and the ways back.

    Raises DataError where the samples differ in their axes.
    """
    seen: dict[str, set[int]] = {name: set() for name in unranked(model)}
    for batch in dataset.batches(_BATCH, limit=samples, seed=seed) if seen else ():
        for name in seen:
            seen[name].add(batch.feed[name].ndim)
    if not seen:
        return model, ()
    for name, found in seen.items():
        if len(found) > 1:
            some = " and ".join(str(rank) for rank in sorted(found))
            raise DataError(f"Input {name} has {some} axes in different samples; give samples with the same number of axes.")
    ranks = {name: min(found) for name, found in seen.items()}
    ranked = onnx.ModelProto()
    ranked.CopyFrom(model)
    for info in ranked.graph.input:
        if info.name in ranks:
            info.type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto(dim=[onnx.TensorShapeProto.Dimension()] * ranks[info.name]))
    return ranked, (_Unranked(ranks),)
