"""The door to onnxruntime: loading and running models. Its quantiser has a door of its own, quantizer.py."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from relief_onnx import aside
from relief_onnx.errors import DataError, ModelError
from relief_onnx.nodes import STANDARD, subgraphs

__all__ = ["LOAD_ERRORS", "Session", "first_line"]

_NAMES = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
LOAD_ERRORS = (*(getattr(onnxruntime.capi.onnxruntime_pybind11_state, name) for name in _NAMES), ValueError, RuntimeError)

onnxruntime.set_default_logger_severity(4)

# Operators that draw numbers. Without a seed of their own they get one, so that two networks that share such a node draw the same.
_DRAWING = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"})
SEEDS = 1 << 20

# Bytes of weights from which on onnxruntime keeps no second copy of them in the order that its kernels like best.
LARGE = 1 << 30


class Session:
    """A loaded model that runs feeds on the CPU."""

    def __init__(
        self, model: onnx.ModelProto | bytes | Path, threads: int = 0, what: str = "the model", optimize: bool = True, working: bool = False
    ) -> None:
        """Load `model`; `threads` 0 means one per core; `optimize` lets onnxruntime rewrite the graph, as it does by default.

        Weights that are set aside, or in data files beside a path, are not copied. A `working` model is ours alone, nobody gets it: it runs
        as it stands where onnxruntime breaks it by rewriting (a Transpose that it fuses into a Gemm is gone, output of the graph or not),
        in memory that all of them share.

        Raises ModelError with onnxruntime's own words where it refuses the model; a missing operator is named.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        # Idle threads must not spin on the cores that the statistics need between runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if working:
            with _REGISTERING:
                _shared_memory()
            options.add_session_config_entry("session.use_env_allocators", "1")
        content = _given(model, options)
        idle = (
            [_LAYOUT] if working and isinstance(model, onnx.ModelProto) and not any(n.op_type == "Conv" for n in model.graph.node) else []
        )
        try:
            self._session = _loaded(content, options, working and optimize, idle)
        except LOAD_ERRORS as error:
            raise ModelError(
                f"onnxruntime {onnxruntime.__version__} cannot load {what} ({first_line(error)}); {_advice(str(error))}"
            ) from error
        self.outputs = tuple(item.name for item in self._session.get_outputs())

    def run(self, feed: Mapping[str, NDArray[Any]], names: Sequence[str] | None = None, source: str = "") -> list[Any]:
        """The values of `names` (default: every output). Raises DataError naming `source` where the run fails."""
        try:
            result: list[Any] = self._session.run(None if names is None else list(names), dict(feed))
        except LOAD_ERRORS as error:
            shapes = ", ".join(f"{name} {list(np.shape(value))}" for name, value in feed.items())
            raise DataError(
                f"the model does not run on {source or 'the data'} ({shapes}): {first_line(error)}; check shapes and values"
            ) from error
        return result

    def signature(self) -> tuple[tuple[str, str, tuple[Any, ...]], ...]:
        """Name, type and shape of every input and output, as onnxruntime sees them."""
        items = (*self._session.get_inputs(), *self._session.get_outputs())
        return tuple((item.name, item.type, tuple(item.shape)) for item in items)


@cache
def _shared_memory() -> None:
    """One arena for all working sessions: what comes back from a run holds all of the arena that it lies in, and fresh memory is slow.

    Once in a process. onnxruntime 1.31 takes it instead of what the user of the library registered before; versions that refuse a second
    one go on with the first, which serves as well.
    """
    place = onnxruntime.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
    with suppress(*LOAD_ERRORS):
        onnxruntime.create_and_register_allocator(place, None)


_REGISTERING = Lock()


# Lays convolutions out anew. Without any it has nothing to do, and ends the process where a Transpose of half precision was fused.
_LAYOUT = "NchwcTransformer"


def _loaded(content: bytes | Path, options: onnxruntime.SessionOptions, again: bool, idle: Sequence[str]) -> onnxruntime.InferenceSession:
    """The session, without the rewriting that is `idle`; where that fails and `again`, one whose graph is not rewritten at all.

    onnxruntime's own second try would print.
    """
    try:
        return onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], enable_fallback=0, disabled_optimizers=list(idle)
        )
    except LOAD_ERRORS as error:
        if not again:
            raise
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return _loaded(content, options, False, idle)
        except LOAD_ERRORS:
            raise error from None  # what the model itself has against it is said by the first


def _given(model: onnx.ModelProto | bytes | Path, options: onnxruntime.SessionOptions) -> bytes | Path:
    """What onnxruntime loads; of weights that are set aside the files in which they lie, which it maps into memory."""
    if not isinstance(model, onnx.ModelProto):
        return model
    model = aside.settled(_seeded(model))
    tensors = aside.held(model)
    if tensors:
        places = [aside.place_of(item) for item in tensors]
        folder = os.path.commonpath([path.parent for path, _ in places])
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        if sum(aside.array_of(item).nbytes for item in tensors) > LARGE:
            options.add_session_config_entry("session.disable_prepacking", "1")
        told = onnx.ModelProto()
        told.CopyFrom(model)
        for item, (path, offset) in zip(aside.held(told), places, strict=True):
            length = aside.array_of(item).nbytes
            del item.external_data[:]
            for key, value in (("location", path.relative_to(folder).as_posix()), ("offset", str(offset)), ("length", str(length))):
                item.external_data.add(key=key, value=value)
        model = told
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _seeded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every node that draws numbers has a seed, by the name of its output; the model itself where none lacks one."""
    if not any(_unseeded(model.graph)):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in _unseeded(result.graph):
        node.attribute.append(onnx.helper.make_attribute("seed", float(zlib.crc32(node.output[0].encode()) % SEEDS)))
    return result


def _unseeded(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        if node.op_type in _DRAWING and node.domain in STANDARD and all(item.name != "seed" for item in node.attribute):
            yield node
        for body in subgraphs(node):
            yield from _unseeded(body)


def _advice(error: str) -> str:
    """What to do about a model that onnxruntime does not load."""
    newer = re.search(r"IR version: \d+, max supported IR version: (\d+)", error)
    if newer:
        return f"the file is newer than this onnxruntime: install a newer one, or save the model with IR version {newer[1]}"
    unknown = re.search(r"([\w.]*):(\w+)\(-?\d+\) is not a registered function/op", error)
    unknown = unknown or re.search(r"Error No Op registered for ()(\w+) with", error)
    domain = re.search(r"No opset import for domain '([^']+)'", error)
    if domain:
        return f"add an opset import of domain {domain[1]}, or export it again with standard ONNX operators only"
    if unknown and unknown[1]:
        return (
            f"operator {unknown[2]} of domain {unknown[1]} is none of onnxruntime's: export the model again with standard ONNX operators "
            f"only, or with {unknown[2]} as a local function in the file, so that it loads there without relief-onnx too"
        )
    device = re.search(r"(?:implementation for |kernel for com\.microsoft\.)(Nhwc(?:Fused)?Conv)\(", error)
    if device:
        return (
            f"{device[1]} is a convolution with channels last that onnxruntime's optimiser writes for another device, and has no kernel on "
            "this CPU: prune the model from before it was optimised for that device"
        )
    if "Could not find an implementation" in error or "tensor(bfloat16)" in error:
        return (
            "it has no kernel on the CPU for the types at that node: convert the model to float32 or float16; weights may be stored as "
            "bfloat16 with a Cast to float32 behind each"
        )
    return "export it again with standard ONNX operators only, so that it loads there without relief-onnx too"


def first_line(error: BaseException) -> str:
    """What an error says first, without onnxruntime's prefix and the full stop."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    return line.split(" : ", 2)[-1].strip().rstrip(".")
