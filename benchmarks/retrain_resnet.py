"""make bench-retrain: ResNet-20 on CIFAR-10, a few epochs of retraining on a processor: a short schedule, not what training could reach.

    python -m benchmarks.retrain_resnet [--shares 25,10,5] [--ways distill,labels] [--epochs 3] [--images 10000]

For each share of the weights one cut (`flow-obs`), repaired without training (`none`) or trained after that for a few epochs on some of the
training images: distilled from the original without labels, or on labels. Accuracy is that of the last epoch on all test images, which
decide nothing. What is done already is read from build/retrain, so a stopped benchmark goes on. Writes benchmarks/results/retrain.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import relief_onnx
from benchmarks.flow_channels_data import ALL, CALIBRATION, INPUT, MEAN, STD, accuracy, model_path, runner, unpack_images
from benchmarks.zoo_models import RESULTS, ROOT, SHARED
from relief_onnx import model as files

CACHE = ROOT / "build" / "retrain"
MODEL = "resnet20_cifar10"
WAYS = {"none": "least-squares", "distill": "distill", "labels": "labels"}
SHEET = 2500  # images of one file


@dataclass(frozen=True)
class Plan:
    """How long it is trained, and on how many of the 50,000 training images."""

    epochs: int = 3
    images: int = 10_000


def training_data(count: int) -> Path:
    """The first training images and their labels as .npy files, written once."""
    folder = CACHE / f"train-{count}"
    if not (folder / "label.npy").exists():
        from PIL import Image

        source = SHARED.parent / "data" / "cifar10"
        sheets = [np.array(Image.open(source / f"train_{index:02d}.webp").convert("RGB")) for index in range(-(-count // SHEET))]
        tiles = np.concatenate([sheet.reshape(50, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3) for sheet in sheets])
        values = (tiles[:count].astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{INPUT}.npy", np.ascontiguousarray(values.transpose(0, 3, 1, 2), np.float32))
        np.save(folder / "label.npy", np.load(source / "train_labels.npy")[:count].astype(np.int64))
    return folder


def measure(share: float, way: str, plan: Plan) -> dict[str, Any]:
    """One cut at a share in percent, repaired in one way. Read from build/retrain where it was done already."""
    note = CACHE / f"{share:g}-{way}.json"
    settings = {} if way == "none" else asdict(plan)
    if note.exists() and (stored := json.loads(note.read_text()))["plan"] == settings:
        return dict(stored)
    training: dict[str, Any] = {} if way == "none" else {"epochs": plan.epochs, "validation": 0.0, "augment": "flip,crop"}
    start = time.perf_counter()
    result = relief_onnx.prune(
        model_path(MODEL, "folded"), training_data(plan.images), keep=f"{share}%", granularity="weight", criterion="flow-obs",
        repair=WAYS[way], samples=CALIBRATION, threads=1, storage="dense", **training,
    )  # fmt: skip
    row = {
        "share": share, "way": way, "plan": settings, "kept_percent": round(result.report["totals"]["kept_percent"], 2),
        "accuracy": accuracy(runner(result.model), ALL), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    files.write_atomically(note, (json.dumps(row, indent=1) + "\n").encode())
    return row


def main() -> None:
    """Run what is asked for, print the table, write the JSON."""
    plan = Plan()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shares", default="25,10,5", help="percent of the weights kept, separated by commas")
    parser.add_argument("--ways", default=",".join(WAYS), help="separated by commas")
    parser.add_argument("--epochs", type=int, default=plan.epochs)
    parser.add_argument("--images", type=int, default=plan.images, help="training images")
    given = parser.parse_args()
    plan = Plan(given.epochs, given.images)
    unpack_images()
    original = accuracy(runner(onnx.load(model_path(MODEL, "folded"))), ALL)
    print(f"{MODEL}, {original} % on the 10,000 test images; {plan.epochs} epochs on {plan.images:,} training images", flush=True)
    rows = []
    for share in given.shares.split(","):
        for way in given.ways.split(","):
            rows.append(measure(float(share), way, plan))
            print("  {share:>4} % kept  {way:8} {accuracy:6.2f} %  {seconds:7.1f} s".format(**rows[-1]), flush=True)
    document = {"model": MODEL, "original": original, "plan": asdict(plan), "rows": rows}
    files.write_atomically(RESULTS / "retrain.json", (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
