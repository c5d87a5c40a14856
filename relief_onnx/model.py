"""Reading and writing model files: the one place that touches .onnx files on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError, EncodeError
from onnx import external_data_helper, helper

from relief_onnx.datatypes import InputSpec
from relief_onnx.errors import ModelError, OutputError
from relief_onnx.graph import FLOATS, Graph, subgraphs

__all__ = ["check_target", "input_specs", "load", "prepare", "save", "serialize", "write_atomically"]

ModelSource = str | os.PathLike[str] | onnx.ModelProto


def load(source: ModelSource) -> onnx.ModelProto:
    """Read a model with its external data, or take a copy of a ModelProto.

    Raises ModelError with one sentence where the file is missing, empty, truncated or not ONNX, or its external data is
    missing or lies outside the model's folder.
    """
    if isinstance(source, onnx.ModelProto):
        model = onnx.ModelProto()
        model.CopyFrom(source)
        _check_plausible(model, "the given ModelProto")
        return model
    path = Path(source)
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give the .onnx file inside it")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist; check the path of the model") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if not content:
        raise ModelError(f"{path} is empty; export or copy the model again")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise ModelError(f"{path} is truncated or not an ONNX model; export or copy it again") from error
    _check_plausible(model, str(path))
    _load_external(model, path)
    return model


def _check_plausible(model: onnx.ModelProto, what: str) -> None:
    if not model.HasField("graph") or not model.graph.output or not model.opset_import:
        raise ModelError(f"{what} is truncated or not an ONNX model (no graph, outputs or opset); export or copy it again")
    for item in model.graph.initializer:
        if item.data_location == onnx.TensorProto.EXTERNAL:
            continue
        try:
            size = onnx.numpy_helper.to_array(item).size
        except (ValueError, TypeError) as error:
            raise ModelError(f"{what} is damaged: initializer {item.name} does not hold what its shape says; export it again") from error
        del size


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for item in node.attribute:
            if item.type == onnx.AttributeProto.TENSOR:
                yield item.t
            elif item.type == onnx.AttributeProto.TENSORS:
                yield from item.tensors
        for body in subgraphs(node):
            yield from _tensors(body)


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    folder = path.parent.resolve()
    for tensor in _tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        info = external_data_helper.ExternalDataInfo(tensor)
        target = folder / info.location
        if Path(info.location).is_absolute() or not target.resolve().is_relative_to(folder):
            raise ModelError(
                f"{path}: initializer {tensor.name} points to external data outside the model's folder ({info.location}); "
                "save the model again with its data beside it"
            )
        if not target.is_file():
            raise ModelError(f"{path}: external data file {info.location} of initializer {tensor.name} is missing; put it beside the model")
        if target.stat().st_size < (info.offset or 0) + (info.length or 0):
            raise ModelError(f"{path}: external data file {info.location} is too short for initializer {tensor.name}; copy it again")
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except (onnx.checker.ValidationError, OSError, ValueError) as error:
            raise ModelError(f"{path}: external data of initializer {tensor.name} cannot be read ({error}); copy it again") from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which float tensors in Constant nodes (as Paddle writes every weight) are initializers of the same name, and local
    functions are inlined.

    The function computed is the same; everything after this sees one kind of weight. The model itself where there is none.
    """
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    if not any(_held_tensor(node) is not None for node in model.graph.node):
        return model
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    graph = prepared.graph
    outputs = {item.name for item in graph.output}
    keep = []
    for node in graph.node:
        tensor = _held_tensor(node)
        if tensor is None or node.output[0] in outputs or model.ir_version < 4:
            keep.append(node)
            continue
        initializer = graph.initializer.add()
        initializer.CopyFrom(tensor)
        initializer.name = node.output[0]
    if len(keep) < len(graph.node):
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in keep]
        del graph.node[:]
        graph.node.extend(kept)
    return prepared


def _held_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for item in node.attribute:
        if item.name == "value" and item.t.data_type in FLOATS and len(item.t.dims) >= 1:
            tensor: onnx.TensorProto = item.t
            return tensor
    return None


def input_specs(model: onnx.ModelProto) -> tuple[InputSpec, ...]:
    """What the model's real inputs (initializers apart) look like.

    Raises ModelError for an input that is not a tensor.
    """
    graph = Graph(model)
    specs = []
    for info in graph.inputs:
        if not info.type.HasField("tensor_type"):
            kind = info.type.WhichOneof("value") or "untyped"
            raise ModelError(f"input {info.name} of the model is a {kind}, not a tensor; only tensor inputs can be fed")
        tensor = info.type.tensor_type
        shape = tuple(
            item.dim_value if item.HasField("dim_value") and item.dim_value > 0 else (item.dim_param or None) for item in tensor.shape.dim
        )
        specs.append(InputSpec(info.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape))
    return tuple(specs)


def serialize(model: onnx.ModelProto) -> bytes:
    """The file's bytes, the same for the same model.

    Raises OutputError over protobuf's limit of 2 GB.
    """
    try:
        content: bytes = model.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:
        raise OutputError("the model is over 2 GB, which one .onnx file cannot hold; prune more or split the model") from error
    return content


def sha256(content: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(content).hexdigest()


def check_target(path: Path, force: bool) -> None:
    """Refuse early to write over an existing file without `force`, or where nothing can be written. Raises OutputError."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file in it")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already; choose another name with -o or overwrite it with --force")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a folder, so {path.name} cannot be written there; create it or choose another place")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to ({error.strerror}); choose another place") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename, so that nothing half-written is ever seen. Raises OutputError."""
    name = ""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            name = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except OSError as error:
        if name:
            Path(name).unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written ({error.strerror}); free some space or choose another place") from error


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model file, whole or not at all. Raises OutputError."""
    write_atomically(path, serialize(model))
