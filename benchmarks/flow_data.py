"""Samples for the flow benchmark and the judge: `load(name, split)`, `evaluate(name, model, split)`.

Splits are disjoint and always the same: `calib_a` calibrates, `calib_b` is for choosing settings, `test` for results and nothing else.
MNIST and CIFAR-10 are genuine images with labels; the inputs of the other models are real, rendered or synthesised, see flow_inputs.
They are written to build/flow as .npz once, where the peers' environment (numpy, onnx, onnxruntime) reads them too.
"""

from __future__ import annotations

import hashlib
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from benchmarks import flow_metrics as metrics
from benchmarks import flow_models as models
from benchmarks.flow_models import NAMES

__all__ = ["NAMES", "SPLITS", "Feed", "calibration", "evaluate", "file", "load", "outputs"]

SPLITS = ("calib_a", "calib_b", "test")
LABELLED = {"calib_a": 1000, "calib_b": 2000, "test": 2500}
BATCH = 64  # rows that the judge runs at once, where the model takes more than one

Feed = dict[str, NDArray[Any]]

_SEEDS = {"calib_a": 11, "calib_b": 12, "test": 13}
_FIXED_BATCH = ("yunet_n", "dtln_2")
_NORMAL = (np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32))


def load(name: str, split: str) -> tuple[Feed, NDArray[np.int64] | None]:
    """The inputs of a model, every array with the samples on its first axis, and labels [n] where there are any.

    Inputs of a model whose batch is fixed to 1 have the same form: sample i is row i of every array, see `calibration`.
    """
    stored = _file(name, split)
    if not stored.exists():
        stored.parent.mkdir(parents=True, exist_ok=True)
        feed, labels = _make(name, split)
        part = stored.with_suffix(".part.npz")
        arrays: dict[str, Any] = {**feed, **({} if labels is None else {"label": labels})}
        np.savez(part, **arrays)
        part.replace(stored)
    with np.load(stored) as found:
        feed = {key: found[key] for key in found.files if key != "label"}
        return feed, found["label"] if "label" in found.files else None


def calibration(name: str, split: str = "calib_a", batch: int = 1, samples: int | None = None) -> list[Feed]:
    """The same samples, or the first so many, as a list of feeds of `batch` rows: what the peers take, for every model alike."""
    feed, _ = load(name, split)
    count = min(len(next(iter(feed.values()))), samples or sys.maxsize)
    step = 1 if name in _FIXED_BATCH else batch
    return [{key: value[start : min(start + step, count)] for key, value in feed.items()} for start in range(0, count, step)]


def evaluate(name: str, model: onnx.ModelProto | bytes | Path, split: str, threads: int = 1) -> float:
    """How good a model is on a split, 0..1: accuracy where there are labels, else agreement with the original (flow_metrics says how)."""
    _, labels = load(name, split)
    values = outputs(name, model, split, threads)
    if labels is not None and name not in metrics.AGAINST_ORIGINAL:
        return metrics.accuracy(values, labels)
    return metrics.AGAINST_ORIGINAL[name](values, _original(name, split, threads))


def outputs(name: str, model: onnx.ModelProto | bytes | Path, split: str, threads: int = 1) -> dict[str, NDArray[np.float64]]:
    """The outputs that count, float64, stacked over the samples of a split."""
    content = model if isinstance(model, bytes) else model.read_bytes() if isinstance(model, Path) else model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = list(metrics.OUTPUTS.get(name, tuple(item.name for item in session.get_outputs())))
    runs = [session.run(names, feed) for feed in calibration(name, split, BATCH)]
    return {key: np.concatenate([run[slot] for run in runs]).astype(np.float64) for slot, key in enumerate(names)}


@lru_cache(maxsize=4)
def _original(name: str, split: str, threads: int) -> dict[str, NDArray[np.float64]]:
    return outputs(name, models.path(name), split, threads)


def file(name: str, split: str) -> Path:
    """The .npz of a split as `relief_onnx.prune` reads it: the inputs by name, and `label`."""
    load(name, split)
    return _file(name, split)


def _file(name: str, split: str) -> Path:
    """Named after the code that makes the samples, so that a change makes them anew."""
    code = b"".join((Path(__file__).parent / f"{module}.py").read_bytes() for module in ("flow_data", "flow_inputs", "flow_sound"))
    return models.CACHE / "data" / f"{name}_{split}_{hashlib.sha256(code).hexdigest()[:10]}.npz"


def _make(name: str, split: str) -> tuple[Feed, NDArray[np.int64] | None]:
    """Fresh samples. Raises KeyError for a name or split that is not there."""
    seed = _SEEDS[split]
    if name in ("mlp", "lenet5"):
        images, labels = _choose(*models.mnist("t10k" if split == "test" else "train"), split, models.TRAINED)
        return {"image": images[:, None].astype(np.float32) / np.float32(255)}, labels
    if name in ("resnet20", "resnet56"):
        images, labels = _cifar(split)
        mean, std = _NORMAL
        return {"input": np.ascontiguousarray(((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))}, labels
    from benchmarks import flow_inputs as inputs

    if name == "minilm_l3":
        ids = inputs.passages(split, 192)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}, None
    if name in ("ppocrv4_rec", "ppocr_cls"):
        pixels, turned = inputs.lines(split, 64, 320, False, seed) if name == "ppocrv4_rec" else inputs.lines(split, 200, 192, True, seed)
        return {"x": np.ascontiguousarray((pixels[..., ::-1].astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2))}, turned
    if name == "dtln_2":
        from benchmarks import flow_sound

        return flow_sound.dtln_2(seed, 384), None
    size, count = {"nudenet_320n": (320, 64), "yunet_n": (320, 96), "vit_s_focus": (224, 24)}[name]
    scenes = inputs.scenes(split, count, size, seed)
    if name == "nudenet_320n":
        return {"images": np.ascontiguousarray((scenes.astype(np.float32) / 255).transpose(0, 3, 1, 2))}, None
    if name == "yunet_n":  # OpenCV's order of colours, values 0..255
        return {"input": np.ascontiguousarray(scenes[..., ::-1].astype(np.float32).transpose(0, 3, 1, 2))}, None
    mean, std = _NORMAL
    return {"input_image": np.ascontiguousarray(((scenes.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))}, None


def _choose(images: NDArray[Any], labels: NDArray[Any], split: str, count: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """A seeded draw: both calibration halves out of the first `count` training images, the test out of the test images."""
    order = np.random.RandomState(1).permutation(len(images) if split == "test" else count)
    start = LABELLED["calib_a"] if split == "calib_b" else 0
    chosen = np.sort(order[start : start + LABELLED[split]])
    return images[chosen], labels[chosen].astype(np.int64)


def _cifar(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [n, 32, 32, 3]: the first sheet of the test images, or images of the first two training sheets."""
    if split == "test":
        return cifar_sheet("test", 0), np.load(models.DATA / "cifar10" / "test_labels.npy")[: LABELLED["test"]].astype(np.int64)
    images = np.concatenate([cifar_sheet("train", sheet) for sheet in (0, 1)])
    return _choose(images, np.load(models.DATA / "cifar10" / "train_labels.npy")[: len(images)], split, len(images))


def cifar_sheet(part: str, sheet: int) -> NDArray[np.uint8]:
    """2,500 images uint8 [n, 32, 32, 3] of `train` (sheets 0..19) or `test` (0..3)."""
    from PIL import Image

    pixels = np.asarray(Image.open(models.DATA / "cifar10" / f"{part}_{sheet:02}.webp"))
    return pixels.reshape(50, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
