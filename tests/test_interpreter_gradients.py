"""Gradients of what torch has no operator for, against finite differences in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from builders import Net
from onnx import TensorProto

from relief_onnx.interpreter import Network

CASES: dict[str, tuple[str, tuple[tuple[int, ...], ...], dict[str, Any], int]] = {
    # operator, shapes of the input and of the weights, attributes, outputs
    "lstm": ("LSTM", ((3, 2, 4), (2, 12, 4), (2, 12, 3), (2, 24)), {"hidden_size": 3, "direction": "bidirectional"}, 3),
    "gru": ("GRU", ((3, 2, 4), (1, 9, 4), (1, 9, 3), (1, 18)), {"hidden_size": 3, "linear_before_reset": 1}, 2),
    "rnn": ("RNN", ((3, 2, 4), (1, 3, 4), (1, 3, 3), (1, 6)), {"hidden_size": 3, "direction": "reverse"}, 2),
    "attention": ("Attention", ((2, 4, 8), (2, 4, 8), (2, 4, 8)), {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1, "softcap": 2.0}, 1),
    "transposed convolution": ("ConvTranspose", ((1, 2, 3, 4), (2, 2, 3, 2), (2,)), {"strides": [2, 1], "pads": [1, 0, 0, 1]}, 1),
    "convolution, same": ("Conv", ((1, 2, 4, 5), (3, 2, 2, 3)), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, 1),
    "average pool, ceil": ("AveragePool", ((1, 2, 5, 5),), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, 1),
    "max pool, dilated": ("MaxPool", ((1, 2, 6, 6),), {"kernel_shape": [2, 2], "dilations": [2, 2], "pads": [1, 0, 0, 1]}, 1),
    "layer norm": ("LayerNormalization", ((2, 3, 4), (3, 4), (3, 4)), {"axis": 1}, 2),
    "lrn": ("LRN", ((1, 5, 2, 2),), {"size": 3, "alpha": 0.5}, 1),
    "lp norm": ("LpNormalization", ((3, 4),), {"axis": 1}, 1),
    "group norm": ("GroupNormalization", ((2, 4, 3), (4,), (4,)), {"num_groups": 2}, 1),
}


def gradcheck(net: Net, inputs: list[tuple[int, ...]], outputs: list[str]) -> None:
    """The network's outputs by its inputs and by all of its weights."""
    network = Network(net.model(*outputs)).double()
    network.train()
    generator = torch.Generator().manual_seed(0)
    fed = [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in inputs]
    weights = list(network.weights().values())

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(network(dict(zip(network.inputs, values[: len(inputs)], strict=True))).values())

    assert torch.autograd.gradcheck(run, (*fed, *weights), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_operators(case: str) -> None:
    operator, shapes, attributes, outputs = CASES[case]
    net = Net(opset=23)
    x = net.input(*shapes[0])
    found = net.op(operator, x, *(net.weight(*shape) for shape in shapes[1:]), outputs=outputs, **attributes)
    gradcheck(net, [shapes[0]], [found] if outputs == 1 else found)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "align_corners", "asymmetric"])
def test_resize(mode: str, coordinates: str) -> None:
    net = Net(opset=19)
    y = net.op("Resize", net.input(1, 2, 4, 3), "", "", net.ints(1, 2, 3, 5), mode=mode, coordinate_transformation_mode=coordinates)
    gradcheck(net, [(1, 2, 4, 3)], [y])


def test_batch_norm_that_trains() -> None:
    net = Net()
    x = net.input(4, 3, 2)
    norm = [net.weight(3), net.weight(3), net.constant(np.zeros(3, np.float32)), net.constant(np.ones(3, np.float32))]
    gradcheck(net, [(4, 3, 2)], [net.op("BatchNormalization", x, *norm)])


def test_quantisation_passes_gradients_straight_through() -> None:
    net = Net(opset=13)
    scale, zero = net.constant(np.float32(0.1)), net.constant(np.int8(3))
    y = net.op("DequantizeLinear", net.op("QuantizeLinear", net.input(5), scale, zero), scale, zero)
    network = Network(net.model(y))
    x = torch.tensor([-50.0, -0.51, 0.24, 1.0, 30.0], requires_grad=True)
    (found,) = network({network.inputs[0]: x}).values()
    with torch.no_grad():
        (plain,) = network({network.inputs[0]: x}).values()
    assert torch.equal(found, plain)
    found.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))


def test_every_weight_of_a_gather_and_scatter_gets_its_share() -> None:
    net = Net(opset=16)
    table, rows = net.weight(5, 3), net.constant(np.array([[0], [4]], np.int64))
    x = net.op("Gather", table, net.op("Cast", net.input(2), to=TensorProto.INT64))
    y = net.op("ScatterND", net.weight(5, 3), rows, x, reduction="add")
    network = Network(net.model(y))
    (found,) = network({network.inputs[0]: torch.tensor([1.0, 1.0])}).values()
    found.sum().backward()
    first, second = network.weights().values()
    assert torch.equal(first.grad, torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0])[:, None].expand(5, 3))
    assert torch.equal(second.grad, torch.ones(5, 3))
