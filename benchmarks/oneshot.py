"""make bench-oneshot: accuracy, or agreement with the original, against the share of weights kept; one cut, repaired without training.

    python -m benchmarks.oneshot [--parts weights,channels,ablation] [--models a,b] [--shares 50,25] [--methods "flow + repair"] [--fresh]

weights: models, shares, samples and judge of bench-flow. Ours with `--repair least-squares` (and flow without it), onnxsim's Wanda and
SparseGPT at the density that they really reached, magnitude per layer and over the network. oneshot_cells counts who is ahead.
channels: ResNets without whole channels (oneshot_channels). ablation: which part of the repair does what (oneshot_ablation).

Every run of ours is a process with a time limit. Runs are kept under build/oneshot until the library or the code that judges changes, so a
run that was stopped goes on; the peers' runs are those of bench-flow, under build/flow. After every model all is written to
benchmarks/results/oneshot.json and oneshot.svg; models, methods and parts that are not asked for stay as they were.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import flow, flow_data, flow_metrics, flow_models, flow_peers, flow_plot, flow_rules, oneshot_run
from benchmarks import oneshot_cells as cells
from benchmarks.flow_channels_data import Cells
from benchmarks.zoo_models import RESULTS, ROOT
from relief_onnx.options import CHOICES

CACHE = ROOT / "build" / "oneshot"
LIMIT_S = 900  # for one run of ours
PARTS = ("weights", "channels", "ablation")
OWN: dict[str, dict[str, str]] = {
    "flow": {"criterion": "flow", "repair": "none"},
    "flow + repair": {"criterion": "flow", "repair": "least-squares"},
    "flow-obs + repair": {"criterion": "flow-obs", "repair": "least-squares"},
}
METHODS = (*OWN, *cells.OPPONENTS)
LOOK = flow_plot.Look(
    "one cut, no training, single weights",
    {
        "flow-obs + repair": ("#000000", "o"),
        "flow + repair": ("#0072B2", "o"),
        "flow": ("#56B4E9", "o"),
        "magnitude-layer": ("#E69F00", "v"),
        "magnitude-global": ("#CC79A7", "^"),
        "wanda": ("#D55E00", "X"),
        "sparsegpt": ("#009E73", "D"),
    },
    cells.REPAIRED,
    ("flow", "sparsegpt"),
    flow_plot.PEER_LABELS,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the command line says. peer_limit: seconds for all missing shares of one peer on one model, 0: take what is there."""

    shares: tuple[float, ...]
    methods: tuple[str, ...]
    peers: Path
    threads: int
    limit: int
    peer_limit: int
    fresh: bool


def own(name: str, method: str, share: float, given: Settings) -> Row:
    """One of our runs, as a user calls it, and judged."""
    row: Row = {"share": share}
    options = OWN[method]
    if options["criterion"] not in CHOICES["criterion"]:
        return row | {"reason": f"this version has no criterion {options['criterion']}"}
    keep = {"keep": f"{100 * share:.4g}%", "granularity": "weight", "storage": "dense", "threads": given.threads}
    target = CACHE / name / "pruned.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    row |= oneshot_run.run(flow_models.path(name), flow_data.file(name, "calib_a"), target, options | keep, given.limit)
    if "reason" not in row:
        row["score"] = flow_data.evaluate(name, target, "test", given.threads)
    return row


def by_magnitude(subject: flow_rules.Subject, name: str, method: str, share: float) -> Row:
    """A cut that needs no data."""
    cut = flow_rules.RULES[method](subject, share)
    return {"share": share, "kept": cut.kept, "score": flow_data.evaluate(name, cut.model, "test", subject.threads)}


def peer_rows(name: str, method: str, subject: flow_rules.Subject, given: Settings) -> list[Row]:
    """A peer's rows, those of bench-flow where they are there: it keeps them under the resolved path of its specification."""
    folder = (flow_models.CACHE / name).resolve()
    cache = folder / f"{method}.json"
    before = json.loads(cache.read_text()) if cache.exists() else None
    spec = flow.specify(subject, name, folder)
    rows = flow_peers.run(given.peers, name, method, spec, given.shares, cache, given.peer_limit)
    if before and before["rows"] and json.loads(cache.read_text())["key"] != before["key"]:  # it took hours: keep it aside
        (folder / f"{method}_{before['key']}.json").write_text(json.dumps(before, indent=1, sort_keys=True) + "\n")
    reasons = _reasons_of_flow(name, method) if given.peer_limit == 0 else {}
    return [row if "score" in row else row | {"reason": reasons.get(f"{row['share']:g}", row["reason"])} for row in rows]


def _reasons_of_flow(name: str, method: str) -> dict[str, str]:
    """Why bench-flow has no result there."""
    stored = RESULTS / "flow.json"
    models = json.loads(stored.read_text())["models"] if stored.exists() else {}
    return {f"{row['share']:g}": row["reason"] for row in models.get(name, {"rows": {}})["rows"].get(method, ()) if "reason" in row}


def bench(name: str, given: Settings, known: dict[str, Any]) -> dict[str, Any]:
    """All methods on one model; those not asked for from what is known."""
    stored = Cells(CACHE / f"{name}.json", {"code": code()})
    if given.fresh:
        stored.rows = {key: row for key, row in stored.rows.items() if key.split("|")[0] not in given.methods}
    subject = flow_rules.Subject(flow_models.path(name), flow_data.file(name, "calib_a"), flow_models.CACHE / name, given.threads)
    rows: dict[str, list[Row]] = {}
    matched: dict[str, list[Row]] = {}
    for method in (*cells.OPPONENTS, *OWN):
        if method not in given.methods:
            before = known.get("rows", {}).get(method, [])
            if [row["share"] for row in before] == list(given.shares):
                rows[method] = before
                matched |= {method: found} if (found := known["matched"].get(method)) else {}
        elif method in flow_peers.METHODS:
            rows[method] = peer_rows(name, method, subject, given)
        else:
            make = _maker(subject, name, method, given)
            rows[method] = [stored.get((method, f"{share:g}"), lambda make=make, share=share: make(share)) for share in given.shares]
            if method in cells.REPAIRED and any("score" in row for row in rows[method]):
                shares = cells.needs_match(rows, method)
                matched[method] = [stored.get((method, f"{share:.4f}"), lambda make=make, share=share: make(share)) for share in shares]
    return {
        "kind": flow_models.ENTRIES[name].kind,
        "metric": flow_metrics.describe(name),
        "original": flow_data.evaluate(name, subject.path, "test", given.threads),
        "prunable_weights": subject.prunable,
        "calibration_samples": len(next(iter(flow_data.load(name, "calib_a")[0].values()))),
        "rows": {method: rows[method] for method in METHODS if method in rows},
        "matched": matched,
        "codes": {method: code() if method in given.methods else known["codes"][method] for method in rows},
    }


def _maker(subject: flow_rules.Subject, name: str, method: str, given: Settings) -> Callable[[float], Row]:
    if method in OWN:
        return lambda share: own(name, method, share, given)
    return lambda share: by_magnitude(subject, name, method, share)


def code(*more: str) -> str:
    """A key of what rows depend on: the library, and the modules that make samples, models, cuts and judgements."""
    modules = ("flow_data", "flow_inputs", "flow_sound", "flow_metrics", "flow_models", "flow_rules", "oneshot_run", *more)
    files = [*sorted((ROOT / "relief_onnx").glob("*.py")), *(Path(__file__).parent / f"{module}.py" for module in modules)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def table(name: str, model: dict[str, Any]) -> str:
    """bench-flow's table, and our runs at shares that peers kept."""
    lines = [flow.table(name, model | {"matched": []})]
    for method, rows in model["matched"].items():
        entries = [f"{100 * row['kept']:.1f}: {100 * row['score']:.1f}" for row in rows if "score" in row]
        lines += [f"  {method} at what peers kept (%): {', '.join(entries)}"] if entries else []
    return "\n".join(lines)


def write(document: dict[str, Any], target: Path) -> None:
    """The JSON, with the counts over all models that are there, and the plot."""
    models = document.get("models", {})
    libraries = ("numpy", "onnx", "onnxruntime")
    document |= {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: metadata.version(name) for name in libraries},
        "cells": {method: cells.counts(models, method) for method in cells.REPAIRED},
        "left_of_sparsegpt": {method: cells.median_left(models, method) for method in cells.REPAIRED},
        "cost": {name: {method: cells.cost(model["rows"].get(method, ())) for method in cells.REPAIRED} for name, model in models.items()},
    }
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    if models:
        flow_plot.draw(document, target.with_suffix(".svg"), LOOK)


def weights(document: dict[str, Any], names: Sequence[str], given: Settings, target: Path) -> None:
    """The first part."""
    models = document.setdefault("models", {})
    for name in names:
        models[name] = bench(name, given, models.get(name, {}))
        print(table(name, models[name]), flush=True)
        write(document, target)
    print(cells.verdicts(models), flush=True)


def main() -> None:
    from benchmarks import oneshot_ablation, oneshot_channels

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--models", default=",".join(flow_models.NAMES), help="of the weights, separated by commas")
    parser.add_argument("--shares", default=",".join(f"{100 * share:g}" for share in flow.SHARES), help="of the weights, percent kept")
    parser.add_argument("--methods", default=",".join(METHODS), help="of the weights, separated by commas")
    parser.add_argument("--ablation-models", default=",".join(oneshot_ablation.SHARES), help="separated by commas")
    parser.add_argument("--channel-models", default=",".join(oneshot_channels.MODELS), help="separated by commas")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds for one run of ours")
    parser.add_argument("--peer-limit", type=int, default=flow.LIMIT_S, help="seconds for one peer on one model; 0: only what is there")
    parser.add_argument("--peers", type=Path, default=flow.PEERS, help="python of the peers' environment")
    parser.add_argument("--fresh", action="store_true", help="measure our runs again, also those that this code has measured")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "oneshot.json")
    told = parser.parse_args()
    parts, names, methods = told.parts.split(","), told.models.split(","), told.methods.split(",")
    lists = (
        (parts, PARTS), (names, flow_models.NAMES), (methods, METHODS), (told.ablation_models.split(","), oneshot_ablation.SHARES),
        (told.channel_models.split(","), oneshot_channels.MODELS),
    )  # fmt: skip
    for chosen, valid in lists:
        if unknown := sorted(set(chosen) - set(valid)):
            parser.error(f"there is no {', '.join(unknown)} among {', '.join(valid)}")
    if "weights" in parts and not told.peers.exists():
        parser.error(f"{told.peers} is missing: make build/peers/.installed")
    shares = tuple(float(share) / 100 for share in told.shares.split(","))
    given = Settings(shares, tuple(methods), told.peers, told.threads, told.limit, told.peer_limit, told.fresh)
    document = json.loads(told.output.read_text()) if told.output.exists() else {}
    if "weights" in parts:
        weights(document, names, given, told.output)
    if "channels" in parts:
        stored = _stored("channels", told.fresh, "flow_channels_data", "latency")
        for name, entry in oneshot_channels.bench(told.channel_models.split(","), stored, CACHE / "channels", told.limit, told.threads):
            document.setdefault("channels", {})[name] = entry
            print(oneshot_channels.table(name, entry), flush=True)
            write(document, told.output)
    if "ablation" in parts:
        stored = _stored("ablation", told.fresh, "oneshot_ablation")
        for name in told.ablation_models.split(","):
            document.setdefault("ablation", {})[name] = oneshot_ablation.study(name, stored, told.threads)
            print(oneshot_ablation.table(name, document["ablation"][name]), flush=True)
            write(document, told.output)


def _stored(part: str, fresh: bool, *modules: str) -> Cells:
    """What was measured of a part with this code; nothing, where all is to be measured again."""
    stored = Cells(CACHE / f"{part}.json", {"code": code(*modules)})
    if fresh:
        stored.rows = {}
    return stored


if __name__ == "__main__":
    main()
