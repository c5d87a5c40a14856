"""Types and stored tensors of ONNX as torch has them. Half precision is held and computed in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from relief_onnx.aside import array_of
from relief_onnx.errors import Unsupported

__all__ = ["FLOATS", "HALVES", "as_list", "scalar", "to_array", "to_tensor", "torch_dtype"]

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
HALVES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.BOOL: torch.bool,
}


def torch_dtype(kind: int) -> torch.dtype | None:
    """The torch type in which tensors of an ONNX element type are computed; None where there is none (text, 8-bit floats)."""
    return _DTYPES.get(kind)


def to_tensor(proto: onnx.TensorProto) -> torch.Tensor:
    """A stored tensor in the type that it is computed in. Raises Unsupported where torch has no such type."""
    if proto.data_type not in _DTYPES:
        kind = onnx.TensorProto.DataType.Name(proto.data_type)
        raise Unsupported(
            f"tensor {proto.name or 'of a Constant'} holds {kind}, which torch cannot compute with; "
            "use --repair least-squares, which needs no torch"
        )
    array = array_of(proto)
    if proto.data_type in HALVES:
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array))  # a copy that torch may write to


def to_array(value: torch.Tensor, kind: int) -> NDArray[Any]:
    """A tensor's values in an ONNX element type."""
    array: NDArray[Any] = value.detach().cpu().numpy().astype(helper.tensor_dtype_to_np_dtype(kind))
    return array


def as_list(value: Any) -> list[Any]:
    """A host value as a list, be it one number, a list or a tuple."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def scalar(value: Any) -> Any:
    """A host value as one number: of a list the only entry."""
    while isinstance(value, list):
        (value,) = value
    return value
