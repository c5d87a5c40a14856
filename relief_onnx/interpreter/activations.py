"""Rows for activations, softmax and Dropout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from relief_onnx.interpreter.registry import Mode, Table
from relief_onnx.interpreter.values import scalar

__all__ = ["ACTIVATIONS", "ROWS"]

ROWS = Table()
op = ROWS.op

for name, function in {"Relu": torch.relu, "Sigmoid": torch.sigmoid, "Softplus": F.softplus, "Softsign": F.softsign}.items():
    op(name)(function)


@op("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


@op("PRelu")
def prelu_per_channel(x: Tensor, slope: Tensor) -> Tensor:
    """Before opset 7: one slope, or one for each channel."""
    return F.prelu(x, slope)


@op("PRelu", since=7)
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@op("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, 0.0)


@op("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@op("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


@op("Selu")
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * F.elu(x, alpha)


@op("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


@op("HardSwish")
def hard_swish(x: Tensor) -> Tensor:
    return F.hardswish(x)


@op("Mish")
def mish(x: Tensor) -> Tensor:
    return F.mish(x)


@op("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@op("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x * torch.sigmoid(alpha * x)


@op("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


@op("Softmax")
def softmax_of_rows(x: Tensor, *, axis: int = 1) -> Tensor:
    """Before opset 13: over all axes from `axis` on."""
    return torch.softmax(_rows(x, axis), 1).reshape(x.shape)


@op("Softmax", since=13)
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


@op("LogSoftmax")
def log_softmax_of_rows(x: Tensor, *, axis: int = 1) -> Tensor:
    return torch.log_softmax(_rows(x, axis), 1).reshape(x.shape)


@op("LogSoftmax", since=13)
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


@op("Hardmax")
def hardmax_of_rows(x: Tensor, *, axis: int = 1) -> Tensor:
    return hardmax(_rows(x, axis)).reshape(x.shape)


@op("Hardmax", since=13)
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


def _rows(x: Tensor, axis: int) -> Tensor:
    """[outer, inner], cut at an axis."""
    return x.flatten(axis % x.dim() if axis < 0 else axis).flatten(0, axis - 1) if axis % x.dim() else x.reshape(1, -1)


@op("Dropout", host=(1, 2), pure=False)
def dropout(
    x: Tensor, ratio: float | None = 0.5, training_mode: bool | None = False, *, seed: int = 0, outputs: int = 1, state: Mode
) -> Tensor | tuple[Tensor, Tensor]:
    """Active where the graph asks for it and the network is training: what an inference graph skips stays skipped."""
    share = 0.5 if ratio is None else scalar(ratio)
    if not (scalar(training_mode) and state.training) or share == 0:
        return x if outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))
    mask = torch.rand_like(x) >= share
    y = x * mask / (1 - share)
    return y if outputs == 1 else (y, mask)


# What recurrent operators and fused ones name: functions of the value, alpha and beta, with the standard's defaults.
ACTIVATIONS = {
    "Affine": lambda x, alpha=1.0, beta=0.0: alpha * x + beta,
    "Elu": lambda x, alpha=1.0, beta=0.0: F.elu(x, alpha),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1),
    "LeakyRelu": lambda x, alpha=0.01, beta=0.0: F.leaky_relu(x, alpha),
    "Relu": lambda x, alpha=0.0, beta=0.0: torch.relu(x),
    "ScaledTanh": lambda x, alpha=1.0, beta=1.0: alpha * torch.tanh(beta * x),
    "Sigmoid": lambda x, alpha=0.0, beta=0.0: torch.sigmoid(x),
    "Softplus": lambda x, alpha=0.0, beta=0.0: F.softplus(x),
    "Softsign": lambda x, alpha=0.0, beta=0.0: F.softsign(x),
    "Tanh": lambda x, alpha=0.0, beta=0.0: torch.tanh(x),
    "ThresholdedRelu": lambda x, alpha=1.0, beta=0.0: torch.where(x > alpha, x, 0.0),
}
