"""What both sides of make bench-flow-channels share: models, images, how work and accuracy are counted, the search for a share.

Needs numpy, onnx and onnxruntime only (Pillow where the images are unpacked), so that the peers' environment can use it too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from benchmarks.zoo_models import ROOT, SHARED

CACHE = ROOT / "build" / "flow_channels"
MODELS = ("resnet20_cifar10", "resnet56_cifar10")
FORMS = ("folded", "bn")
TARGETS = (0.75, 0.5)
ROUNDING = (1, 8)
CALIBRATION, FIRST, ALL = 1000, 2500, 10000
BATCH = 250
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INPUT = "input"

Row = dict[str, Any]
Run = Callable[[np.ndarray], np.ndarray]


def model_path(name: str, form: str) -> Path:
    return SHARED / f"{name}_{form}.onnx"


# -- images ----------------------------------------------------------------------------------------------------------------


def unpack_images() -> Path:
    """The images that are needed as uint8 arrays in one file: the peers' environment cannot read WebP."""
    target = CACHE / "images.npz"
    if not target.exists():
        from PIL import Image

        def sheet(name: str) -> np.ndarray:
            tiles = np.array(Image.open(folder / f"{name}.webp").convert("RGB")).reshape(50, 32, 50, 32, 3)
            return tiles.transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)

        folder = SHARED.parent / "data" / "cifar10"
        CACHE.mkdir(parents=True, exist_ok=True)
        np.savez(
            target,
            calib=sheet("train_00")[:CALIBRATION],
            calib_labels=np.load(folder / "train_labels.npy")[:CALIBRATION],
            test=np.concatenate([sheet(f"test_{index:02d}") for index in range(4)]),
            test_labels=np.load(folder / "test_labels.npy"),
        )
    return target


def images(part: str) -> tuple[np.ndarray, np.ndarray]:
    """("calib" or "test") normalised images [n, 3, 32, 32] float32 as the models want them, and labels [n]."""
    with np.load(CACHE / "images.npz") as file:
        pixels, labels = file[part], file[f"{part}_labels"].astype(np.int64)
    values = (pixels.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2), np.float32), labels


def batches(values: np.ndarray, size: int = BATCH) -> Iterator[np.ndarray]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def hits(run: Run, count: int) -> np.ndarray:
    """Of which of the first `count` test images `run` (images -> logits) finds the class."""
    values, labels = images("test")
    found = np.concatenate([run(batch).argmax(1) for batch in batches(values[:count])])
    return np.asarray(found == labels[:count])


def percent(found: np.ndarray) -> float:
    return round(100 * float(found.mean()), 2)


def accuracy(run: Run, count: int) -> float:
    return percent(hits(run, count))


def accuracies(run: Run) -> dict[str, float]:
    found = hits(run, ALL)
    return {"accuracy_2500": percent(found[:FIRST]), "accuracy_10000": percent(found)}


# -- ONNX models -----------------------------------------------------------------------------------------------------------


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def runner(model: onnx.ModelProto) -> Run:
    loaded = session(model)
    return lambda batch: np.asarray(loaded.run(None, {INPUT: batch})[0])


def onnx_macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of all Conv and Gemm nodes for one image: outputs of a real run times the weights that each reads."""
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            shapes[node.output[0]] = tuple(node.attribute[0].t.dims)
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=node.output[0]) for node in layers)
    values = session(probe).run(None, {INPUT: np.zeros((1, 3, 32, 32), np.float32)})
    total = 0
    for node, value in zip(layers, values, strict=True):
        weight = shapes[node.input[1]]
        turned = any(item.name == "transB" and item.i for item in node.attribute)
        reads = int(np.prod(weight[1:])) if node.op_type == "Conv" or turned else weight[0]
        total += value.size * reads
    return total


# -- the search ------------------------------------------------------------------------------------------------------------


def at_most(share: Callable[[float], float], target: float, steps: int = 12, close: float = 0.002) -> tuple[float, float] | None:
    """(kept, share) of what came closest to `target` from below; `share` should not fall as kept, from 0 to 1, grows.

    None where nothing that was tried is small enough. Ends early within `close` of the target.
    """
    low, high = 0.0, 1.0
    best: tuple[float, float] | None = None
    for _ in range(steps):
        kept = (low + high) / 2
        found = share(kept)
        if found > target:
            high = kept
            continue
        low = kept
        if best is None or found > best[1]:
            best = (kept, found)
        if target - found <= close:
            break
    return best


# -- rows ------------------------------------------------------------------------------------------------------------------


class Cells:
    """Rows of one model and one side in a file, by what was measured, so that a run that was stopped goes on."""

    def __init__(self, path: Path, versions: dict[str, str]) -> None:
        self.path, self.versions = path, versions
        self.rows: dict[str, Row] = {}
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["versions"] == versions:
                self.rows = stored["rows"]

    def get(self, key: tuple[Any, ...], make: Callable[[], Row]) -> Row:
        name = "|".join(str(item) for item in key)
        if name not in self.rows:
            self.rows[name] = make()
            self.save()
        return self.rows[name]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"versions": self.versions, "rows": self.rows}, indent=1) + "\n")


def best_rows(rows: list[Row], keys: tuple[str, ...]) -> dict[tuple[Any, ...], Row]:
    """Of the rows with an accuracy, the most accurate on the first images for each combination of `keys`; the first of equals."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in keys)
        if row.get("accuracy_2500") is not None and (key not in found or row["accuracy_2500"] > found[key]["accuracy_2500"]):
            found[key] = row
    return found
