"""A model run piece by piece over all calibration samples, so that weights may change between one piece and the next.

Each node runs once for each batch, whatever the number of stops: a piece starts from the tensors that the pieces before left behind.
Tensors are dropped when no later node reads them. Those that do not fit in memory wait in files of a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from relief_onnx.graph import Graph
from relief_onnx.session import Session
from relief_onnx.surgery import apply_weights

__all__ = ["MEMORY_BYTES", "Aside", "Replay", "constant_nodes"]

Feed = Mapping[str, NDArray[Any]]

# Tensors that one replay keeps in memory; what is beyond goes to files.
MEMORY_BYTES = 1 << 30


@dataclass
class Aside:
    """What a piece makes that is run beside the walk, batch by batch, whenever it is asked for."""

    batches: int
    run: Callable[[int], dict[str, NDArray[Any]]]
    _last: tuple[int, dict[str, NDArray[Any]]] = field(default_factory=lambda: (-1, {}))

    def value(self, name: str, batch: int) -> NDArray[Any] | None:
        """A tensor of one batch."""
        if self._last[0] != batch:
            self._last = (batch, self.run(batch))
        return self._last[1][name]


class Replay:
    """A walk over the nodes of a model with all batches side by side. Use as a context: it may hold files."""

    def __init__(
        self, graph: Graph, feeds: Sequence[Feed], wanted: Collection[str], *, threads: int = 0, memory: int = MEMORY_BYTES
    ) -> None:
        """`wanted`: tensors that stay, once they are there, until they are dropped by `drop`."""
        self._graph, self._wanted, self._threads, self._memory = graph, set(wanted), threads, memory
        self._at = 0
        self._held = 0
        self._values: list[dict[str, Any]] = [dict(feed) for feed in feeds]
        self._files: set[Path] = set()
        self._stack = ExitStack()
        self._folder: Path | None = None
        self._last = {name: max(use.node for use in uses) for name, uses in graph.uses.items()}
        constant = constant_nodes(graph)
        stays = {constant[name] for name in self._wanted & constant.keys()}
        self._constant = {name: index for name, index in constant.items() if index not in stays}
        self.batches = len(feeds)

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._values = []
        self._stack.close()

    def advance(self, stop: int, weights: Mapping[str, NDArray[Any]] | None = None) -> None:
        """Run the nodes before number `stop`; `weights` are initializers that are not what the graph has. Raises DataError, ModelError."""
        if stop <= self._at:
            return
        start, self._at = self._at, stop
        model, outputs = self._piece(start, stop, weights or {})
        if not outputs:
            return
        session = Session(model, self._threads, f"nodes {start} to {stop - 1} of the model", working=True)
        names = [item.name for item in model.graph.input]
        for values in self._values:
            made = session.run({name: self._read(values[name]) for name in names}, outputs, "the calibration data")
            for name, value in zip(outputs, made, strict=True):
                values[name] = self._kept(value)
            for name in [name for name in values if not self._is_live(name)]:
                self._forget(values.pop(name))

    def aside(self, stop: int, names: Sequence[str], weights: Mapping[str, NDArray[Any]] | None = None) -> Aside:
        """Tensors that the nodes from here to number `stop` make, without going on there. Raises ModelError."""
        model, outputs = self._piece(self._at, stop, weights or {}, names)
        session = Session(model, self._threads, f"nodes {self._at} to {stop - 1} of the model", working=True)
        inputs = [item.name for item in model.graph.input]

        def run(batch: int) -> dict[str, NDArray[Any]]:
            values = self._values[batch]
            made = session.run({name: self._read(values[name]) for name in inputs}, outputs, "the calibration data")
            return dict(zip(outputs, made, strict=True))

        return Aside(self.batches, run)

    def value(self, name: str, batch: int) -> NDArray[Any] | None:
        """A tensor of one batch; None where it is not there (yet, or any more)."""
        found = self._values[batch].get(name)
        return None if found is None else self._read(found)

    def has(self, name: str) -> bool:
        """Whether a tensor is there for every batch."""
        return all(name in values for values in self._values)

    def drop(self, name: str) -> None:
        """A wanted tensor is not wanted any more."""
        self._wanted.discard(name)

    def _is_live(self, name: str) -> bool:
        return name in self._wanted or (self._last.get(name, -1) >= self._at and name not in self._constant)

    def _piece(
        self, start: int, stop: int, weights: Mapping[str, NDArray[Any]], wanted: Sequence[str] | None = None
    ) -> tuple[onnx.ModelProto, list[str]]:
        """Nodes [start, stop) as a model of their own, and what it makes: what is `wanted`, or all that is read later."""
        graph = self._graph
        run = {index for index in range(start, stop) if not any(name in self._constant for name in graph.nodes[index].output)}
        made_here = {name for index in run for name in graph.nodes[index].output if name}
        outputs = sorted(name for name in made_here if (self._is_live(name) if wanted is None else name in wanted))
        # What is computed of weights alone is computed again in each piece that reads it: the weights may be new.
        waiting = [name for index in run for name in graph.read_by(index)]
        while waiting:
            index = self._constant.get(waiting.pop(), -1)
            if index >= 0 and index not in run:
                run.add(index)
                waiting += graph.read_by(index)
        nodes = [graph.nodes[index] for index in sorted(run)]
        made = {name for node in nodes for name in node.output if name}
        read = {name for index in run for name in graph.read_by(index)}
        stored = [graph.initializers[name] for name in sorted(read & graph.initializers.keys())]
        inputs = [self._described(name) for name in sorted(read - made - graph.initializers.keys())]
        body = helper.make_graph(nodes, "piece", inputs, [onnx.ValueInfoProto(name=name) for name in outputs], stored)
        model = helper.make_model(body, opset_imports=graph.model.opset_import, functions=graph.model.functions)
        model.ir_version = max(graph.model.ir_version, 4)
        changed = {name: weights[name] for name in read & weights.keys()}
        return (apply_weights(model, changed) if changed else model), outputs

    def _described(self, name: str) -> onnx.ValueInfoProto:
        """The type of a value that a piece reads, and its sizes; those are left open that differ from batch to batch."""
        values = [values[name] for values in self._values]
        if isinstance(values[0], list):
            item = values[0][0] if values[0] else np.zeros(0, np.float32)
            element = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(item.dtype), None)
            return helper.make_value_info(name, helper.make_sequence_type_proto(element))
        arrays = [self._read(value) for value in values]
        element_type = onnx.TensorProto.STRING if arrays[0].dtype.kind == "O" else helper.np_dtype_to_tensor_dtype(arrays[0].dtype)
        # Without ranks onnxruntime may take sizes that are computed from shapes for empty ones, and without the width of queries, keys
        # and values it gets the shape of an Attention wrong.
        ranks = {array.ndim for array in arrays}
        sizes = [set(own) for own in zip(*(array.shape for array in arrays), strict=False)]
        shape = [own.pop() if len(own) == 1 else None for own in sizes] if len(ranks) == 1 else None
        return helper.make_value_info(name, helper.make_tensor_type_proto(element_type, shape))

    def _kept(self, value: Any) -> Any:
        """The value, or the file that holds it."""
        if not isinstance(value, np.ndarray) or value.dtype == object or self._held + value.nbytes <= self._memory:
            self._held += getattr(value, "nbytes", 0)
            return value
        if self._folder is None:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="relief-onnx-")))
        path = self._folder / f"{len(self._files)}.npy"
        self._files.add(path)
        np.save(path, value)
        return path

    def _read(self, value: Any) -> Any:
        return np.load(value, mmap_mode="r") if isinstance(value, Path) else value

    def _forget(self, value: Any) -> None:
        if isinstance(value, Path):
            value.unlink()
        else:
            self._held -= getattr(value, "nbytes", 0)


def constant_nodes(graph: Graph) -> dict[str, int]:
    """By tensor, the number of the node that computes it, of all that depend on no input of the model and on no chance."""
    found: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        read = graph.read_by(index)
        by_chance = node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")
        if (read or node.op_type == "Constant") and not by_chance and all(name in found or name in graph.initializers for name in read):
            found |= {name: index for name in node.output if name and not graph.is_output(name)}
    return found
