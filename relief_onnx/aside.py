"""Weights set aside: arrays of a large model that live outside of its ModelProto, in files that are mapped into memory.

Protobuf holds at most 2 GB, and every copy of a ModelProto copies what it holds. So the larger initializers of a large model stay in the
user's data files, or go to temporary files: the tensor in the ModelProto says type, shape and a key only. Everything that
reads or makes a tensor does so by `array_of` and `tensor_of`; onnxruntime is told where they lie (see `session`). A tensor that
takes the place of one that is set aside is set aside too, so a small model never meets any of this.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from relief_onnx.errors import OutputError
from relief_onnx.nodes import subgraphs

__all__ = [
    "FROM", "LIMIT", "SMALLEST", "array_of", "as_inputs", "beside", "bytes_of", "held", "hold", "is_aside", "is_mapped", "like", "mapped",
    "moved", "place_of", "plain", "scoped", "set_aside", "settled", "tensor_of", "tensors_of", "whole", "wire_size",
]  # fmt: skip

# What one protobuf message may have, and so one .onnx file without external data.
LIMIT = 2**31 - 1
# Models of so many bytes or more have their weights set aside (masks, unpacked weights and the like make a model several times as large),
# and so much a tensor must have to be worth it.
FROM, SMALLEST = LIMIT // 8, 1 << 16

_LOCATION = "relief-onnx.aside"
# Types whose elements lie in memory as they do in a file.
_KINDS = frozenset({
    TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.INT16,
    TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64, TensorProto.BOOL,
})  # fmt: skip
_numbers = itertools.count()
_held: dict[str, NDArray[Any]] = {}
_made: ContextVar[set[str] | None] = ContextVar("made", default=None)

P = ParamSpec("P")
R = TypeVar("R")


def is_aside(tensor: TensorProto) -> bool:
    """Whether the tensor's values are outside of the ModelProto."""
    return tensor.data_location == TensorProto.EXTERNAL and any(
        item.key == "location" and item.value == _LOCATION for item in tensor.external_data
    )


def array_of(tensor: TensorProto) -> NDArray[Any]:
    """A tensor's values, read-only where they are set aside; `numpy_helper.to_array` for all others."""
    return _held[_key(tensor)] if is_aside(tensor) else numpy_helper.to_array(tensor)


def tensor_of(array: NDArray[Any], name: str, *sources: TensorProto | None) -> TensorProto:
    """A tensor with these values, set aside where any of its sources is and it is large enough; else `numpy_helper.from_array`."""
    if array.nbytes >= SMALLEST and any(item is not None and is_aside(item) for item in sources):
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        if kind in _KINDS:
            held = is_mapped(array) and array.flags.c_contiguous and not array.flags.writeable
            return hold(array if held else _spilled(array), kind, name)
    return numpy_helper.from_array(array, name)


def is_mapped(array: NDArray[Any]) -> bool:
    """Whether an array lies in a file."""
    return _root(array) is not None


def _root(array: NDArray[Any]) -> np.memmap[Any, Any] | None:
    base: Any = array
    found = None
    while isinstance(base, np.ndarray):
        found = base if isinstance(base, np.memmap) else found
        base = base.base
    return found


def beside(array: NDArray[Any], *sources: NDArray[Any]) -> NDArray[Any]:
    """The array itself, or, where any of its sources lies in a file and it is large enough, a read-only copy that does so too."""
    if array.nbytes < SMALLEST or is_mapped(array) or not any(map(is_mapped, sources)):
        return array
    return _spilled(array)


def like(tensor: TensorProto, *sources: TensorProto | None) -> TensorProto:
    """The tensor itself, or, as in `tensor_of`, a copy whose values are set aside."""
    return set_aside(tensor) if any(item is not None and is_aside(item) for item in sources) else tensor


def set_aside(tensor: TensorProto) -> TensorProto:
    """A copy whose values are outside of it; the tensor itself where it is small, or of a type whose elements share bytes."""
    if is_aside(tensor) or tensor.data_type not in _KINDS or plain_bytes(tensor) < SMALLEST:
        return tensor
    return hold(_spilled(numpy_helper.to_array(tensor)), tensor.data_type, tensor.name, tensor.doc_string)


def hold(array: NDArray[Any], kind: int, name: str, doc: str = "") -> TensorProto:
    """A tensor for an array that is mapped from a file already; the array must not change."""
    key = str(next(_numbers))
    _held[key] = array
    made = _made.get()
    if made is not None:
        made.add(key)
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
    if doc:
        tensor.doc_string = doc
    for entry, value in (("location", _LOCATION), ("length", str(array.nbytes)), ("checksum", key)):
        tensor.external_data.add(key=entry, value=value)
    return tensor


def mapped(tensor: TensorProto, path: Path, offset: int, length: int | None) -> TensorProto | None:
    """A tensor whose values lie in that file, read where they lie; None where it is small, or of a type whose elements share bytes.

    Raises ValueError where the file says another length than the shape does, OSError where it cannot be read.
    """
    if tensor.data_type not in _KINDS or plain_bytes(tensor) < SMALLEST:
        return None
    size = plain_bytes(tensor)
    if length is not None and length != size:
        raise ValueError(f"its shape needs {size} bytes, the file has {length}")
    values = np.asarray(np.memmap(path.resolve(), np.uint8, "r", offset, (size,)))
    array = values.view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))
    return hold(array if array.flags.aligned else _spilled(array), tensor.data_type, tensor.name, tensor.doc_string)


def plain(tensor: TensorProto) -> TensorProto:
    """The tensor with its values inside."""
    if not is_aside(tensor):
        return tensor
    found = numpy_helper.from_array(array_of(tensor), tensor.name)
    if tensor.doc_string:
        found.doc_string = tensor.doc_string
    return found


def held(model: onnx.ModelProto) -> list[TensorProto]:
    """Initializers of the main graph that are set aside."""
    return [item for item in model.graph.initializer if is_aside(item)]


def tensors_of(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """All stored tensors: initializers and attributes, those of bodies among them."""
    yield from graph.initializer
    yield from _inner_tensors(graph)


def _inner_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    for node in graph.node:
        for item in node.attribute:
            if item.type == onnx.AttributeProto.TENSOR:
                yield item.t
            elif item.type == onnx.AttributeProto.TENSORS:
                yield from item.tensors
        for body in subgraphs(node):
            yield from tensors_of(body)


def settled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with nothing set aside but initializers of its main graph: onnxruntime is given no others."""
    return _with_values(model, _inner_tensors)


def whole(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all values inside, where a ModelProto can hold them; else the model as it is."""
    return model if bytes_of(model) > LIMIT else _with_values(model, tensors_of)


def _with_values(model: onnx.ModelProto, found: Callable[[onnx.GraphProto], Iterator[TensorProto]]) -> onnx.ModelProto:
    """The model with the values of those tensors inside; the same where none of them is set aside."""
    if not any(map(is_aside, found(model.graph))):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for item in found(result.graph):
        if is_aside(item):
            item.CopyFrom(plain(item))
    return result


def as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with inputs for what is set aside: as much as ONNX's checker and shape inference need to know of large weights."""
    if not held(model):
        return settled(model)
    result = onnx.ModelProto()
    result.CopyFrom(settled(model))
    graph = result.graph
    named = {info.name for info in graph.input}
    graph.input.extend(helper.make_tensor_value_info(x.name, x.data_type, x.dims) for x in held(model) if x.name not in named)
    kept = [TensorProto.FromString(item.SerializeToString()) for item in graph.initializer if not is_aside(item)]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return result


def plain_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's values, of a type whose elements are whole bytes."""
    return int(math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def wire_size(message: TensorProto | onnx.NodeProto) -> int:
    """Serialized bytes of a tensor or node with its values inside."""
    if not isinstance(message, TensorProto) or not is_aside(message):
        return int(message.ByteSize())
    bare = TensorProto(name=message.name, data_type=message.data_type, dims=message.dims)
    if message.doc_string:
        bare.doc_string = message.doc_string
    size = array_of(message).nbytes
    return int(bare.ByteSize()) + 1 + max(1, -(-size.bit_length() // 7)) + size


def bytes_of(model: onnx.ModelProto) -> int:
    """Serialized bytes of a model with all values inside, to a few bytes for each that is set aside."""
    return int(model.ByteSize()) + sum(array_of(item).nbytes for item in tensors_of(model.graph) if is_aside(item))


def moved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with what is set aside in temporary files of ours, for a model whose own data files will go."""
    for item in held(model):
        item.CopyFrom(hold(_spilled(array_of(item)), item.data_type, item.name, item.doc_string))
    return model


def place_of(tensor: TensorProto) -> tuple[Path, int]:
    """The file and the offset at which the values of a tensor lie that is set aside."""
    array = array_of(tensor)
    root = _root(array)
    assert root is not None
    assert root.filename is not None
    return Path(root.filename), int(root.offset) + array.ctypes.data - root.ctypes.data


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="relief-onnx.", ignore_cleanup_errors=True)


def scoped(*kept: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: what was set aside on the way is let go at the end, but for what is in the models `kept`, by name, of the result."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            outer, own, left = _made.get(), set[str](), set[str]()
            token = _made.set(own)
            try:
                result = function(*args, **kwargs)
                left = {_key(item) for name in kept for item in tensors_of(getattr(result, name).graph) if is_aside(item)} & own
                return result
            finally:
                _made.reset(token)
                if outer is not None:
                    outer |= left
                for key in own - left:
                    _held.pop(key, None)

        return run

    return decorate


def _key(tensor: TensorProto) -> str:
    return next(str(item.value) for item in tensor.external_data if item.key == "checksum")


def _spilled(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only copy in a temporary file, whose pages the system can drop from memory and read again; the file goes with the array."""
    path = Path(_folder().name).resolve() / f"{next(_numbers)}"
    try:
        np.ascontiguousarray(array).tofile(path)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(
            f"the temporary folder {tempfile.gettempdir()} cannot hold a weight of {array.nbytes} bytes ({error.strerror or error}); "
            "free some space there, or set TMPDIR to a folder with several times the size of the model"
        ) from error
    mapped = np.memmap(path, np.uint8, "r", shape=(array.nbytes,))
    weakref.finalize(mapped, _remove, path)
    found: NDArray[Any] = np.asarray(mapped).view(array.dtype).reshape(array.shape)
    return found


def _remove(path: Path) -> None:
    """Where a file that is still mapped cannot be removed, it goes with the folder at the end of the process."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
