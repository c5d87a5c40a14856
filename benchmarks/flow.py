"""make bench-flow: accuracy, or agreement with the original, against the share of weights kept; single weights, nothing repaired.

    python -m benchmarks.flow [--models a,b] [--shares 50,25] [--fresh]

Flow, the opponents without weight updates (flow_rules, and onnxsim's Wanda) and onnxsim's SparseGPT, which updates weights, on the models
of flow_models, calibrated on the same samples, judged on others by flow_metrics. Prints a table per model and who is ahead in how many
cells (flow_cells says what a cell is); writes benchmarks/results/flow.json and flow.svg. Results of the peers are kept under build/flow.
With --models or --shares the results of other models in flow.json stay.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import flow_cells as cells
from benchmarks import flow_data, flow_metrics, flow_models, flow_peers, flow_rules
from benchmarks.zoo_models import RESULTS, ROOT

SHARES = (0.70, 0.50, 0.35, 0.25, 0.20, 0.15, 0.10, 0.05)
PEERS = ROOT / "build" / "peers" / "bin" / "python"
LIMIT_S = 600  # for all shares of one peer on one model
# SparseGPT sums a matrix of inputs times inputs over every position of every sample, once for each share: here it takes fewer samples.
PEER_SAMPLES = {"resnet20": 256, "resnet56": 128}

Row = dict[str, Any]


def own(subject: flow_rules.Subject, name: str, method: str, share: float) -> Row:
    """One of our cuts, measured and judged."""
    start = time.perf_counter()
    cut = flow_rules.RULES[method](subject, share)
    seconds = time.perf_counter() - start
    return {
        "share": share,
        "kept": cut.kept,
        "score": flow_data.evaluate(name, cut.model, "test", subject.threads),
        "seconds": round(seconds, 2),
    }


def specify(subject: flow_rules.Subject, name: str, folder: Path) -> Path:
    """What the peers must know: the same model with every weight an initializer, and which weights count."""
    folder.mkdir(parents=True, exist_ok=True)
    content = subject.graph.model.SerializeToString(deterministic=True)
    model = folder / "plain.onnx"
    model.write_bytes(content)
    flow_data.load(name, "test")
    document = {
        "model": str(model),
        "sha256": hashlib.sha256(content + subject.data.read_bytes()).hexdigest(),
        "weights": {key: list(weight.shape) for key, weight in subject.weights.items()},
        "samples": PEER_SAMPLES.get(name),
        "threads": subject.threads,
    }
    target = folder / "spec.json"
    target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return target


def bench(name: str, shares: tuple[float, ...], peers: Path, threads: int, limit: int) -> dict[str, Any]:
    """All methods on one model."""
    folder = flow_models.CACHE / name
    subject = flow_rules.Subject(flow_models.path(name), flow_data.file(name, "calib_a"), folder, threads)
    spec = specify(subject, name, folder)
    flow_rules.forget(subject)
    with ThreadPoolExecutor(1) as pool:  # the peers one after the other on one core, ours on the other
        jobs = {
            method: pool.submit(flow_peers.run, peers, name, method, spec, shares, folder / f"{method}.json", limit)
            for method in flow_peers.METHODS
        }
        rows = {method: [own(subject, name, method, share) for share in shares] for method in flow_rules.RULES}
        rows |= {method: job.result() for method, job in jobs.items()}
    matched = [own(subject, name, "flow", kept) for kept in cells.needs_match(rows)]
    feed, _ = flow_data.load(name, "calib_a")
    return {
        "kind": flow_models.ENTRIES[name].kind,
        "metric": flow_metrics.describe(name),
        "original": flow_data.evaluate(name, subject.path, "test", threads),
        "prunable_weights": subject.prunable,
        "calibration_samples": len(next(iter(feed.values()))),
        "peer_samples": PEER_SAMPLES.get(name) or len(next(iter(feed.values()))),
        "rows": rows,
        "matched": matched,
    }


def table(name: str, model: dict[str, Any]) -> str:
    """A model's rows as text: one line for each method, one column for each share."""
    shares = [row["share"] for row in next(iter(model["rows"].values()))]
    lines = [
        f"{name} ({model['kind']}, {model['metric']}, original {100 * model['original']:.1f}, {model['prunable_weights']:,} weights)",
        f"  {'kept, %':17}" + "".join(f"{100 * share:>9g}" for share in shares),
    ]
    for method, rows in model["rows"].items():
        lines.append(f"  {method:17}" + "".join(f"{_entry(row):>9}" for row in rows))
    if model["matched"]:
        lines.append(
            "  flow at what peers kept (%): " + ", ".join(f"{100 * r['kept']:.1f}: {100 * r['score']:.1f}" for r in model["matched"])
        )
    reasons = {f"{method}: {row['reason']}" for method, rows in model["rows"].items() for row in rows if "reason" in row}
    return "\n".join([*lines, *(f"  - {reason}" for reason in sorted(reasons))])


def _entry(row: Row) -> str:
    if "score" not in row:
        return "-"
    return f"{100 * row['score']:.1f}" + ("" if abs(row["kept"] - row["share"]) <= cells.SAME_SHARE else "*")


def verdicts(document: dict[str, Any]) -> str:
    """The counts in words, and the aims of the issue."""
    lines = ["cells (ahead / tied / behind / open), flow against"]
    for against, counts in document["cells"].items():
        lines.append(f"  {against:20}" + " / ".join(f"{counts[word]:>3}" for word in ("ahead", "tied", "behind", "open")))
    counts = document["cells"]["all without updates"]
    filled = counts["ahead"] + counts["tied"] + counts["behind"]
    if filled:
        won = 100 * (filled - counts["behind"]) / filled
        lines.append(f"best, or tied with the best, of all without weight updates in {won:.0f} % of {filled} cells (aim 90 %)")
    if "mlp" in document["models"]:
        model = document["models"]["mlp"]
        words = cells.versus(model["rows"], model["matched"], "sparsegpt")
        answers = [f"{100 * row['share']:g} %: {word}" for row, word in zip(model["rows"]["sparsegpt"], words, strict=True)]
        lines.append("MLP against SparseGPT (aim: ahead from 20 % down): " + ", ".join(answers))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(flow_models.NAMES), help="names, separated by commas")
    parser.add_argument("--shares", default=",".join(f"{100 * share:g}" for share in SHARES), help="percent kept, separated by commas")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="threads of each run")
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds for one peer on one model")
    parser.add_argument("--peers", type=Path, default=PEERS, help="python of the peers' environment")
    parser.add_argument("--fresh", action="store_true", help="measure everything again; without, models that this code has measured stay")
    given = parser.parse_args()
    names = given.models.split(",")
    unknown = sorted(set(names) - set(flow_models.NAMES))
    if unknown or not given.peers.exists():
        parser.error(f"there is no model {', '.join(unknown)}" if unknown else f"{given.peers} is missing: make build/peers/.installed")
    shares = tuple(float(share) / 100 for share in given.shares.split(","))
    target = RESULTS / "flow.json"
    document = json.loads(target.read_text()) if target.exists() else {"models": {}}
    code, onnxsim = _code(shares), flow_peers.version(given.peers)
    for name in names:
        start = time.perf_counter()
        known = document["models"].get(name)
        if given.fresh or known is None or known.get("code") != code:
            document["models"][name] = bench(name, shares, given.peers, given.threads, given.limit) | {
                "code": code,
                "seconds": round(time.perf_counter() - start, 1),
            }
        print(table(name, document["models"][name]), flush=True)
        write(document, target, onnxsim)
    print(verdicts(document))


def write(document: dict[str, Any], target: Path, onnxsim: str) -> None:
    """The JSON and the plot, with the counts over all models that are there."""
    from benchmarks.flow_plot import draw

    libraries = ("numpy", "onnx", "onnxruntime")
    document |= {
        "cells": cells.summary(document["models"]),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: metadata.version(name) for name in libraries} | {"onnxsim": onnxsim},
    }
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    draw(document, target.with_suffix(".svg"))


def _code(shares: tuple[float, ...]) -> str:
    """A key of everything that results depend on: the library, this benchmark, the shares."""
    files = [*sorted((ROOT / "relief_onnx").glob("*.py")), *sorted(Path(__file__).parent.glob("flow*.py"))]
    files = [file for file in files if not file.name.startswith("flow_channels")]  # another benchmark
    return hashlib.sha256(b"".join(file.read_bytes() for file in files) + repr(shares).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
