"""Which bodies of If, Loop and Scan run on the calibration data, and the model with their weights laid open.

An If whose condition cannot change within the model's signature is replaced by its branch for good (`lifting.fixed_branches`). Of
the others the conditions are observed on every sample that is going to be used, level by level for nested ones; where they never change
the branch that ran is lifted into the main graph for working (`lifting`). Where both run, and in Loop and Scan, layers are measured in
place (`loops`). A body that never ran is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from relief_onnx.loops import BODIES, Exposed, conceal, expose
from relief_onnx.lowering import Lowered, Restore, lower
from relief_onnx.nodes import STANDARD, mark_taken, subgraphs, taken_branch, unmark
from relief_onnx.prepared import Prepared
from relief_onnx.session import Session

__all__ = ["branching", "settle"]

# Samples in a batch at the second look: a condition may depend on the size of the batch.
BATCH = 32
# The first opset whose operators `loops` uses.
OPSET = 11


def branching(graph: Graph) -> bool:
    """Whether a model has bodies, of which the data decide what runs."""
    return any(_has_bodies(node) for node in graph.nodes)


def settle(ready: Prepared, dataset: Dataset, *, samples: int | None, seed: int, threads: int) -> Prepared:
    """A model with the weights laid open that are in bodies which run on the calibration data. Raises DataError, ModelError."""
    draws: dict[str, Any] = {"samples": samples, "seed": seed, "threads": threads}
    # From the file itself: what the passes of `lowering` know may be inside a branch that is lifted first.
    model, restores = inlined(files.prepare(ready.original)), list[Restore]()
    notes: dict[str, str] = {}
    if model.ir_version < 4:  # where every initializer is an input of the model: left alone
        for output in [_key(node) for node in model.graph.node if _has_bodies(node)]:
            model, notes[output] = _marked(model, output, "old")
    while pending := [node for node in model.graph.node if node.op_type == "If" and _has_bodies(node) and not taken_branch(node)]:
        conditions = {_key(node): node.input[0] for node in pending}
        seen = _observed(model, sorted(set(conditions.values())), dataset, **draws)
        for output, condition in conditions.items():
            if len(seen[condition]) == 1:
                model, record = lift(model, output, BRANCHES[0] if True in seen[condition] else BRANCHES[1])
                restores.append(partial(_sunk, record=record))
            else:
                model, notes[output] = _marked(model, output, "both")
        model = inlined(files.hoist(model))
    known = model
    lowered = lower(files.prepare(model))
    restores += [lambda edited, kept: files.share_again(edited, known), *lowered.restores]
    model = lowered.model
    for output in [_key(node) for node in model.graph.node if _has_bodies(node) and taken_branch(node) in ("", "both")]:
        found = expose(model, output) if ready.graph.opset >= OPSET else None
        exposed, ran = found is not None, set[str]() if found is None else _running(found[0], found[1], dataset, **draws)
        if found is not None and ran < set(found[1].sources):
            found = expose(model, output, ran)
        if found is not None:
            model = found[0]
            restores.append(partial(_concealed, record=found[1]))
        else:
            model, before = _marked(model, output, "none" if exposed and not taken_branch(_node(model, output)) else "both")
            notes.setdefault(output, before)
    graph = Graph(model)
    return replace(ready, graph=graph, plan=find(graph), lowered=Lowered(model, (partial(_unmarked, notes=notes), *restores)))


def _has_bodies(node: onnx.NodeProto) -> bool:
    return node.op_type in BODIES and node.domain in STANDARD and bool(_key(node))


def _key(node: onnx.NodeProto) -> str:
    return next((name for name in node.output if name), "")


def _observed(
    model: onnx.ModelProto, names: Sequence[str], dataset: Dataset, samples: int | None, seed: int, threads: int
) -> Mapping[str, set[bool]]:  # fmt: skip
    """The values of conditions over the samples, one by one and in batches."""
    inputs = {item.name for item in model.graph.input}
    made = [name for name in names if name not in inputs]
    session = _session(model, made, TensorProto.BOOL, threads) if made else None
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


def _session(model: onnx.ModelProto, names: Sequence[str], element: int, threads: int) -> Session:
    """The model with these outputs only, so that onnxruntime runs no more than they need."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_tensor_value_info(name, element, None) for name in names)
    return Session(probe, threads, "the model")


def _running(model: onnx.ModelProto, record: Exposed, dataset: Dataset, samples: int | None, seed: int, threads: int) -> set[str]:
    """The bodies that run on any sample: what they emit is then not empty."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    sizes = [f"{name}/size" for name in record.outputs]
    probe.graph.node.extend(helper.make_node("Size", [name], [size], name=size) for name, size in zip(record.outputs, sizes, strict=True))
    session = _session(probe, sizes, TensorProto.INT64, threads)
    found: set[str] = set()
    for batch in dataset.batches(1, limit=samples, seed=seed):
        found |= {body for body, size in zip(record.sources, session.run(batch.feed, sizes, batch.source), strict=True) if int(size)}
        if found >= set(record.sources):
            break
    return found


def _node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(item for item in model.graph.node if output in item.output)
    return found


def _marked(model: onnx.ModelProto, output: str, taken: str) -> tuple[onnx.ModelProto, str]:
    """A copy in which it is noted which body of a node runs, and the node's documentation."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    node = _node(result, output)
    documentation = node.doc_string
    mark_taken(node, taken)
    return result, documentation


def _sunk(model: onnx.ModelProto, kept: Kept, record: Lift) -> onnx.ModelProto:
    return sink(model, record)


def _concealed(model: onnx.ModelProto, kept: Kept, record: Exposed) -> onnx.ModelProto:
    return conceal(model, record)


def _unmarked(model: onnx.ModelProto, kept: Kept, notes: Mapping[str, str]) -> onnx.ModelProto:
    """With the documentation that nodes had, by first output, in bodies too."""
    if not notes:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    pending = [result.graph]
    while pending:
        graph = pending.pop()
        for node in graph.node:
            if _key(node) in notes and taken_branch(node):
                unmark(node, notes[_key(node)])
            pending += list(subgraphs(node))
    return result
