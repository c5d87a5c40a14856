"""A model ready for work: loaded, unpacked, its weights laid open, its layers found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx import model as files
from relief_onnx.carried import uncarried
from relief_onnx.datatypes import Kept
from relief_onnx.graph import Graph
from relief_onnx.layers import Plan, find
from relief_onnx.lowering import Lowered, lower
from relief_onnx.pack import packed_names, unpack
from relief_onnx.shadows import unshadowed
from relief_onnx.sparse import densified

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """A model ready for work: `original` as given (unpacked), `graph` with every weight an initializer, and its plan.

    lowered: what was rewritten in `graph`, and the way back. packed: weights that the file stores packed, or as sparse tensors. origin:
    where its external data are. sha256: of the .onnx file, or of the model where there is none; bytes: of all its files.
    """

    original: onnx.ModelProto
    graph: Graph
    plan: Plan
    path: Path | None
    sha256: str
    bytes: int
    gated: Graph | None = None
    lowered: Lowered | None = None
    packed: tuple[str, ...] = ()
    origin: files.Origin = field(default_factory=files.Origin)

    @property
    def key(self) -> str:
        """A digest of the model with its external data, which `sha256` says nothing about."""
        return files.digest(self.original) if self.origin.places else self.sha256

    @property
    def running(self) -> Graph:
        """What is run to measure: `graph`, or, in later rounds of retraining, the same with its gated shortcuts."""
        return self.graph if self.gated is None else self.gated

    @property
    def counted(self) -> onnx.ModelProto:
        """What sizes are measured on: the file's model, or its rewritten form, in which every weight is a number of its own."""
        return self.graph.model if self.lowered is not None and self.lowered.restores else files.hoist(self.original)

    def restored(self, model: onnx.ModelProto, kept: Kept | None = None) -> onnx.ModelProto:
        """An edited `graph` in the form of the file. kept: what surgery left."""
        return model if self.lowered is None else self.lowered.restored(model, kept)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the form of the file asked for besides new values."""
        return () if self.lowered is None else self.lowered.notes

    def settled(self, graph: Graph, flags: Mapping[str, NDArray[np.bool_]]) -> tuple[Graph, Prepared]:
        """An edited `graph`, not cut yet, with values that the file's form can hold. flags: by initializer, what stays."""
        if self.lowered is None or not self.lowered.restores:
            return graph, self
        model, lowered = self.lowered.settled(graph.model, flags)
        return (graph if model is graph.model else Graph(model)), replace(self, lowered=lowered)


def prepare(source: files.ModelSource) -> Prepared:
    """Load a model and find its layers. Raises ModelError."""
    loaded = files.load(source)
    path = None if isinstance(source, onnx.ModelProto) else Path(source)
    origin = files.origin_of(source)
    sha256, size = files.given_identity(source, loaded)
    original, sparse = densified(unpack(loaded))
    original = uncarried(unshadowed(original))
    lowered = lower(files.prepare(original))
    graph = Graph(lowered.model)
    return Prepared(
        original, graph, find(graph), path, sha256, size, lowered=lowered, packed=(*packed_names(loaded), *sparse), origin=origin
    )
