"""Which branches of If run on the calibration data, and the model with these branches laid open.

An If whose condition cannot change within the model's signature is replaced by its branch for good (`lifting.fixed_branches`). Of
the others the conditions are observed on every sample that is going to be used, level by level for nested ones; where they never change
the branch that ran is lifted into the main graph for working (`lifting`). A branch that never ran is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx
from onnx import TensorProto, helper

from relief_onnx import model as files
from relief_onnx.data_checks import batch_axis
from relief_onnx.dataset import Dataset
from relief_onnx.datatypes import Kept
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.lifting import BRANCHES, Lift, inlined, lift, sink
from relief_onnx.lowering import Lowered, Restore
from relief_onnx.nodes import mark_taken, subgraphs, taken_branch
from relief_onnx.prepared import Prepared
from relief_onnx.session import Session

__all__ = ["branching", "settle"]

# Samples in a batch at the second look: a condition may depend on the size of the batch.
BATCH = 32


def branching(graph: Graph) -> bool:
    """Whether a model has branches that the data decide about."""
    return graph.model.ir_version >= 4 and any(node.op_type == "If" for node in graph.nodes)


def settle(ready: Prepared, dataset: Dataset, *, samples: int | None, seed: int, threads: int) -> Prepared:
    """A model with the branches that run on the calibration data laid open. Raises DataError, ModelError."""
    model, restores = ready.graph.model, list[Restore]()
    both: dict[str, str] = {}
    while pending := [node for node in model.graph.node if node.op_type == "If" and not taken_branch(node)]:
        conditions = {next(name for name in node.output if name): node.input[0] for node in pending}
        seen = _observed(model, sorted(set(conditions.values())), dataset, samples, seed, threads)
        for output, condition in conditions.items():
            if len(seen[condition]) == 1:
                model, record = lift(model, output, BRANCHES[0] if True in seen[condition] else BRANCHES[1])
                restores.append(_sinking(record))
            else:
                model, both[output] = _marked(model, output)
        model = inlined(files.hoist(model))
    opened = files.prepare(model)
    known = model
    restores = [_unmarking(both), *restores, lambda edited, kept: files.share_again(edited, known)]
    before = ready.lowered.restores if ready.lowered is not None else ()
    graph = Graph(opened)
    return replace(ready, graph=graph, plan=find(graph), lowered=Lowered(opened, (*before, *restores)))


def _observed(
    model: onnx.ModelProto, names: Sequence[str], dataset: Dataset, samples: int | None, seed: int, threads: int
) -> Mapping[str, set[bool]]:  # fmt: skip
    """The values of conditions over the samples, one by one and in batches."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    # With nothing else to emit, onnxruntime runs only what the conditions need.
    inputs = {item.name for item in model.graph.input}
    made = [name for name in names if name not in inputs]
    probe.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.BOOL, None) for name in made)
    session = Session(probe, threads, "the conditions of the model") if made else None
    found: dict[str, set[bool]] = {name: set() for name in names}
    axis = batch_axis(dataset.inputs)
    for size in (1, BATCH) if axis.batchable and axis.fixed is None else (1,):
        for batch in dataset.batches(size, limit=samples, seed=seed):
            values: dict[str, Any] = {name: batch.feed[name] for name in names if name in inputs}
            if session is not None:
                values |= dict(zip(made, session.run(batch.feed, made, batch.source), strict=True))
            for name, value in values.items():
                found[name].add(bool(value.reshape(-1)[0]))
    return found


def _marked(model: onnx.ModelProto, output: str) -> tuple[onnx.ModelProto, str]:
    """A copy in which an If is noted to take both branches, and its documentation."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    node = next(item for item in result.graph.node if output in item.output)
    documentation = node.doc_string
    mark_taken(node, "both")
    return result, documentation


def _sinking(record: Lift) -> Restore:
    return lambda model, kept: sink(model, record)


def _unmarking(documentation: Mapping[str, str]) -> Restore:
    def restore(model: onnx.ModelProto, kept: Kept) -> onnx.ModelProto:
        if not documentation:
            return model
        result = onnx.ModelProto()
        result.CopyFrom(model)
        _unmark(result.graph, documentation)
        return result

    return restore


def _unmark(graph: onnx.GraphProto, documentation: Mapping[str, str]) -> None:
    """In the bodies too: an If that takes both branches may be back in a branch."""
    for node in graph.node:
        for output in node.output:
            if output in documentation:
                node.doc_string = documentation[output]
        for inner in subgraphs(node):
            _unmark(inner, documentation)
