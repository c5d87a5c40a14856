"""The second table of bench-oneshot: ResNets without whole channels, repaired without training, at 75 and 50 % of the multiply-accumulates.

Models, images and the count of work are those of bench-flow-channels, and so are the peers' numbers (benchmarks/results/flow_channels.json,
chosen on the test images, which favours them). Latency is measured as bench-latency does: original and pruned model in turn, one thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks import latency, oneshot_run
from benchmarks.flow_channels_data import (
    FIRST,
    FORMS,
    INPUT,
    MODELS,
    TARGETS,
    Cells,
    Row,
    accuracies,
    images,
    model_path,
    onnx_macs,
    runner,
    unpack_images,
)
from benchmarks.zoo_models import RESULTS
from relief_onnx.options import CHOICES

CRITERIA = ("flow", "flow-obs")
BATCHES = (1, 8)  # of images, for latency
# Accuracy in percent that issue 5 asks for on ResNet-20, by share of the work.
FLOORS = {0.75: 91.8, 0.5: 88.5}


def bench(names: Sequence[str], stored: Cells, folder: Path, limit: int, threads: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each model with its original's figures, a row per criterion, form of the file and target, and the peers' best."""
    unpack_images()
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "calib.npz"
    np.savez(data, **{INPUT: images("calib")[0]})  # type: ignore[arg-type]
    for name in names:
        original = onnx.load(model_path(name, "folded"))
        rows = [
            stored.get((name, *key), lambda name=name, key=key: measure(name, *key, data, folder, limit, threads))
            for key in ((criterion, form, target) for criterion in CRITERIA for form in FORMS for target in TARGETS)
        ]
        entry = stored.get((name, "original"), lambda original=original: {"macs": onnx_macs(original), **accuracies(runner(original))})
        yield name, {**entry, "rows": rows, "peers": peers(name)}


def measure(name: str, criterion: str, form: str, target: float, data: Path, folder: Path, limit: int, threads: int) -> Row:
    """One cut: accuracy, share of the work, seconds, memory and latency beside the original's."""
    row: Row = {"criterion": criterion, "form": form, "target": target}
    if criterion not in CHOICES["criterion"]:
        return row | {"reason": f"this version has no criterion {criterion}"}
    options = {"criterion": criterion, "granularity": "channel", "keep": f"{100 * target:g}%", "round_to": 1, "repair": "least-squares"}
    file = folder / "pruned.onnx"
    row |= oneshot_run.run(model_path(name, form), data, file, options | {"storage": "dense", "threads": threads}, limit)
    if "reason" in row:
        return row
    original, pruned = onnx.load(model_path(name, form)), onnx.load(file)
    row |= {"share": round(onnx_macs(pruned) / onnx_macs(original), 4)} | accuracies(runner(pruned))
    shown = images("test")[0]
    return row | {"latency": {str(batch): latency.compare(original, pruned, {INPUT: shown[:batch]}, 1) for batch in BATCHES}}


def peers(name: str, stored: Path = RESULTS / "flow_channels.json") -> dict[str, dict[str, float]]:
    """The best one-shot result of every peer without labels, by target: percent on the first test images. Empty where nothing is stored."""
    models = json.loads(stored.read_text())["models"] if stored.exists() else {}
    lines = [line for line in models.get(name, {}).get("verdicts", ()) if line["round_to"] == 1]
    return {f"{line['target']:g}": {tool: line[tool] for tool in ("Torch-Pruning", "onnxsim") if tool in line} for line in lines}


def table(name: str, entry: dict[str, Any]) -> str:
    """A model's rows as text."""
    lines = [
        f"{name}, whole channels, one cut and a repair, --round-to 1: {entry['macs'] / 1e6:.1f} MMACs, "
        f"{entry['accuracy_2500']} % on the first {FIRST:,} test images, {entry['accuracy_10000']} % on all"
    ]
    heads = ["criterion", "form", "MACs, %", "accuracy", "on all", "calibrate, choose, repair, s", "MB"]
    heads += [f"latency, batch {batch}" for batch in BATCHES]
    cells = [heads, *(_cells(row) for row in entry["rows"])]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    lines += ["  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    for target, found in entry["peers"].items():
        lines.append(f"  peers at {100 * float(target):g} %: " + ", ".join(f"{tool} {score}" for tool, score in found.items()))
    if name == MODELS[0]:
        lines.append("  floor of the issue: " + ", ".join(f"{100 * target:g} %: {score}" for target, score in FLOORS.items()))
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    start = [row["criterion"], row["form"]]
    if "reason" in row:
        return [*start, f"{100 * row['target']:g}", "-", "-", row["reason"], *["-"] * (1 + len(BATCHES))]
    seconds = " ".join(f"{row['timing'].get(stage, 0.0):.1f}" for stage in ("calibrate", "choose", "repair"))
    times = [f"{t['ms_before']} -> {t['ms_after']} ms, {t['speedup']:.2f} x" for t in row["latency"].values()]
    figures = [f"{100 * row['share']:.1f}", f"{row['accuracy_2500']:.2f}", f"{row['accuracy_10000']:.2f}"]
    return [*start, *figures, seconds, str(row["peak_mb"]), *times]
