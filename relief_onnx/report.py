"""The report: one JSON document (schema `relief-onnx/report/1`) that says what happened to every weight and why."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from relief_onnx import model as files
from relief_onnx.aside import array_of
from relief_onnx.blocks import across_blocks
from relief_onnx.channels import Choice
from relief_onnx.compare import Comparison
from relief_onnx.compensate import Shift
from relief_onnx.contest import Contest
from relief_onnx.cut import Floor
from relief_onnx.dataset import Dataset
from relief_onnx.health import Health, check_health
from relief_onnx.layers import Layer, Skipped
from relief_onnx.masks import Masks, initializer_masks
from relief_onnx.measure import measure
from relief_onnx.obs import Improved
from relief_onnx.options import Options
from relief_onnx.pack import PackedTensor
from relief_onnx.paper import Gate
from relief_onnx.patterns import parse_pattern
from relief_onnx.relevance import Even
from relief_onnx.repair import Repaired
from relief_onnx.scoring import Scores
from relief_onnx.state_changes import StateChange, narrowed, state_warning
from relief_onnx.surgery import Operation
from relief_onnx.training import unimproved
from relief_onnx.verify import Verification

if TYPE_CHECKING:
    from relief_onnx.prepared import Prepared

__all__ = ["ONLY_PACKED", "SCHEMA", "Evidence", "build_report", "quality_report", "to_json"]

SCHEMA = "relief-onnx/report/1"

Flags = NDArray[np.bool_]

# A lower cosine, or share of samples with the same top class, is told; and a lower cosine of what was not repaired.
_POOR, _UNREPAIRED = 0.9, 0.95

ONLY_PACKED = "nothing was removed, as what is below the cut is 0 already; the file is smaller because its zeros are stored packed now"

# What one entry of a mask is called, by granularity.
_UNITS: Mapping[str | None, str] = {"connection": "connection", "weight": "single weight", None: "channel"}


@dataclass(frozen=True)
class Evidence:
    """Everything that one run found out about the weights."""

    ready: Prepared
    options: Options
    masks: Masks
    operation: Operation
    packed: tuple[PackedTensor, ...]
    reasons: Mapping[str, str]
    gates: tuple[Gate, ...]
    choices: tuple[Choice, ...]
    shipped: onnx.ModelProto
    scores: Scores
    floors: tuple[Floor, ...] = ()
    shifts: tuple[Shift, ...] = ()
    evenly: tuple[Even, ...] = ()
    repaired: tuple[Repaired, ...] = ()
    improved: Improved | None = None
    retrained: Mapping[str, Any] | None = None
    states: tuple[StateChange, ...] = ()
    ridge: Contest | None = None

    @property
    def pruned(self) -> bool:
        """Whether any connection, bias or unit is gone that was not 0 already."""
        graph = self.ready.graph
        flags = initializer_masks(self.ready.plan, self.masks)
        masked = any(bool(((graph.array(name) != 0) & ~keep).any()) for name, keep in flags.items() if name in graph.initializers)
        return masked or self.operation.units_removed > 0 or bool(self.gates) or any(self._lost(layer) for layer in self._layers())

    @property
    def smaller(self) -> bool:
        """Whether storing weights packed makes the file smaller, whatever else is gone."""
        return bool(self.packed) and files.identity(self.shipped, None, self.ready.origin)[1] < self.ready.bytes

    def _layers(self) -> list[Layer]:
        return [layers[0] for layers in self.ready.plan.by_weight().values()]

    def _lost(self, layer: Layer) -> int:
        """Single weights that were not zero before and are gone."""
        return int((self._before(layer) & ~self.operation.surviving[layer.weight]).sum())

    def _before(self, layer: Layer) -> Flags:
        """Single weights [out, in per group, *kernel] that are not zero in the original."""
        flags: Flags = layer.view.apply(self.ready.graph.array(layer.weight)) != 0
        return flags

    @property
    def _unit(self) -> str:
        return _UNITS[self.options.fine]

    def kept_reasons(self) -> dict[str, str]:
        """Why each weight that lost nothing was kept."""
        return {
            layer.weight: self._kept_reason(layer) for layer in self._layers() if layer.weight not in self.reasons and not self._lost(layer)
        }

    def _group_reasons(self, layer: Layer) -> list[str]:
        """Why the channels that a layer makes, and those that it reads, were not cut; each reason once."""
        own = [choice.reason for choice in self.choices if layer in choice.group.layers and not choice.removed]
        read = [choice.reason for choice in self.choices if layer in choice.group.readers and not choice.removed]
        whose = {
            reason: "the channels that it makes and reads" if reason in own and reason in read
            else "its channels" if reason in own else "the channels that it reads"
            for reason in (*own, *read)
        }  # fmt: skip
        return [f"{channels}: {reason}" for reason, channels in whose.items()]

    def _kept_reason(self, layer: Layer) -> str:
        if self.options.fine is None:
            return "; ".join(self._group_reasons(layer)) or "no channel that it makes or reads can be told apart"
        alpha = self._alpha(layer)
        if self.options.pattern is not None:
            few = layer.in_per_group < parse_pattern(self.options.pattern)[1]
            return (
                f"its neurons have fewer inputs than a block of the pattern {self.options.pattern}" if few
                else f"it has the pattern {self.options.pattern} already"
            )  # fmt: skip
        if not self.masks.keep.get(layer.weight, np.True_).all():
            return f"every {self._unit} below the cut is 0 already"
        if len(self.ready.plan.by_weight()[layer.weight]) > 1:
            return f"some node that shares it needs each {self._unit}" + ("" if alpha is None else f" at alpha {alpha:g}")
        if alpha is None or self.options.by_flow:
            return f"every {self._unit} is above the cut" + ("" if alpha is None else f" that keeps {alpha:g} of the flow")
        return f"every {self._unit} is needed to keep {alpha:g} of the contribution of its output"

    def _alpha(self, layer: Layer) -> float | None:
        """The share that the finest rule of this run kept of a layer: of connections or weights, else of the channels of its group.

        None where a budget or a pattern decides.
        """
        options, names = self.options, (layer.name, layer.weight)
        if options.fine is None:
            return options.unit_alpha_for(names, layer.is_convolution) if options.keep is None else None
        budget = options.keep is not None and not options.by_channel and options.layer_alpha(names) is None
        return None if budget or options.pattern is not None else options.alpha_for(names, layer.is_convolution)

    def rows(self) -> list[dict[str, Any]]:
        """One row for every weight that some tool could prune."""
        packed = {item.name: item for item in self.packed}
        rows = [self._row(layer, packed.get(layer.weight)) for layer in self._layers()]
        sizes = {item.name: int(np.prod(item.dims)) for item in self.operation.model.graph.initializer}
        named = {layer.weight for layer in self.ready.plan.tables if layer.weight in self.masks.keep}
        rows += [self._table_row(layers, packed) for weight, layers in self.ready.plan.by_table().items() if weight in named]
        return rows + [self._skipped_row(row, sizes) for row in self.ready.plan.unranked if row.weight not in named]

    def _table_row(self, layers: tuple[Layer, ...], packed: Mapping[str, PackedTensor]) -> dict[str, Any]:
        """An embedding table that the user named."""
        layer, weight = layers[0], layers[0].weight
        stored = {item.name: item for item in self.operation.model.graph.initializer}
        before, rule = self.ready.graph.array(weight), self.masks.keep[weight]
        left = int(np.count_nonzero(array_of(stored[weight]))) if weight in stored else 0
        lost, below = int(np.count_nonzero(before)) - left, int(rule.size - rule.sum())
        reason = f"entries of rows with a score below the cut, by smoothed frequencies: {below}" if lost else "every entry is above the cut"
        return {
            "node": layer.name, "op": layer.op, "weight": weight, "status": "pruned" if lost else "kept", "reason": reason,
            "connections": before.size, "connections_kept": left, "connections_kept_by_rule": int(rule.sum()),
            "weights": before.size, "weights_kept": left, "alpha": self._alpha(layer),
            "storage": packed[weight].storage if weight in packed else "dense", **self._flow_of(layer),
        }  # fmt: skip

    def _skipped_row(self, row: Skipped, sizes: Mapping[str, int]) -> dict[str, Any]:
        """A weight that no rule ranks, such as an embedding; it can still be narrower, where channels of layers that it meets went."""
        before = int(np.prod(row.shape))
        left = min(sizes.get(row.weight, 0), before) if row.weight in self.ready.graph.initializers else before
        why = self.reasons.get(row.weight, row.reason)
        reason = why if left == before else f"it lost channels with the layers that it is coupled to; no others, because {why}"
        whole = "kept" if row.weight in self.ready.plan.by_table() and not why.startswith("--skip") else "skipped"
        return {
            "node": row.node, "op": row.op, "weight": row.weight, "status": whole if left == before else "pruned", "reason": reason,
            "connections": before, "connections_kept": left, "weights": before, "weights_kept": left, "alpha": None,
        }  # fmt: skip

    def _row(self, layer: Layer, packed: PackedTensor | None) -> dict[str, Any]:
        chosen = layer.weight not in self.reasons
        lost = self._lost(layer)
        every = np.ones(layer.view.shape, bool)
        left = self.operation.surviving[layer.weight] if lost or chosen else every
        rule = self.masks.keep.get(layer.weight, every)
        connections = _connections(left)
        status = "pruned" if lost else ("kept" if chosen else "skipped")
        reason = self._pruned_reason(layer, rule) if lost else self.reasons.get(layer.weight) or self._kept_reason(layer)
        return {
            "node": self.ready.graph.names[layer.node], "op": layer.op, "weight": layer.weight, "status": status, "reason": reason,
            "connections": connections.size, "connections_kept": int(connections.sum()),
            "connections_kept_by_rule": int(_connections(rule).sum()),
            "weights": left.size, "weights_kept": int(left.sum()),
            "alpha": self._alpha(layer) if chosen else None,
            "channels": list(self.operation.channels[layer.name]),
            "storage": packed.storage if packed is not None else "dense", **self._flow_of(layer),
        }  # fmt: skip

    def _pruned_reason(self, layer: Layer, rule: Flags) -> str:
        """What went, counted in the unit of the masks; `rule` flags what the rule keeps."""
        before, left = self._before(layer), self.operation.surviving[layer.weight]
        if self.options.fine != "weight":
            before, left, rule = _connections(before), _connections(left), _connections(rule)
        rule = rule.reshape(*rule.shape, *(1,) * (before.ndim - rule.ndim))
        below, dead = int((before & ~rule).sum()), int((before & rule & ~left).sum())
        cut = "below the cut, by their own score or with their channel" if self.options.by_channel else "with a score below the cut"
        if self.options.fine is None:
            cut = "of channels below the cut"
        parts = (f"{cut}: {below}" if below else "", f"of dead units: {dead}" if dead else "")
        return f"{self._unit if self.options.fine else 'connection'}s " + "; ".join(part for part in parts if part)

    def flow_document(self) -> dict[str, Any] | None:
        """Nodes that passed relevance on evenly, and layers that a floor saved from the ranking; None without the criterion flow."""
        if not self.options.by_flow:
            return None
        return {
            "evenly": [{"node": item.node, "op": item.op, "reason": item.reason} for item in self.evenly],
            "floors": [{"weight": item.weight, "ranked": item.ranked, "kept": item.kept} for item in self.floors],
            "exchanged": [] if self.improved is None else list(self.improved.exchanged),
            "choice": None if self.improved is None else self.improved.document(),
        }

    def _flow_of(self, layer: Layer) -> dict[str, float]:
        """R of all units of a layer together, and the share of its flow that the rule keeps; nothing without the criterion flow."""
        score = self.scores[layer.name]
        if score.relevance is None:
            return {}
        keep, flow = self.masks.keep.get(layer.weight), score.flow
        kept = flow if keep is None else flow * keep.reshape(*keep.shape, *(1,) * (flow.ndim - keep.ndim))
        total = float(flow.sum())
        return {"relevance": float(score.relevance.sum()), "flow_kept": float(kept.sum()) / total if total > 0 else 1.0}

    def group_rows(self) -> list[dict[str, Any]]:
        """What happened to every coupling group; empty where no channels were ranked."""
        return [
            {
                "members": list(choice.group.members), "readers": [layer.name for layer in choice.group.readers],
                "units": choice.group.size, "units_kept": choice.group.size - len(choice.removed), "pinned": len(choice.group.pinned),
                "reason": choice.reason,
            }
            for choice in self.choices
        ]  # fmt: skip


def _connections(flags: Flags) -> Flags:
    """From flags of single weights [out, in per group, *kernel], or of connections, to connections with any of them [out, in per group]."""
    found: Flags = np.any(flags.reshape(*flags.shape[:2], -1), axis=-1)
    return found


def build_report(
    evidence: Evidence, verification: Verification, quality: Comparison, seconds: Mapping[str, float], dataset: Dataset,
    target: Path | None, notes: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The report of one pruning run; every key that README.md lists."""
    ready, rows = evidence.ready, evidence.rows()
    sample = next(iter(dataset.batches(1, limit=1)))
    sha256, size = files.identity(evidence.shipped, target, ready.origin)
    before = measure(ready.counted, sample)
    after = measure(evidence.operation.model, replace(sample, feed=narrowed(sample.feed, evidence.states)))
    health = check_health(ready.graph.model, evidence.operation.model, evidence.operation.dead_branches)
    weights, kept = sum(row["weights"] for row in rows), sum(row["weights_kept"] for row in rows)
    return {
        "schema": SCHEMA,
        "input": {"path": None if ready.path is None else str(ready.path), "sha256": ready.sha256, "bytes": ready.bytes, **asdict(before)},
        "output": {
            "path": None if target is None else str(target), "sha256": sha256, "bytes": size, **asdict(after),
        },
        "options": {key: value for key, value in asdict(evidence.options).items() if key != "layers"}
        | {"layers": dict(evidence.options.layers)},
        "data": {"source": dataset.source, "kind": dataset.kind, "samples": quality.samples, "labelled": dataset.labelled},
        "layers": rows,
        "groups": evidence.group_rows(),
        "flow": evidence.flow_document(),
        "mean_shift": {
            "moved": [shift.layer.name for shift in evidence.shifts if shift.moved],
            "left": [{"node": shift.layer.name, "reason": shift.reason} for shift in evidence.shifts if not shift.moved],
        },
        "repair": {
            "method": evidence.options.repair,
            "ridge": None if evidence.ridge is None else {"taken": evidence.ridge.winner, **evidence.ridge.document()},
            "layers": [
                {
                    "node": row.layer.name, "weight": row.layer.weight, "reason": row.reason,
                    "error_before": row.before, "error_after": row.after,
                }
                for row in evidence.repaired
            ],
        },
        "retrain": evidence.retrained,
        "totals": {"weights": weights, "weights_kept": kept, "kept_percent": 100.0 * kept / max(weights, 1)},
        "units_removed": evidence.operation.units_removed,
        "state_changes": [change.document() for change in evidence.states],
        "health": health.document(),
        "verification": {
            "checker": verification.checker,
            "masked_vs_output_max_abs": verification.max_abs,
            "masked_vs_output_max_rel": verification.max_rel,
            "rounding_max_abs": verification.rounding,
        },
        "quality": quality_report(quality),
        "timing": {**{stage: round(value, 4) for stage, value in seconds.items()}, "plain_inference": round(quality.seconds[0], 4)},
        "warnings": [*notes, *_warnings(evidence, quality, dataset, (before.macs, after.macs), health), *_growth(evidence, size)],
    }  # fmt: skip


def quality_report(quality: Comparison) -> dict[str, Any]:
    """Agreement per output and accuracies; JSON has no infinity, so equal outputs have `sqnr_db` null."""
    agreement = {
        name: {
            "cosine": item.cosine,
            "sqnr_db": item.sqnr_db if math.isfinite(item.sqnr_db) else None,
            "max_abs": item.max_abs if math.isfinite(item.max_abs) else None,
            **({"top1": item.top1} if item.top1 is not None else {}),
        }
        for name, item in quality.outputs.items()
    }
    before, after = quality.accuracy or (None, None)
    return {"agreement": agreement, "accuracy_before": before, "accuracy_after": after, "samples": quality.samples}


def _warnings(evidence: Evidence, quality: Comparison, dataset: Dataset, macs: tuple[int | None, int | None], health: Health) -> list[str]:
    rounds = (evidence.retrained or {}).get("iterations", ())
    found = [*state_warning(evidence.states), *unimproved(evidence.options.training, rounds), *quality.warnings, *dataset.notes]
    if quality.samples < 128:
        found.append(f"only {quality.samples} samples were used; 128 or more give steadier scores")
    if macs[0] is None:
        found.append("MACs are not known: some sizes in the model are only known when it runs")
    keep = evidence.options.keep if evidence.options.by_channel else None
    if keep is not None and macs[0] and macs[1] is not None and macs[1] > keep * macs[0]:
        found.append(
            f"{100 * macs[1] / macs[0]:.3g} % of the MACs are left, more than the {100 * keep:g} % of keep: "
            "groups says which channels cannot go"
        )
    if evidence.options.pattern is not None:
        found += across_blocks(evidence.operation.model, evidence.masks.keep.keys(), evidence.options.pattern)
    if evidence.improved is not None and evidence.improved.effort.left:
        count = len(evidence.improved.effort.left)
        found.append(f"{count} of the weights keep flow's mask: choosing them again would take too long (flow.choice.left in the report)")
    if not evidence.pruned:
        found.append(ONLY_PACKED)
    advice = "raise alpha" if evidence.options.keep is None and evidence.options.pattern is None else "keep more"
    found += health.warnings(advice)
    return found + _disagreement(evidence.options, quality, advice)


def _growth(evidence: Evidence, size: int) -> list[str]:
    """That the file grew though its weights are packed, or were, and by what."""
    dense = evidence.options.storage == "dense"
    if size <= evidence.ready.bytes or (dense and not evidence.ready.packed):
        return []
    causes = ["weights that it stores packed are dense now (--storage dense)"] if dense else []
    added = sum(shift.moved and shift.layer.bias is None for shift in evidence.shifts)
    if added:
        layers = "a layer without a bias has" if added == 1 else f"{added} layers without a bias have"
        causes.append(f"{layers} one now, with the mean of what went (--mean-shift off leaves it out)")
    why = " and ".join(causes) or "what was written besides weights takes more bytes than their zeros save"
    return [f"the file grew from {evidence.ready.bytes:,} to {size:,} bytes: {why}"]


def _disagreement(options: Options, quality: Comparison, advice: str) -> list[str]:
    """That the outputs are others now, and what to do; without a repair there is something to gain earlier on."""
    unrepaired = options.repair == "none"
    if unrepaired:
        advice += ", or add --repair least-squares: what is left is solved for again, without labels"
    worst = min((item.cosine for item in quality.outputs.values()), default=1.0)
    if worst < (_UNREPAIRED if unrepaired else _POOR):
        return [f"the outputs agree poorly with the original's (cosine {worst:.3f}); {advice}"]
    classes = [item.top1 for item in quality.outputs.values() if item.top1 is not None]
    if classes and min(classes) < _POOR:
        return [f"the top class is another one on {100 * (1 - min(classes)):.1f} % of the samples; {advice}"]
    return []


def to_json(document: Mapping[str, Any]) -> bytes:
    """Any of the documents as it stands in a file."""
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()
