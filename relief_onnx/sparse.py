"""Sparse initializers of a file as dense ones: what scores, masks and surgery work on. `pack` stores them compactly again."""

from __future__ import annotations

import numpy as np
import onnx

from relief_onnx.aside import array_of, tensor_of

__all__ = ["densified"]


def densified(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A copy with dense initializers in place of sparse ones, and their names; the model itself where there are none."""
    names = tuple(sparse.values.name for sparse in model.graph.sparse_initializer)
    if not names:
        return model, names
    result = onnx.ModelProto()
    result.CopyFrom(model)
    result.graph.initializer.extend(_dense(sparse) for sparse in result.graph.sparse_initializer)
    del result.graph.sparse_initializer[:]
    return result, names


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    values, places, shape = array_of(sparse.values), array_of(sparse.indices), tuple(sparse.dims)
    found = np.zeros(shape, values.dtype)
    if places.ndim == 2:  # a row of indices for each value, else one index into the flat tensor
        found[tuple(places.T)] = values
    else:
        found.reshape(-1)[places] = values
    return tensor_of(found, sparse.values.name)
