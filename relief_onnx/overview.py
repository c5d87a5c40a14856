"""Documents for the commands that look without changing anything: inspect, compare, check-data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from relief_onnx import calibrate
from relief_onnx import model as files
from relief_onnx.channels import Group, groups
from relief_onnx.compare import compare_models
from relief_onnx.coupling import Coupling
from relief_onnx.data import Batch, ImageOptions, InputSpec, batch_axis, describe, open_dataset
from relief_onnx.fitted import samples_for
from relief_onnx.layers import DATA_DECIDE, Layer
from relief_onnx.measure import layer_macs, measure
from relief_onnx.options import resolve
from relief_onnx.prepared import Prepared, prepare
from relief_onnx.reasons import TABLE_REASON
from relief_onnx.report import quality_report
from relief_onnx.two_ways import paired
from relief_onnx.walk import trace

__all__ = ["comparison", "data_overview", "overview"]


def overview(source: files.ModelSource) -> dict[str, Any]:
    """What can be pruned, what is coupled, and what cannot be pruned and why; no data is needed."""
    ready = prepare(source)
    coupling = paired(trace(ready.graph, ready.plan))
    shapes = {name: shape for name, (_, shape) in ready.graph.types.items()}
    layers = [_layer_row(layer, coupling, layer_macs(ready.graph, layer, shapes)) for layer in ready.plan.layers]
    tables = [_table_row(readers) for readers in ready.plan.by_table().values()]
    skipped = [asdict(row) | {"shape": list(row.shape)} for row in ready.plan.skipped]
    return {
        "schema": "relief-onnx/inspect/1",
        "input": _file(ready),
        "opset": ready.graph.opset,
        "inputs": _inputs(files.input_specs(ready.original)),
        "outputs": list(ready.graph.outputs),
        "layers": layers,
        "tables": tables,
        "skipped": skipped,
        "groups": [_group_row(group) for group in groups(ready.plan, coupling)],
        "totals": {
            "prunable_weights": sum({row["weight"]: row["weights"] for row in layers}.values()),  # some are shared
            "table_weights": sum(row["weights"] for row in tables),
            "open_weights": sum(int(np.prod(row.shape)) for row in ready.plan.skipped if row.reason.endswith(DATA_DECIDE)),
            "skipped_weights": sum(int(np.prod(row.shape)) for row in ready.plan.skipped),
            "coupled_params": _coupled_params(ready, coupling),
        },
    }


def _file(ready: Prepared, sample: Batch | None = None) -> dict[str, Any]:
    size = measure(ready.counted, sample)
    return {"path": None if ready.path is None else str(ready.path), "sha256": ready.sha256, "bytes": ready.bytes, **asdict(size)}


def _layer_row(layer: Layer, coupling: Coupling, macs: int | None) -> dict[str, Any]:
    units = coupling.outputs[layer.key]
    pins = Counter(coupling.pinned[unit] for unit in units.tolist() if unit in coupling.pinned)
    return {
        "node": layer.name, "op": layer.op, "weight": layer.weight, "shape": list(layer.view.source),
        "out_channels": layer.out_channels, "in_per_group": layer.in_per_group, "groups": layer.groups,
        "connections": layer.out_channels * layer.in_per_group, "weights": int(np.prod(layer.view.shape)),
        "bias": None if layer.bias is None else layer.bias.name, "macs": macs,
        "removable_channels": int(sum(unit not in coupling.pinned for unit in units.tolist())),
        "channel_reason": pins.most_common(1)[0][0] if pins else None,
    }  # fmt: skip


def _table_row(readers: tuple[Layer, ...]) -> dict[str, Any]:
    """An embedding table; `readers` are the nodes that look rows up in it, and layers that share it."""
    first = next(layer for layer in readers if layer.is_table)
    return {
        "node": first.name, "op": first.op, "weight": first.weight, "shape": list(first.view.source), "rows": first.in_per_group,
        "dims": first.out_channels, "weights": int(np.prod(first.view.shape)), "readers": [layer.name for layer in readers],
        "reason": TABLE_REASON,
    }  # fmt: skip


def _group_row(group: Group) -> dict[str, Any]:
    reasons = Counter(group.pinned.values()).most_common(1)
    return {
        "channels": group.size, "removable": len(group.free), "width": group.width,
        "members": list(group.members), "layers": [layer.name for layer in group.layers],
        "readers": [layer.name for layer in group.readers], "reason": reasons[0][0] if reasons else None,
    }  # fmt: skip


def _coupled_params(ready: Prepared, coupling: Coupling) -> int:
    """Numbers of the file's float initializers that go if some unit that can go does."""
    graph, known = ready.graph, {item.name for item in ready.counted.graph.initializer}
    reached: dict[str, Any] = {}
    pinned = np.array(sorted(coupling.pinned), np.int64)
    for tie in coupling.ties:
        if tie.initializer in known and graph.is_float(tie.initializer):
            dims = tuple(graph.initializers[tie.initializer].dims)
            free = (tie.units >= 0) & ~np.isin(tie.units, pinned)
            reached[tie.initializer] = reached.get(tie.initializer, np.zeros(dims, bool)) | tie.spread(free, len(dims))
    return sum(int(flags.sum()) for flags in reached.values())


def comparison(
    first: files.ModelSource,
    second: files.ModelSource,
    data: str | os.PathLike[str],
    *,
    images: ImageOptions,
    progress: calibrate.Progress,
    **given: Any,
) -> dict[str, Any]:
    """Agreement, accuracy, size, MACs and latency of two models on the same samples."""
    options = resolve(None, {}, given)
    models = files.load(first), files.load(second)
    ready = prepare(first), prepare(second)
    dataset = samples_for(models[0], data, images)
    found = compare_models(*models, dataset, limit=options.samples, seed=options.seed, threads=options.threads, progress=progress)
    sample = next(iter(dataset.batches(1, limit=1)))
    a, b = (_file(item, sample) for item in ready)
    per_sample = [1000 * seconds / max(found.samples, 1) for seconds in found.seconds]
    return {
        "schema": "relief-onnx/compare/1",
        "a": a | {"ms_per_sample": per_sample[0]},
        "b": b | {"ms_per_sample": per_sample[1]},
        "quality": quality_report(found),
        "warnings": list(found.warnings),
    }


def _inputs(specs: Sequence[InputSpec]) -> list[dict[str, Any]]:
    """Inputs of a model; the shape is null where the model gives none."""
    return [{"name": item.name, "dtype": str(item.dtype), "shape": list(item.shape) if item.ranked else None} for item in specs]


def data_overview(source: files.ModelSource, path: str | os.PathLike[str], images: ImageOptions) -> dict[str, Any]:
    """What the reader sees in `path`, in the model's terms."""
    specs = files.input_specs(files.load(source))
    dataset = open_dataset(path, specs, images=images)
    document = asdict(describe(dataset, specs))
    axis = batch_axis(specs)
    return {
        "schema": "relief-onnx/data/1",
        "model": str(Path(source)) if not hasattr(source, "graph") else None,
        "expects": _inputs(specs),
        "batches": "whole feeds" if not axis.batchable else (f"of {axis.fixed}" if axis.fixed else "of any size"),
        **document,
    }
