"""Rebuild the sample models and their digits: `python sample_models/build.py [DEST]`, about two minutes on two cores.

The data are the 1,797 handwritten digits of 8x8 pixels that scikit-learn ships. They are enlarged to 28x28 in exact
integer arithmetic, stored as 8-bit PNG files, and the networks see exactly those pixels divided by 255.

Each network is written once, as the list of its ONNX nodes. Training interprets that list with torch, and the file
holds the same list, so the two cannot drift apart. Every random number comes from a seeded numpy generator.
"""

from __future__ import annotations

import argparse
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits

Array = npt.NDArray[Any]
Weights = dict[str, Array]
Tensor = Any  # torch is imported only by the functions that train

SEED = 0
SIZE = 28
TEST_SHARE = 0.25
CALIBRATION_IMAGES = 256

EPOCHS = 60
BATCH = 32
LEARNING_RATE = 1e-3
LEARNING_RATE_DROP_EPOCH = 30
WEIGHT_DECAY = 5e-4
MAX_SHIFT = 2
THREADS = 2

DATA = "scikit-learn load_digits: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository"
DATA_CITATION = "E. Alpaydin, C. Kaynak (1998), https://doi.org/10.24432/C50P49"


# --- digits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """All digits, and which of them train, calibrate and test.

    `images` is uint8 [digit, 28, 28], `labels` int64 [digit]; the rest are sorted indices into both, by scikit-learn's
    numbering. `calibration` is a part of `training`; `test` shares nothing with either.
    """

    images: Array
    labels: Array
    training: Array
    calibration: Array
    test: Array


def enlarge(images: Array) -> Array:
    """Bilinear 8x8 -> 28x28 (pixel centres aligned, edges repeated), values 0..16 -> uint8 0..255, rounded half up.

    Source positions are multiples of 1/14, so all of it is integer arithmetic and the same on every machine.
    """
    taps = np.zeros((SIZE, 8), dtype=np.int64)
    for row in range(SIZE):
        left, fraction = divmod(4 * row - 5, 14)  # (row + 1/2) * 8/28 - 1/2, in fourteenths
        taps[row, max(left, 0)] += 14 - fraction
        taps[row, min(left + 1, 7)] += fraction
    weighted = taps @ images.astype(np.int64) @ taps.T * 255
    full = 14 * 14 * 16
    rounded: Array = (2 * weighted + full) // (2 * full)
    return rounded.astype(np.uint8)


def load() -> Digits:
    """Read the digits that scikit-learn ships and split them: a quarter of every class is held out for the test."""
    bunch = load_digits()
    images, labels = enlarge(bunch.images), bunch.target.astype(np.int64)
    rng = np.random.RandomState(SEED)  # the legacy generator: numpy promises that its stream never changes
    by_class = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    test = np.sort(np.concatenate([members[: round(TEST_SHARE * len(members))] for members in by_class]))
    training = np.setdiff1d(np.arange(len(labels)), test)
    calibration = np.sort(rng.permutation(training)[:CALIBRATION_IMAGES])
    return Digits(images, labels, training, calibration, test)


def png_bytes(image: Array) -> bytes:
    """Encode uint8 [row, column] as an 8-bit gray PNG in one stored deflate block.

    Compressors differ between versions of Pillow and zlib; bytes that nobody compressed are the same everywhere.
    """
    height, width = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    block = struct.pack("<BHH", 1, len(rows), len(rows) ^ 0xFFFF) + rows
    stream = b"\x78\x01" + block + struct.pack(">I", zlib.adler32(rows))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", stream), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def digit_files(digits: Digits) -> dict[str, bytes]:
    """Path under `digits/` -> content, for the unlabelled calibration images and the labelled test images."""
    folders = {int(i): "calib" for i in digits.calibration} | {int(i): f"test/{digits.labels[i]}" for i in digits.test}
    return {f"{folder}/digit_{i:04d}.png": png_bytes(digits.images[i]) for i, folder in folders.items()}


def write_digits(digits: Digits, dest: Path) -> None:
    """Write the PNG files under `dest`, and remove those of an earlier split."""
    for stale in dest.rglob("digit_*.png"):
        stale.unlink()
    for name, content in digit_files(digits).items():
        path = dest / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# --- networks ---------------------------------------------------------------------------------------------------------


class Network:
    """A network as its ONNX nodes, with the shape of each parameter and of each value (without the batch axis)."""

    def __init__(self, name: str, title: str) -> None:
        self.name = name
        self.title = title
        self.nodes: list[onnx.NodeProto] = []
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {"image": (1, SIZE, SIZE)}

    def add(self, op: str, name: str, inputs: list[str], shape: tuple[int, ...], doc: str, **attributes: Any) -> str:
        """Append a node and return the name of its output, `NAME.out`."""
        output = f"{name}.out"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, doc_string=doc, **attributes))
        self.shapes[output] = shape
        return output

    def declare(self, name: str, **shapes: tuple[int, ...]) -> list[str]:
        """Register the parameters of layer `name` and return their names as in a PyTorch state_dict."""
        names = {f"{name}.{key}": shape for key, shape in shapes.items()}
        self.parameters |= names
        return list(names)

    def conv(self, x: str, name: str, filters: int, kernel: int, stride: int = 1, pad: int = 0, bias: bool = True) -> str:
        """Square convolution."""
        channels, height, width = self.shapes[x]
        shapes: dict[str, tuple[int, ...]] = {"weight": (filters, channels, kernel, kernel)}
        if bias:
            shapes["bias"] = (filters,)
        inputs = [x, *self.declare(name, **shapes)]
        out = (filters, *((side + 2 * pad - kernel) // stride + 1 for side in (height, width)))
        doc = f"convolution {kernel}x{kernel}, {channels} -> {filters} channels, stride {stride}"
        sizes = {"kernel_shape": [kernel] * 2, "pads": [pad] * 4, "strides": [stride] * 2}
        return self.add("Conv", name, inputs, out, doc, **sizes)

    def norm(self, x: str, name: str) -> str:
        """Batch normalization over the channels of `x`, left as a node of its own."""
        shape = self.shapes[x]
        channels = shape[:1]
        inputs = self.declare(name, weight=channels, bias=channels, running_mean=channels, running_var=channels)
        return self.add("BatchNormalization", name, [x, *inputs], shape, "normalization, not folded", epsilon=1e-5)

    def gemm(self, x: str, name: str, units: int) -> str:
        """Fully connected layer, weight [out, in] as PyTorch stores it."""
        (features,) = self.shapes[x]
        inputs = [x, *self.declare(name, weight=(units, features), bias=(units,))]
        return self.add("Gemm", name, inputs, (units,), f"fully connected, {features} -> {units}", transB=1)

    def relu(self, x: str, name: str) -> str:
        """Rectifier."""
        return self.add("Relu", name, [x], self.shapes[x], "rectifier")

    def max_pool(self, x: str, name: str) -> str:
        """Maximum over 2x2 pixels, halving the picture."""
        channels, height, width = self.shapes[x]
        shape = (channels, height // 2, width // 2)
        return self.add("MaxPool", name, [x], shape, "maximum of 2x2", kernel_shape=[2, 2], strides=[2, 2])

    def mean_pool(self, x: str, name: str) -> str:
        """Mean of each channel over the whole picture."""
        return self.add("GlobalAveragePool", name, [x], (self.shapes[x][0], 1, 1), "mean of each channel")

    def flatten(self, x: str, name: str) -> str:
        """All axes but the batch in one."""
        return self.add("Flatten", name, [x], (math.prod(self.shapes[x]),), "one row per image", axis=1)

    def finish(self) -> Network:
        """Give the last value its public name."""
        last = self.nodes[-1]
        self.shapes["logits"] = self.shapes.pop(last.output[0])
        last.output[0] = "logits"
        return self


def add_classifier(net: Network, x: str, units: tuple[int, ...]) -> None:
    """Fully connected layers with rectifiers between them, numbered as in an `nn.Sequential` named `classifier`."""
    for index, count in enumerate(units):
        if index:
            x = net.relu(x, f"classifier.{2 * index - 1}")
        x = net.gemm(x, f"classifier.{2 * index}", count)


def lenet300() -> Network:
    """LeNet-300-100 (LeCun et al. 1998): 784-300-100-10."""
    net = Network("lenet300", "LeNet-300-100: three fully connected layers, 784-300-100-10")
    add_classifier(net, net.flatten("image", "flatten"), (300, 100, 10))
    return net.finish()


def lenet5() -> Network:
    """LeNet-5 as pruning papers use it: no padding, 28 -> 24 -> 12 -> 8 -> 4 pixels, then 256-120-84-10."""
    net = Network("lenet5", "LeNet-5: two convolutions 5x5 with max pooling, then 256-120-84-10")
    x = "image"
    for index, filters in ((0, 6), (3, 16)):
        x = net.conv(x, f"features.{index}", filters, kernel=5)
        x = net.relu(x, f"features.{index + 1}")
        x = net.max_pool(x, f"features.{index + 2}")
    add_classifier(net, net.flatten(x, "flatten"), (120, 84, 10))
    return net.finish()


def add_residual_block(net: Network, x: str, name: str, filters: int, stride: int) -> str:
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""
    y = net.conv(x, f"{name}.conv1", filters, kernel=3, stride=stride, pad=1, bias=False)
    y = net.relu(net.norm(y, f"{name}.bn1"), f"{name}.relu1")
    y = net.conv(y, f"{name}.conv2", filters, kernel=3, pad=1, bias=False)
    y = net.norm(y, f"{name}.bn2")
    shortcut = x
    if net.shapes[x] != net.shapes[y]:
        shortcut = net.conv(x, f"{name}.downsample.0", filters, kernel=1, stride=stride, bias=False)
        shortcut = net.norm(shortcut, f"{name}.downsample.1")
    total = net.add("Add", f"{name}.add", [y, shortcut], net.shapes[y], "branch + shortcut")
    return net.relu(total, f"{name}.relu2")


def resnet8() -> Network:
    """ResNet-8: a 3x3 convolution, three residual blocks of 16, 32 and 64 channels, one fully connected layer."""
    net = Network("resnet8", "ResNet-8: three residual blocks of 16, 32 and 64 channels")
    x = net.conv("image", "conv1", 16, kernel=3, pad=1, bias=False)
    x = net.relu(net.norm(x, "bn1"), "relu")
    for index, (filters, stride) in enumerate(((16, 1), (32, 2), (64, 2)), start=1):
        x = add_residual_block(net, x, f"layer{index}.0", filters, stride)
    net.gemm(net.flatten(net.mean_pool(x, "avgpool"), "flatten"), "fc", 10)
    return net.finish()


NETWORKS: tuple[Callable[[], Network], ...] = (lenet300, lenet5, resnet8)


# --- training ---------------------------------------------------------------------------------------------------------


def initial_weights(net: Network, rng: np.random.RandomState) -> Weights:
    """He's normal initialization for matrices and kernels; normalizations start as the identity, biases at zero."""
    weights: Weights = {}
    for name, shape in net.parameters.items():
        if len(shape) > 1:
            weights[name] = rng.normal(0, math.sqrt(2 / math.prod(shape[1:])), shape).astype(np.float32)
        else:
            fill = np.ones if name.endswith((".weight", ".running_var")) else np.zeros
            weights[name] = fill(shape, dtype=np.float32)
    return weights


def torch_operators() -> Mapping[str, Callable[..., Tensor]]:
    """ONNX operator -> the same in torch while training, called with the node's inputs and attributes."""
    import torch.nn.functional as F

    def normalize(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, epsilon: float) -> Tensor:
        return F.batch_norm(x, mean, var, scale, bias, training=True, eps=epsilon)

    return {
        "Add": lambda a, b: a + b,
        "BatchNormalization": normalize,
        "Conv": lambda x, w, b=None, *, pads, strides, **_: F.conv2d(x, w, b, strides, pads[:2]),
        "Flatten": lambda x, axis: x.flatten(axis),
        "Gemm": lambda x, w, b, transB: F.linear(x, w, b),
        "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
        "MaxPool": lambda x, kernel_shape, strides: F.max_pool2d(x, kernel_shape, strides),
        "Relu": F.relu,
    }


def forward(net: Network, weights: Mapping[str, Tensor], images: Tensor, operators: Mapping[str, Any]) -> Tensor:
    """Logits [batch, 10] of float32 images [batch, 1, 28, 28]."""
    values = {**weights, "image": images}
    for node in net.nodes:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        values[node.output[0]] = operators[node.op_type](*(values[name] for name in node.input), **attributes)
    return values["logits"]


def shifted(images: Array, rng: np.random.RandomState) -> Array:
    """Move each image [batch, 28, 28] by up to MAX_SHIFT pixels along both axes, with black at the edges."""
    padded = np.pad(images, ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT)))
    down, right = rng.randint(0, 2 * MAX_SHIFT + 1, (2, len(images), 1)) + np.arange(SIZE)
    moved: Array = padded[np.arange(len(images))[:, None, None], down[:, :, None], right[:, None, :]]
    return moved


def train(net: Network, images: Array, labels: Array) -> Weights:
    """Train on uint8 images [n, 28, 28] and return the weights after the last epoch; the test images are never seen."""
    import torch

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    rng = np.random.RandomState(SEED)
    weights = {name: torch.from_numpy(w) for name, w in initial_weights(net, rng).items()}
    learned = [w.requires_grad_() for name, w in weights.items() if ".running_" not in name]
    optimizer = torch.optim.Adam(learned, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [LEARNING_RATE_DROP_EPOCH], gamma=0.1)
    operators = torch_operators()
    for _ in range(EPOCHS):
        for batch in rng.permutation(len(images))[: len(images) // BATCH * BATCH].reshape(-1, BATCH):
            pixels = shifted(images[batch], rng)[:, None].astype(np.float32) / np.float32(255)
            logits = forward(net, weights, torch.from_numpy(pixels), operators)
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return {name: w.detach().numpy() for name, w in weights.items()}


# --- files ------------------------------------------------------------------------------------------------------------


def to_onnx(net: Network, weights: Weights, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The network as an ONNX model: opset 17, IR version 8, a symbolic batch axis, the shape of every value."""

    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *net.shapes[name]])

    graph = helper.make_graph(
        net.nodes,
        net.name,
        inputs=[value("image")],
        outputs=[value("logits")],
        initializer=[numpy_helper.from_array(weights[name], name) for name in net.parameters],
        doc_string=f"{net.title}. Input: gray digit 0..1, light on black. Output: one logit per digit.",
        value_info=[value(name) for name in net.shapes if name not in ("image", "logits")],
    )
    model = helper.make_model(
        graph,
        ir_version=8,
        opset_imports=[helper.make_opsetid("", 17)],
        producer_name="relief-onnx sample_models",
        doc_string=f"{net.title}, trained on the 8x8 digits of scikit-learn enlarged to 28x28.",
    )
    helper.set_model_props(model, dict(metadata))
    return model


def read_test_folder(folder: Path) -> tuple[Array, Array]:
    """Images float32 [n, 1, 28, 28] in 0..1 and labels [n] from `folder/CLASS/*.png`."""
    paths = sorted(folder.glob("*/*.png"))
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    return images[:, None].astype(np.float32) / np.float32(255), np.array([int(path.parent.name) for path in paths])


def count_correct(model: onnx.ModelProto, images: Array, labels: Array) -> int:
    """How many images onnxruntime classifies right."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images})
    return int((np.asarray(logits).argmax(axis=1) == labels).sum())


def describe(correct: int, total: int) -> dict[str, str]:
    """The metadata of a model that classifies `correct` of `total` test images right."""
    return {
        "licence": "model Apache-2.0; training data CC BY 4.0",
        "data": f"{DATA}; {DATA_CITATION}",
        "preprocessing": "8-bit gray pixels / 255, no mean, no standard deviation",
        "training": f"Adam {LEARNING_RATE}, weight decay {WEIGHT_DECAY}, {EPOCHS} epochs, last epoch, seed {SEED}",
        "test_correct": str(correct),
        "test_images": str(total),
        "test_accuracy": f"{correct / total:.4f}",
    }


def build(dest: Path) -> None:
    """Write the digits and the trained networks into `dest`."""
    digits = load()
    write_digits(digits, dest / "digits")
    images, labels = read_test_folder(dest / "digits" / "test")
    for make in NETWORKS:
        net = make()
        weights = train(net, digits.images[digits.training], digits.labels[digits.training])
        correct = count_correct(to_onnx(net, weights, {}), images, labels)
        path = dest / f"{net.name}.onnx"
        path.write_bytes(to_onnx(net, weights, describe(correct, len(labels))).SerializeToString(deterministic=True))
        print(f"{path}: {correct} of {len(labels)} test digits right, {path.stat().st_size:,} bytes")


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description="Rebuild the sample models and their digits.")
    parser.add_argument("dest", nargs="?", type=Path, default=Path(__file__).parent, help="folder to write into")
    build(parser.parse_args().dest)


if __name__ == "__main__":
    main()
