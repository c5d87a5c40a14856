"""Networks twice, for `make bench-interpreter` and tests: as a plain nn.Module, and as an ONNX model with the same weights."""

from __future__ import annotations

from typing import Any

import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn


class LeNet5(nn.Module):
    """LeNet-5 on 28 x 28 digits, as in sample_models."""

    shape = (1, 28, 28)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x))).flatten(1)
        return self.fc3(self.relu(self.fc2(self.relu(self.fc1(x)))))

    def write(self, graph: Emitter) -> str:
        x = "input"
        for layer in (self.conv1, self.conv2):
            x = graph.op("MaxPool", graph.op("Relu", graph.layer(layer, x)), kernel_shape=[2, 2], strides=[2, 2])
        x = graph.op("Flatten", x)
        x = graph.op("Relu", graph.layer(self.fc1, x))
        x = graph.op("Relu", graph.layer(self.fc2, x))
        return graph.layer(self.fc3, x)


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs), nn.ReLU()
        self.down = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride != 1 else None
        self.down_bn = nn.BatchNorm2d(outputs) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.down is None or self.down_bn is None else self.down_bn(self.down(x))
        return self.relu(y + shortcut)

    def write(self, graph: Emitter, x: str) -> str:
        y = graph.op("Relu", graph.layer(self.bn1, graph.layer(self.conv1, x)))
        y = graph.layer(self.bn2, graph.layer(self.conv2, y))
        shortcut = x if self.down is None else graph.layer(self.down_bn, graph.layer(self.down, x))
        return graph.op("Relu", graph.op("Add", y, shortcut))


class ResNet18(nn.Module):
    """ResNet-18 (11.7 million weights) on 64 x 64 images."""

    shape = (3, 64, 64)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        plan = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
        self.blocks = nn.Sequential(*(Block(*sizes) for sizes in plan))
        self.average, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.average(self.blocks(x)).flatten(1))

    def write(self, graph: Emitter) -> str:
        x = graph.op("Relu", graph.layer(self.bn1, graph.layer(self.conv1, "input")))
        x = graph.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        for block in self.blocks:
            x = block.write(graph, x)
        return graph.layer(self.fc, graph.op("Flatten", graph.op("GlobalAveragePool", x)))


class Emitter:
    """An ONNX graph in the making. Initializers have the names of the module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.names = {id(value): name for name, value in (*module.named_parameters(), *module.named_buffers())}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node; the name of its output."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def layer(self, layer: Any, x: str) -> str:
        """A layer with weights."""
        if isinstance(layer, nn.Conv2d):
            weights = self._stored(layer.weight, layer.bias)
            return self.op("Conv", x, *weights, kernel_shape=[*layer.kernel_size], strides=[*layer.stride], pads=[*layer.padding] * 2)
        if isinstance(layer, nn.BatchNorm2d):
            weights = self._stored(layer.weight, layer.bias, layer.running_mean, layer.running_var)
            return self.op("BatchNormalization", x, *weights, epsilon=layer.eps, momentum=0.9)
        return self.op("Gemm", x, *self._stored(layer.weight, layer.bias), transB=1)

    def _stored(self, *values: Tensor | None) -> list[str]:
        found = [(self.names[id(value)], value) for value in values if value is not None]
        self.initializers += [numpy_helper.from_array(value.detach().numpy(), name) for name, value in found]
        return [name for name, _ in found]


def to_onnx(module: Any) -> onnx.ModelProto:
    """The same network as an ONNX model with an open batch axis."""
    graph = Emitter(module)
    output = module.write(graph)
    sizes = ["batch", *module.shape]
    proto = helper.make_graph(
        graph.nodes,
        type(module).__name__,
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, ["batch", None])],
        graph.initializers,
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def build(kind: type[nn.Module]) -> nn.Module:
    """A network with the same weights every time."""
    torch.manual_seed(0)
    return kind()
