"""Rows for operators that work entry by entry, with numpy's broadcasting."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from relief_onnx.interpreter.registry import Table
from relief_onnx.interpreter.values import HALVES, scalar, torch_dtype

__all__ = ["ROWS"]

ROWS = Table()
op = ROWS.op

UNARY = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan,
    "Atanh": torch.atanh, "BitwiseNot": torch.bitwise_not, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf,
    "Exp": torch.exp, "Floor": torch.floor, "IsNaN": torch.isnan, "Log": torch.log, "Neg": torch.neg, "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal, "Round": torch.round, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Sqrt": torch.sqrt,
    "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip
BINARY = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
    "Equal": torch.eq, "Greater": torch.gt, "Less": torch.lt, "GreaterOrEqual": torch.ge, "LessOrEqual": torch.le,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip
for name, function in (UNARY | BINARY).items():
    op(name)(function)


@op("Div")
def div(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@op("Pow", frozen=(1,), either=(1,))
def power(base: Tensor, exponent: Any) -> Tensor:
    """A number as exponent has a cheap gradient (x ** 2), a tensor has not."""
    if isinstance(exponent, list):
        single = base.dim() > 0 and torch.Size(_sizes(exponent)).numel() == 1 and len(_sizes(exponent)) <= base.dim()
        exponent = (
            scalar(exponent)
            if single
            else torch.tensor(exponent, dtype=base.dtype if base.is_floating_point() else None, device=base.device)
        )
    return torch.pow(base, exponent).to(base.dtype)


def _sizes(values: Any) -> list[int]:
    """The shape of nested lists."""
    return [len(values), *_sizes(values[0])] if isinstance(values, list) and values else [0] if isinstance(values, list) else []


@op("Mod")
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@op("BitShift")
def bit_shift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    return torch.bitwise_left_shift(a, b) if direction == "LEFT" else torch.bitwise_right_shift(a, b)


@op("Max")
def maximum(*values: Tensor) -> Tensor:
    return reduce(torch.maximum, values)


@op("Min")
def minimum(*values: Tensor) -> Tensor:
    return reduce(torch.minimum, values)


@op("Sum")
def total(*values: Tensor) -> Tensor:
    return reduce(torch.add, values)


@op("Mean")
def mean(*values: Tensor) -> Tensor:
    return reduce(torch.add, values) / len(values)


@op("Where")
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


@op("Clip", host=(1, 2))
def clip(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    low, high = scalar(min), scalar(max)
    return x if low is None and high is None else torch.clamp(x, low, high)


def _known_type(values: Mapping[str, Any]) -> str | None:
    return None if torch_dtype(values["to"]) is not None else f"to {TensorProto.DataType.Name(values['to'])}"


@op("Cast", check=_known_type)
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(torch_dtype(to))


def _whole_words(values: Mapping[str, Any]) -> str | None:
    half = values["to"] in HALVES  # held in single precision, so their bits are not there
    return f"to {TensorProto.DataType.Name(values['to'])}" if half else _known_type(values)


@op("BitCast", check=_whole_words)
def bit_cast(x: Tensor, *, to: int) -> Tensor:
    return x.view(torch_dtype(to))


@op("CastLike")
def cast_like(x: Tensor, target: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(target.dtype)


@op("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    found = torch.isinf(x)
    if not detect_negative:
        found = found & (x > 0)
    return found if detect_positive else found & (x < 0)
