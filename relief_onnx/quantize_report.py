"""The report of `quantize`: one JSON document (schema `relief-onnx/quantize/1`) with bytes and agreement of every stage."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from relief_onnx import calibrate
from relief_onnx import model as files
from relief_onnx.compare import Comparison, compare_models
from relief_onnx.dataset import Dataset
from relief_onnx.graph import FLOATS, Graph
from relief_onnx.int8 import Stored
from relief_onnx.layers import Plan
from relief_onnx.measure import Size, measure
from relief_onnx.options import Options
from relief_onnx.pack import PackedTensor
from relief_onnx.report import quality_report
from relief_onnx.session import Session
from relief_onnx.verify import Verification

__all__ = ["SCHEMA", "Evidence", "Stage", "build_quantize_report"]

SCHEMA = "relief-onnx/quantize/1"
# How often both models run to compare their speed, at most, and for how long about.
_ROUNDS, _ROUND_SECONDS = 9, 2.0
_SLOWER = 1.15


@dataclass(frozen=True)
class Stage:
    """A model on the way from floats to the shipped file, and the bytes of its file where it has one."""

    name: str
    model: onnx.ModelProto
    size: int | None = None


@dataclass(frozen=True)
class Evidence:
    """Everything that one run found out. `base` is the float model with norms folded; `graph` and `plan` are of it.

    given: digest and bytes of the input, whose external data are where `origin` says.
    """

    path: Path | None
    given: tuple[str, int]
    target: Path | None
    model: onnx.ModelProto
    base: onnx.ModelProto
    shipped: onnx.ModelProto
    graph: Graph
    plan: Plan
    stored: Mapping[str, Stored]
    reasons: Mapping[str, str]
    packed: tuple[PackedTensor, ...]
    folded: tuple[str, ...]
    options: Mapping[str, Any]
    notes: tuple[str, ...]
    origin: files.Origin

    def rows(self) -> list[dict[str, Any]]:
        """One row for every weight that some tool could quantise."""
        packed = {item.name: item.storage for item in self.packed}
        named = [(layer.weight, layer.name, layer.op) for layer in self.plan.layers]
        named += [(item.weight, item.node, item.op) for item in self.plan.unranked]
        first = {weight: (node, op) for weight, node, op in reversed(named)}
        return [self._row(weight, *first[weight], packed) for weight in dict.fromkeys(weight for weight, _, _ in named)]

    def _row(self, weight: str, node: str, op: str, packed: Mapping[str, str]) -> dict[str, Any]:
        item = self.stored.get(weight)
        is_float = weight in self.graph.initializers and self.graph.initializers[weight].data_type in FLOATS
        zeros = int(np.sum(self.graph.array(weight) == 0)) if is_float else None
        return {
            "node": node, "op": op, "weight": weight,
            "status": "float" if item is None else item.status,
            "reason": self._reason(weight, item),
            "scale_per_channel": item is not None and item.per_channel,
            "weights": int(self.graph.array(weight).size) if is_float else None,
            "zeros": zeros, "zeros_after": zeros if item is None else int(np.sum(item.values == 0)),
            "storage": packed.get(weight if item is None else item.name, "dense"),
        }  # fmt: skip

    def _reason(self, weight: str, item: Stored | None) -> str:
        if item is None:
            return self.reasons.get(weight, "it could not be quantised")
        if item.status == "int8":
            return "weight and activations are int8"
        if self.options["activations"] == "none":
            return "stored as int8, a float when the model is loaded"
        return "stored as int8, a float when the model is loaded: its operator or its layout has no int8 kernel"

    def after(self, sample: Any) -> Size:
        """Size of the result: parameters as numbers, whatever their type."""
        size = measure(self.base, sample)
        lost = sum(int(np.sum(item.values == 0) - np.sum(self.graph.array(name) == 0)) for name, item in self.stored.items())
        return Size(size.params, size.nonzero_params - lost, size.macs)


def build_quantize_report(
    evidence: Evidence, stages: Sequence[Stage], verification: Verification, dataset: Dataset, run: Options,
    seconds: Mapping[str, float], progress: calibrate.Progress,
) -> dict[str, Any]:  # fmt: skip
    """Compare the stages, and every key that README.md lists."""
    sample = next(iter(dataset.batches(1, limit=1)))
    found = [
        compare_models(stages[0].model, stage.model, dataset, limit=run.samples, seed=run.seed, threads=run.threads, progress=progress)
        for stage in stages[1:]
    ]
    speed = _speed([next(stage.model for stage in stages if stage.name == "input"), evidence.shipped], dataset, run)
    sha256, size = files.identity(evidence.shipped, evidence.target, evidence.origin)
    rows = _stage_rows(evidence, stages, found)
    return {
        "schema": SCHEMA,
        "input": {
            "path": None if evidence.path is None else str(evidence.path), "sha256": evidence.given[0],
            "bytes": evidence.given[1], **asdict(measure(files.hoist(evidence.model), sample)),
        },
        "output": {
            "path": None if evidence.target is None else str(evidence.target), "sha256": sha256, "bytes": size,
            **asdict(evidence.after(sample)),
        },
        "options": dict(evidence.options),
        "data": {"source": dataset.source, "kind": dataset.kind, "samples": found[-1].samples, "labelled": dataset.labelled},
        "stages": rows,
        "speed": {"ms_per_sample_before": speed[0], "ms_per_sample_after": speed[1]},
        "layers": evidence.rows(),
        "folded": list(evidence.folded),
        "verification": {
            "checker": verification.checker,
            "dense_vs_output_max_abs": verification.max_abs,
            "dense_vs_output_max_rel": verification.max_rel,
        },
        "timing": {stage: round(value, 4) for stage, value in seconds.items()},
        "warnings": [*evidence.notes, *_warnings(evidence, rows, found, dataset, speed)],
    }  # fmt: skip


def _stage_rows(evidence: Evidence, stages: Sequence[Stage], found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """A row per stage; agreement is with the first, which has none."""
    rows = []
    for stage, quality in zip(stages, [None, *found], strict=True):
        document = quality_report(found[-1] if quality is None else quality)
        rows.append(
            {
                "stage": stage.name,
                "bytes": files.identity(stage.model, None, evidence.origin)[1] if stage.size is None else stage.size,
                "agreement": None if quality is None else document["agreement"],
                "accuracy": document["accuracy_before" if quality is None else "accuracy_after"],
            }
        )
    return rows


def _speed(models: Sequence[onnx.ModelProto], dataset: Dataset, run: Options) -> list[float]:
    """Milliseconds per sample of each model: the median of a few runs of one batch, in turns, after one that does not count."""
    batch = next(iter(dataset.batches(8, limit=run.samples, seed=run.seed)))
    sessions = [Session(model, run.threads) for model in models]
    times: list[list[float]] = [[] for _ in models]
    begin = time.perf_counter()
    while len(times[0]) < _ROUNDS + 1 and (len(times[0]) < 2 or time.perf_counter() - begin < _ROUND_SECONDS):
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(batch.feed, source=batch.source)
            taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken[1:]) / max(batch.size, 1) for taken in times]


def _warnings(
    evidence: Evidence, rows: Sequence[Mapping[str, Any]], found: Sequence[Comparison], dataset: Dataset, speed: Sequence[float]
) -> list[str]:
    warnings = [*found[-1].warnings, *dataset.notes]
    before = next(row for row in rows if row["stage"] == "input")
    if found[-1].samples < 128:
        warnings.append(f"only {found[-1].samples} samples were used; 128 or more give steadier ranges of the activations")
    if rows[-1]["bytes"] >= before["bytes"]:
        warnings.append("the file is not smaller than the input")
    worst, top = _worst(rows[-1])
    was, top_was = _worst(before)  # of a pruned model the original may differ already
    advice = "use --activations none, try another --method, or --skip layers that need more than 8 bits"
    advice = advice if evidence.options["activations"] != "none" else "leave layers alone with --skip"
    if worst < 0.9 and worst < was - 0.05:
        warnings.append(f"the outputs agree poorly with those of stage {rows[0]['stage']} (cosine {worst:.3f}); {advice}")
    elif top < 0.9 and top < top_was - 0.05:
        warnings.append(f"the top class is another one on {100 * (1 - top):.1f} % of the samples; {advice}")
    if speed[1] > _SLOWER * speed[0] and evidence.options["activations"] != "none":
        warnings.append(
            f"the result is slower here than the input ({speed[1]:.3g} and {speed[0]:.3g} ms per sample); "
            "--activations none keeps the input's speed"
        )
    return warnings


def _worst(row: Mapping[str, Any]) -> tuple[float, float]:
    """The lowest cosine and the lowest share of equal top classes of a stage's outputs; 1 where there is nothing to compare."""
    items = list((row["agreement"] or {}).values())
    return min((item["cosine"] for item in items), default=1.0), min((item["top1"] for item in items if "top1" in item), default=1.0)
