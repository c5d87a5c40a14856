"""Reading and writing model files: the one place that touches .onnx files on disk."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError, EncodeError
from onnx import external_data_helper, helper

from relief_onnx import aside, external
from relief_onnx.aside import array_of, tensors_of
from relief_onnx.datatypes import InputSpec
from relief_onnx.errors import ModelError, OutputError, VerificationError
from relief_onnx.graph import FLOATS, Graph
from relief_onnx.nodes import captured, subgraphs
from relief_onnx.ordering import sort_nodes
from relief_onnx.recurrent_layers import join_biases, split_biases
from relief_onnx.session import Session

__all__ = [
    "Origin", "check_target", "digest", "given_identity", "hoist", "identity", "input_specs", "load", "origin_of", "prepare", "save",
    "serialize", "sha256", "share_again", "write_atomically",
]  # fmt: skip

ModelSource = str | os.PathLike[str] | onnx.ModelProto
Origin = external.Origin


def load(source: ModelSource) -> onnx.ModelProto:
    """Read a model with its external data, or take a copy of a ModelProto; its nodes are sorted (see `ordering`). The weights of a large
    one are set aside (see `aside`).

    Raises ModelError with one sentence where the file is missing, empty, truncated or not ONNX, or its external data is
    missing or lies outside the model's folder.
    """
    if isinstance(source, onnx.ModelProto):
        model = _copy(source)
        _check_plausible(model, "the given ModelProto")
        sort_nodes(model.graph.node)
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
    del content
    _check_plausible(model, str(path))
    large = _check_external(model, path)
    if large:
        model = _copy(model)
    _load_external(model, path, large)
    sort_nodes(model.graph.node)
    return model


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy, with its weights set aside where they are many."""
    stored = model.graph.initializer
    if sum(len(item.raw_data) if item.HasField("raw_data") else 4 * math.prod(item.dims) for item in stored) < aside.FROM:
        result = onnx.ModelProto()
        result.CopyFrom(model)
        return result
    # Field by field, so that nothing large is ever copied as a whole.
    result, graph = onnx.ModelProto(), onnx.GraphProto()
    for message, copy, heavy in ((model, result, "graph"), (model.graph, graph, "initializer")):
        for field, value in message.ListFields():
            if field.name == heavy:
                continue
            if not hasattr(value, "MergeFrom"):
                setattr(copy, field.name, value)
            elif hasattr(value, "add") or hasattr(value, "append"):
                getattr(copy, field.name).MergeFrom(value)
            else:
                getattr(copy, field.name).CopyFrom(value)
    for item in stored:
        graph.initializer.append(item if item.data_location == onnx.TensorProto.EXTERNAL else aside.set_aside(item))
    result.graph.CopyFrom(graph)
    return result


def _check_plausible(model: onnx.ModelProto, what: str) -> None:
    if not model.HasField("graph") or not model.graph.output or not model.opset_import:
        raise ModelError(f"{what} is truncated or not an ONNX model (no graph, outputs or opset); export or copy it again")
    for item in model.graph.initializer:
        if item.data_location == onnx.TensorProto.EXTERNAL:
            continue
        try:
            size = array_of(item).size
        except (ValueError, TypeError) as error:
            raise ModelError(f"{what} is damaged: initializer {item.name} does not hold what its shape says; export it again") from error
        del size


def _external(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, external_data_helper.ExternalDataInfo]]:
    for tensor in tensors_of(model.graph):
        if external_data_helper.uses_external_data(tensor) and not aside.is_aside(tensor):
            yield tensor, external_data_helper.ExternalDataInfo(tensor)


def _check_external(model: onnx.ModelProto, path: Path) -> bool:
    """Whether the model is so large that its weights are set aside. Raises ModelError where data are missing, too short or elsewhere."""
    folder = path.parent.resolve()
    total = 0
    for tensor, info in _external(model):
        target = folder / info.location
        if Path(info.location).is_absolute() or not target.resolve().is_relative_to(folder):
            raise ModelError(
                f"{path}: initializer {tensor.name} points to external data outside the model's folder ({info.location}); "
                "save the model again with its data beside it"
            )
        if not target.is_file():
            raise ModelError(f"{path}: external data file {info.location} of initializer {tensor.name} is missing; put it beside the model")
        size = info.length if info.length is not None else target.stat().st_size - (info.offset or 0)
        if target.stat().st_size < (info.offset or 0) + size:
            raise ModelError(f"{path}: external data file {info.location} is too short for initializer {tensor.name}; copy it again")
        total += size
    return total + path.stat().st_size >= aside.FROM


def _load_external(model: onnx.ModelProto, path: Path, large: bool) -> None:
    folder = path.parent.resolve()
    main = sum(item.data_location == onnx.TensorProto.EXTERNAL for item in model.graph.initializer) if large else 0
    for number, (tensor, info) in enumerate(_external(model)):
        try:
            mapped = aside.mapped(tensor, folder / info.location, info.offset or 0, info.length) if number < main else None
            if mapped is not None:
                tensor.CopyFrom(mapped)
                continue
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except (onnx.checker.ValidationError, OSError, ValueError) as error:
            raise ModelError(f"{path}: external data of initializer {tensor.name} cannot be read ({error}); copy it again") from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def origin_of(source: ModelSource) -> Origin:
    """Where a model file keeps its external data. Raises ModelError, OSError where it cannot be read."""
    if isinstance(source, onnx.ModelProto):
        return Origin()
    path = Path(source)
    model = onnx.ModelProto()
    model.ParseFromString(path.read_bytes())
    places = {tensor.name: info.location for tensor, info in _external(model)}
    return Origin(places, frozenset((path.parent / place).resolve() for place in places.values()))


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which float tensors in Constant nodes (as Paddle writes every weight) are initializers of the same name, local functions
    are inlined, vectors that exporters share because they hold the same numbers (the ones of every norm) have a copy per reader, and
    biases of recurrent nodes are in two halves (see `recurrent_layers`).

    The function computed is the same; everything after this sees one kind of weight. The model itself where there is nothing to do.
    """
    return split_biases(_with_own_vectors(hoist(model)))


def hoist(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without local functions and Constant nodes of floats, but with vectors shared as they were: what `params` counts."""
    return _with_initializers(onnx.inliner.inline_local_functions(model) if model.functions else model)


def share_again(model: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Undo the copies of `prepare` that are still alike, and the halves of biases."""
    model = join_biases(model, original)
    stored = {item.name: item for item in model.graph.initializer}
    known = {item.name for item in original.graph.initializer}
    left = known | {name for node in model.graph.node for body in subgraphs(node) for name in captured(body)}
    renamed = {}
    for name, item in stored.items():
        base = stored.get(name.rpartition("/")[0])
        if name in left or base is None or base.name not in known or base.dims != item.dims:
            continue
        if np.array_equal(array_of(base), array_of(item), equal_nan=True):
            renamed[name] = base.name
    if not renamed:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        for slot, name in enumerate(node.input):
            node.input[slot] = renamed.get(name, name)
    for item in [item for item in result.graph.initializer if item.name in renamed]:
        result.graph.initializer.remove(item)
    return result


def _with_own_vectors(model: onnx.ModelProto) -> onnx.ModelProto:
    fixed = {item.name for item in model.graph.output}
    fixed |= {name for node in model.graph.node for body in subgraphs(node) for name in captured(body)}
    vectors = {
        item.name: item
        for item in model.graph.initializer
        if item.data_type in FLOATS and len(item.dims) > 0 and 1 < np.prod(item.dims) == max(item.dims) <= LARGEST_VECTOR
    }
    uses = Counter(name for node in model.graph.node for name in node.input)
    shared = {name for name in vectors if uses[name] > 1 and name not in fixed}
    if not shared or model.ir_version < 4:
        return model
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    taken = {item.name for item in model.graph.initializer} | {name for node in model.graph.node for name in node.output}
    seen = {name for node in model.graph.node if node.op_type in WITH_BIAS for name in node.input}
    for node in prepared.graph.node:
        if node.op_type in WITH_BIAS:
            continue
        for slot, name in enumerate(node.input):
            if name in shared and name in seen:
                own = next(f"{name}/{number}" for number in count(1) if f"{name}/{number}" not in taken)
                taken.add(own)
                copy = prepared.graph.initializer.add()
                copy.CopyFrom(vectors[name])
                copy.name = node.input[slot] = own
            seen.add(name)
    return prepared


# Vectors up to that length are copied for each reader.
LARGEST_VECTOR = 1 << 16
# A bias that layers share stays shared: the weights beside it usually are.
WITH_BIAS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def _with_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
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
        specs.append(InputSpec(info.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape, tensor.HasField("shape")))
    return tuple(specs)


def serialize(model: onnx.ModelProto) -> bytes:
    """The bytes of one file, the same for the same model.

    Raises OutputError over protobuf's limit of 2 GB.
    """
    model = aside.whole(model)
    try:
        content: bytes | None = None if aside.held(model) else model.SerializeToString(deterministic=True)
    except (EncodeError, ValueError):
        content = None
    if content is None or len(content) > aside.LIMIT:
        raise OutputError("the model is over 2 GB, which one .onnx file cannot hold; prune more or split the model")
    return content


def sha256(content: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(content).hexdigest()


def digest(model: onnx.ModelProto) -> str:
    """Hexadecimal digest of a model and all its weights, those that are set aside among them; of others that of the file's bytes."""
    if not aside.held(model):
        return sha256(serialize(model))
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for item in aside.held(light):
        del item.external_data[:]
    found = hashlib.sha256(light.SerializeToString(deterministic=True))
    for item in aside.held(model):
        found.update(np.ascontiguousarray(array_of(item)).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def given_identity(source: ModelSource, loaded: onnx.ModelProto) -> tuple[str, int]:
    """sha256 of a model file as it was given, or of a ModelProto, and the bytes of all its files."""
    if isinstance(source, onnx.ModelProto):
        return digest(loaded), aside.bytes_of(loaded)
    content = Path(source).read_bytes()
    return sha256(content), len(content) + sum(file.stat().st_size for file in origin_of(source).files)


def identity(model: onnx.ModelProto, path: Path | None, origin: Origin) -> tuple[str, int]:
    """sha256 and bytes of a model as `save` would write it to that path: of the .onnx file, and of all files together."""
    if aside.bytes_of(model) <= aside.LIMIT:
        content = serialize(model)
        return sha256(content), len(content)
    planned = external.layout(model, path or Path("model.onnx"), origin)
    return planned.sha256, planned.bytes


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


def save(model: onnx.ModelProto, path: Path, origin: Origin | None = None) -> None:
    """Write a model file, whole or not at all: one file up to 2 GB; over that with its weights in data files beside it.

    origin: where the input's data lie; those of the result are laid out like them, under names of their own (see `external`).
    Raises OutputError, and VerificationError where onnxruntime does not load what was written.
    """
    if aside.bytes_of(model) <= aside.LIMIT:
        write_atomically(path, serialize(model))
    else:
        external.write(model, path, origin or Origin(), _check_written)


def _check_written(path: Path) -> None:
    """Does a file with external data load where it was written?"""
    try:
        onnx.checker.check_model(str(path))
        Session(path, 1, "the file that was written")
    except (onnx.checker.ValidationError, ModelError) as error:
        raise VerificationError(f"{error}; nothing was written, please report this model") from error
