"""Each real model at half of its weights: how much of it is scored, and how well it agrees with the original, repaired and not.

Calibrated with the samples of benchmarks.zoo_samples, judged on others by onnxruntime alone (zoo_check.agreement), nothing trained.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.zoo_check import agreement
from benchmarks.zoo_samples import samples

__all__ = ["RUNS", "half", "scored", "show_half"]

RUNS: Mapping[str, Sequence[str]] = {
    "not repaired": ("--criterion", "flow", "--repair", "none"),
    "repaired": ("--repair", "least-squares"),
}
CALIBRATION, FRESH = 256, 32
# Seconds for one run.
LIMIT = 3600
# Other than CALIBRATION. Text encoders: a sentence is 32 rows only. The largest two: an image takes seconds, and is many rows.
SAMPLES: Mapping[str, int] = {"minilm_l3": 1024, "minilm_l6_int8": 1024, "terrain_unet": 64, "vit_s_focus": 64}


def scored(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of the report's weight parameters: the share that has scores, and the reasons of the largest weights that have none.

    Constants that are no connections between units (anchors, positions that are added) are counted apart.
    """
    constants = [row for row in report["layers"] if row["status"] == "skipped" and row["reason"].startswith("a constant that")]
    rows = [row for row in report["layers"] if row not in constants]
    every = sum(row["weights"] for row in rows)
    left = sorted((row for row in rows if row["status"] == "skipped"), key=lambda row: -row["weights"])
    return {
        "weights": every,
        "share": 1.0 - sum(row["weights"] for row in left) / every if every else None,
        "constants": sum(row["weights"] for row in constants),
        "unexplained": [row["weight"] for row in left if not row["reason"]],
        "left": {row["weight"]: [row["weights"], row["op"], row["reason"][:160]] for row in left[:3]},
    }


def half(row: dict[str, Any], path: Path, program: Sequence[str], threads: int, limit: int, count: int = CALIBRATION) -> dict[str, Any]:
    """The model pruned to half of its weights in each way of RUNS."""
    calibration, what = samples(row, "calib_a", SAMPLES.get(str(row["id"]), count))
    fresh, _ = samples(row, "test", FRESH)
    found: dict[str, Any] = {"samples": len(calibration), "fresh": len(fresh), "inputs": what}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        for index, feed in enumerate(calibration):
            arrays: dict[str, Any] = feed
            np.savez(folder / "data" / f"{index:04}.npz", **arrays)
        for label, options in RUNS.items():
            output, report = folder / f"{label}.onnx", folder / f"{label}.json"
            command = [*program, "prune", str(path), "--data", str(folder / "data"), "-o", str(output), "--json", str(report)]
            command += ["--keep", "50%", "--granularity", "weight", "--threads", str(threads), "--quiet", *options]
            start = time.perf_counter()
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            except subprocess.TimeoutExpired:
                found[label] = {"reason": f"longer than {limit} s"}
                continue
            seconds = round(time.perf_counter() - start, 1)
            if done.returncode:
                lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
                found[label] = {"reason": f"exit {done.returncode}: {(lines or ['no message'])[-1][:200]}", "seconds": seconds}
                continue
            told = json.loads(report.read_text())
            found["scored"] = scored(told)
            values = agreement(path, output, [_known(path, feed) for feed in fresh])
            found[label] = {
                "kept_percent": told["totals"]["kept_percent"],
                "agreement": values,
                "least": min(values.values(), default=None),
                "bytes": [path.stat().st_size, output.stat().st_size],
                "seconds": seconds,
            }
    return found


def show_half(measured: Sequence[Mapping[str, Any]]) -> str:
    """One line for each model, then what is not scored and why."""
    lines = ["At half of the weights (cosine of all outputs with the original's, the worst output; bytes after over before):"]
    lines.append(
        f"{'model':24} {'inputs':18} {'scored %':>8} {'kept %':>7}" + "".join(f"{label:>14} {'bytes':>6} {'s':>6}" for label in RUNS)
    )
    reasons = []
    for row in measured:
        found = row["half"]
        told = found.get("scored", {})
        share = told.get("share")
        line = f"{row['model']:24} {found['inputs']:18} {'-' if share is None else f'{100 * share:.1f}':>8}"
        kept = next((found[label]["kept_percent"] for label in RUNS if "kept_percent" in found[label]), None)
        line += f" {'-' if kept is None else f'{kept:.1f}':>7}"
        for label in RUNS:
            cell = found[label]
            if "agreement" not in cell:
                line += f"{'-':>14} {'-':>6} {'-':>6}"
                reasons.append(f"{row['model']}: {label}: {cell['reason']}")
                continue
            least = cell["least"]
            line += f"{'-' if least is None else f'{least:.4f}':>14} {cell['bytes'][1] / cell['bytes'][0]:>6.2f} {cell['seconds']:>6.1f}"
        lines.append(line)
        reasons += [
            f"{row['model']}: not scored: {name} ({what[1]}, {what[0]:,}): {what[2]}" for name, what in told.get("left", {}).items()
        ]
        reasons += [f"{row['model']}: UNEXPLAINED: {name}" for name in told.get("unexplained", [])]
    return "\n".join([*lines, "", *reasons])


def _known(path: Path, feed: dict[str, Any]) -> dict[str, Any]:
    """Only what the model takes."""
    import onnx

    model = onnx.load(path)
    names = {item.name for item in model.graph.input} - {item.name for item in model.graph.initializer}
    return {name: value for name, value in feed.items() if name in names}


def main() -> None:
    """Some models by name, or all of them, without the other runs of the zoo: python -m benchmarks.zoo_half [NAME ...]

    Results are merged into benchmarks/results/zoo_half.json model by model.
    """
    from benchmarks.zoo import program
    from benchmarks.zoo_models import RESULTS, ZOO, rows

    target = RESULTS / "zoo_half.json"
    stored = json.loads(target.read_text())["models"] if target.exists() else []
    for row in rows():
        if row["id"] in sys.argv[1:] or not sys.argv[1:]:
            measured = {"model": row["id"], "half": half(row, ZOO / f"{row['id']}.onnx", program(), 1, LIMIT)}
            stored = sorted([*(item for item in stored if item["model"] != row["id"]), measured], key=lambda item: str(item["model"]))
            document = {"runs": {name: list(options) for name, options in RUNS.items()}, "models": stored}
            target.write_text(json.dumps(document, indent=1) + "\n")
            print(show_half([measured]), flush=True)
    print(show_half(stored))


if __name__ == "__main__":
    main()
