"""Which bodies of If, Loop and Scan run on the calibration data, and the model with their weights laid open.

An If whose condition cannot change within the model's signature is replaced by its branch for good (`lifting.fixed_branches`). Of
the others the conditions are observed on every sample that is going to be used, level by level for nested ones; where they never change
the branch that ran is lifted into the main graph for working (`lifting`). Where both run, and in Loop and Scan, layers are measured in
place (`loops`). A body that never ran is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from relief_onnx import model as files
from relief_onnx.bodies import bodies_of, key_of
from relief_onnx.data_checks import batch_axis
from relief_onnx.dataset import Dataset
from relief_onnx.datatypes import Kept
from relief_onnx.errors import DataError
from relief_onnx.exposed import Exposed, Path, conceal, settled
from relief_onnx.given_ranks import unranked, with_ranks
from relief_onnx.graph import Graph
from relief_onnx.inner_branches import folded, joined, parted
from relief_onnx.layers import BODY_OPSET, find
from relief_onnx.lifting import BRANCHES, Lift, inlined, lift, sink
from relief_onnx.loops import expose, numbered
from relief_onnx.lowering import Lowered, Restore, lower
from relief_onnx.nodes import mark_taken, subgraphs, taken_branch, unmark
from relief_onnx.prepared import Prepared
from relief_onnx.session import Session

__all__ = ["branching", "settle"]

# Samples in a batch at the second look: a condition may depend on the size of the batch.
BATCH = 32


def branching(graph: Graph) -> bool:
    """Whether the data decide more than values: which bodies run, or how many axes an input has to which the file gives no shape."""
    return any(_has_bodies(node) for node in graph.nodes) or bool(unranked(graph.model))


def settle(ready: Prepared, dataset: Dataset, *, samples: int | None, seed: int, threads: int) -> Prepared:
    """A model with the weights laid open that are in bodies which run on the calibration data. Raises DataError, ModelError."""
    draws: dict[str, Any] = {"samples": samples, "seed": seed, "threads": threads}
    # From the file itself: what the passes of `lowering` know may be inside a branch that is lifted first.
    model, restores = inlined(files.prepare(ready.original)), list[Restore]()
    notes: dict[str, str] = {}
    if model.ir_version < 4:  # where every initializer is an input of the model: left alone
        for output in [key_of(node) for node in model.graph.node if _has_bodies(node)]:
            model, notes[output] = _marked(model, output, "old")
    while pending := [node for node in model.graph.node if node.op_type == "If" and _has_bodies(node) and not taken_branch(node)]:
        conditions = {key_of(node): node.input[0] for node in pending}
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
    for output in [key_of(node) for node in model.graph.node if _has_bodies(node) and taken_branch(node) in ("", "both")]:
        found, silent = _exposed(model, output, dataset, draws) if ready.graph.opset >= BODY_OPSET else (None, False)
        if found is not None:
            model, back = found
            restores += back
        else:
            model, before = _marked(model, output, "none" if silent and not taken_branch(_node(model, output)) else "both")
            notes.setdefault(output, before)
    model, ranks = with_ranks(model, dataset, samples=samples, seed=seed)
    graph = Graph(model)
    return replace(ready, graph=graph, plan=find(graph), lowered=Lowered(model, (partial(_unmarked, notes=notes), *restores, *ranks)))


def _has_bodies(node: onnx.NodeProto) -> bool:
    return bool(bodies_of(node)) and bool(key_of(node))


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
    return Session(probe, threads, "the model", working=True)


def _exposed(
    model: onnx.ModelProto, output: str, dataset: Dataset, draws: Mapping[str, Any]
) -> tuple[tuple[onnx.ModelProto, list[Restore]] | None, bool]:  # fmt: skip
    """The model with mirrors of the layers in the bodies of a node that run, and the ways back (None: no such layer); whether none runs."""
    ran = _running(folded(model, output), output, dataset, **draws)
    ready, copies = parted(folded(model, output, ran), output, ran)
    found = expose(ready, output, ran)
    if found is not None and found[1].images and not _fits(found[0], found[1], dataset, **draws):
        found = expose(ready, output, ran, rows_only=True)
    back: list[Restore] = [] if found is None else [partial(_joined, copies=copies), _Concealed(found[1])]
    return None if found is None else (found[0], back), False in ran.values() and True not in ran.values()


def _running(
    model: onnx.ModelProto, output: str, dataset: Dataset, samples: int | None, seed: int, threads: int
) -> dict[Path, bool]:  # fmt: skip
    """By the path of a body of a node, as far as this can be seen, whether it runs on any sample. Raises DataError."""
    found = numbered(model, output)
    if found is None:
        return {}
    probe, sizes = found[0], {path: f"{name}/size" for path, name in found[1].items()}
    probe.graph.node.extend(helper.make_node("Size", [name], [sizes[path]], name=sizes[path]) for path, name in found[1].items())
    session = _session(probe, [*sizes.values()], TensorProto.INT64, threads)
    ran = dict.fromkeys(sizes, False)
    for batch in dataset.batches(1, limit=samples, seed=seed):
        values = session.run(batch.feed, [*sizes.values()], batch.source)
        ran = {path: seen or bool(size) for (path, seen), size in zip(ran.items(), values, strict=True)}
        if all(ran.values()):
            break
    return ran


def _fits(model: onnx.ModelProto, record: Exposed, dataset: Dataset, samples: int | None, seed: int, threads: int) -> bool:
    """Whether images that are handed out have one size in every run, so that they can lie one after the other."""
    session = _session(model, [*record.runs.values()], TensorProto.INT64, threads)
    for batch in dataset.batches(1, limit=samples, seed=seed):
        try:
            session.run(batch.feed, [*record.runs.values()], batch.source)
        except DataError:
            return False
    return True


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


def _joined(model: onnx.ModelProto, kept: Kept, copies: Mapping[str, str]) -> onnx.ModelProto:
    return joined(model, copies)


@dataclass(frozen=True)
class _Concealed:
    """The way back from mirrors; `notes` say what the form of the file changes besides values."""

    record: Exposed
    notes: tuple[str, ...] = ()

    def __call__(self, model: onnx.ModelProto, kept: Kept) -> onnx.ModelProto:
        return conceal(model, self.record)

    def settled(self, model: onnx.ModelProto, flags: Mapping[str, NDArray[np.bool_]]) -> tuple[onnx.ModelProto, _Concealed]:
        """The model with values that the form of the file can hold, and the way back from there."""
        model, record, notes = settled(model, self.record, flags)
        return model, _Concealed(record, tuple(notes))


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
            if key_of(node) in notes and taken_branch(node):
                unmark(node, notes[key_of(node)])
            pending += list(subgraphs(node))
    return result
