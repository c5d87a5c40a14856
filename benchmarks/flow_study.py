"""make study-flow: which choices inside the criterion flow are best. Nothing here sees a test sample.

    python -m benchmarks.flow_study [--models a,b] [--shares 50,25]

Every choice is calibrated on one half of the calibration data and judged on the other (`calib_a`, `calib_b` of flow_data). Prints, for each
choice and model, the mean score over the shares kept, and the median over models of its difference to the default;
writes benchmarks/results/flow_study.json. docs/flow.md discusses the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from benchmarks import flow_data, flow_models
from benchmarks.zoo_models import RESULTS
from relief_onnx import calibrate
from relief_onnx import model as files
from relief_onnx.compensate import compensate
from relief_onnx.cut import Pool, cut
from relief_onnx.data import ImageOptions, open_dataset
from relief_onnx.decide import SHIFT_EXPONENT, kept_portions
from relief_onnx.flow import DEFAULT_RULE, FlowMeasure, FlowRule
from relief_onnx.graph import Graph
from relief_onnx.layers import find
from relief_onnx.masks import Masks, applied, initializer_masks
from relief_onnx.prepared import Prepared, prepare
from relief_onnx.probes import instrument
from relief_onnx.scoring import Scores
from relief_onnx.surgery import apply_weights

MODELS = ("mlp", "lenet5", "resnet20", "ppocr_cls", "yunet_n", "dtln_2", "minilm_l3")
SHARES = (0.50, 0.35, 0.25, 0.15)


@dataclass(frozen=True)
class Choice:
    """One way to rank, and what happens to means: "off", "full" (all of what is removed), "kept" (times a power of the share
    of its flow that the layer keeps).

    passes: 2 measures again after a first cut to the square root of the share.
    """

    rule: FlowRule = DEFAULT_RULE
    shift: str = "kept"
    power: float = SHIFT_EXPONENT
    passes: int = 1


def choices() -> dict[str, Choice]:
    """Each differs from the default in one place, but for the first rough prototype of flow."""
    one = Choice()
    found = {"default": one, "prototype": Choice(FlowRule(absolute=True, exponent=1.0, balance=0.0), "off")}
    found |= {f"shift {shift}": replace(one, shift=shift) for shift in ("off", "full")}
    found |= {f"shift power {power}": replace(one, power=power) for power in (1, 4)}
    found["second pass"] = replace(one, passes=2)
    changes: Mapping[str, tuple[Any, ...]] = {
        "absolute": (True,), "bits": (0, 2), "constant": (1e-3, 0.1, 1.0), "exponent": (0.5, 0.75, 1.25), "balance": (0.0, 0.5, 1.0),
    }  # fmt: skip
    for key, values in changes.items():
        for value in values:
            if getattr(DEFAULT_RULE, key) != value:
                found[f"{key} {value}"] = replace(one, rule=replace(DEFAULT_RULE, **{key: value}))
    return found


@dataclass
class Subject:
    """A model that was calibrated once for each kind of statistic."""

    name: str
    model: onnx.ModelProto | None = None
    ready: Prepared = field(init=False)
    measured: dict[tuple[bool, int], FlowMeasure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ready = prepare(flow_models.path(self.name) if self.model is None else self.model)

    def scores(self, rule: FlowRule) -> Scores:
        """Shares and R by a rule, from the pass that its statistics need."""
        key = rule.absolute, rule.bits
        if key not in self.measured:
            data = open_dataset(flow_data.file(self.name, "calib_a"), files.input_specs(self.ready.original), images=ImageOptions())
            grouping = calibrate.sort_samples(self.ready.graph.model, data, rule.bits, limit=None, seed=0, threads=1)
            measure = FlowMeasure(self.ready.graph, self.ready.plan, "weight", rule, grouping)
            probe = instrument(self.ready.graph, [item.tensor for item in measure.measurements])
            calibrate.run(probe, measure.measurements, data, limit=None, seed=0, threads=1, progress=lambda *_: None, grouping=grouping)
            self.measured[key] = measure
        return self.measured[key].with_rule(rule).scores({})

    def cut(self, choice: Choice, share: float) -> onnx.ModelProto:
        """The model with zeros in it, and means in its biases."""
        if choice.passes > 1:
            first = self.cut(replace(choice, passes=1), share**0.5)
            return Subject(self.name, first).cut(replace(choice, passes=1), share)
        graph, plan = self.ready.graph, self.ready.plan
        scores = self.scores(choice.rule)
        masks, _ = cut(plan, scores, [Pool(tuple(plan.by_weight()), None)], share, choice.rule)
        if choice.shift != "off":
            graph = self._shifted(graph, masks, scores, choice.shift, choice.power)
        return apply_weights(graph.model, applied(graph, initializer_masks(find(graph), masks)))

    def _shifted(self, graph: Graph, masks: Masks, scores: Scores, shift: str, power: float) -> Graph:
        means = {name: score.means for name, score in scores.items() if score.means is not None}
        portions = kept_portions(graph, self.ready.plan, scores, masks, power) if shift == "kept" else None
        model, _ = compensate(graph, self.ready.plan, masks, means, {}, portions)
        return Graph(model)


def study(names: list[str], shares: list[float]) -> dict[str, Any]:
    """Scores by model, choice and share."""
    found: dict[str, Any] = {}
    for name in names:
        subject = Subject(name)
        found[name] = {"original": flow_data.evaluate(name, subject.ready.graph.model, "calib_b", 1), "choices": {}}
        print(f"{name}, original {100 * found[name]['original']:.1f}", flush=True)
        for label, choice in choices().items():
            scores = [flow_data.evaluate(name, subject.cut(choice, share), "calib_b", 1) for share in shares]
            found[name]["choices"][label] = dict(zip([f"{100 * share:g}" for share in shares], scores, strict=True))
            print(f"  {label:18}" + "".join(f"{100 * score:8.1f}" for score in scores) + f"   mean {100 * np.mean(scores):.2f}", flush=True)
    return found


def medians(found: Mapping[str, Any]) -> dict[str, float]:
    """For each choice the median over models and shares of its difference to the default, in points, and mean over models."""
    result = {}
    for label in choices():
        gains = [
            100 * (model["choices"][label][share] - model["choices"]["default"][share]) / model["original"]
            for model in found.values()
            for share in model["choices"][label]
        ]
        result[label] = {"median": statistics.median(gains), "mean": statistics.fmean(gains), "ahead": sum(gain > 0 for gain in gains),
                         "behind": sum(gain < 0 for gain in gains)}  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--shares", default=",".join(f"{100 * share:g}" for share in SHARES))
    given = parser.parse_args()
    found = study(given.models.split(","), [float(share) / 100 for share in given.shares.split(",")])
    summary = medians(found)
    print("difference to the default, in percent of the original's score:")
    for label, row in summary.items():
        print(f"  {label:18} median {row['median']:+6.2f}  mean {row['mean']:+6.2f}  ahead {row['ahead']}, behind {row['behind']}")
    (RESULTS / "flow_study.json").write_text(json.dumps({"models": found, "summary": summary}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
