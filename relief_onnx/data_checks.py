"""Does an array fit a model's input: names, shapes, types, values and labels.

Every function raises DataError with one sentence: where, which input, what was found, what the model expects, the fix.
`source` is the subject of that sentence: a path in quotes, or "feed 3".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from relief_onnx.datatypes import InputSpec
from relief_onnx.errors import DataError

__all__ = [
    "Array",
    "BatchAxis",
    "Feed",
    "Header",
    "batch_axis",
    "cast",
    "check_headers",
    "check_label_header",
    "check_names",
    "family",
    "label_key",
    "lift",
    "shape_text",
    "spec_text",
    "specs_text",
    "to_labels",
]

Array = npt.NDArray[Any]
Feed = dict[str, Array]

LABEL_KEYS = ("label", "labels")

# Which families of stored values may go into an input of the family on the left. Values are compared after the cast,
# so an integer only passes where it arrives unchanged.
_ACCEPTED = {
    "float": {"float", "int", "bool"},
    "int": {"int", "bool"},
    "bool": {"bool", "int"},
    "complex": {"complex", "float", "int", "bool"},
    "text": {"text"},
}
_FAMILY_OF_KIND = {
    "f": "float",
    "i": "int",
    "u": "int",
    "b": "bool",
    "c": "complex",
    "U": "text",
    "S": "text",
    "O": "object",
}


class Header(NamedTuple):
    """What is known of an array without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class BatchAxis:
    """`batchable`: axis 0 of every input counts samples. `fixed`: the only size that it may have, None when free."""

    batchable: bool
    fixed: int | None = None


def batch_axis(inputs: Sequence[InputSpec]) -> BatchAxis:
    """Axis 0 is the batch when all inputs have the same symbol, the same fixed size or nothing known there."""
    ranked = [spec for spec in inputs if spec.ranked]
    if not inputs or any(not spec.shape for spec in ranked):
        return BatchAxis(False)
    first = {spec.shape[0] for spec in ranked}
    if len(first) > 1:
        return BatchAxis(False)
    size = first.pop() if first else None
    return BatchAxis(True, size if isinstance(size, int) else None)


def shape_text(shape: Iterable[int | str | None]) -> str:
    """A shape for people: [N, 3, ?]."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def spec_text(spec: InputSpec) -> str:
    """An input for people: 'x' (float32 [N, 3, 32, 32])."""
    dtype = "string" if spec.dtype.kind in "OUS" else spec.dtype.name
    return f"'{spec.name}' ({dtype} {shape_text(spec.shape) if spec.ranked else 'of any shape'})"


def specs_text(inputs: Sequence[InputSpec]) -> str:
    """All inputs for people, in the model's order."""
    return ", ".join(spec_text(spec) for spec in inputs)


def label_key(names: Iterable[str], inputs: Sequence[InputSpec], source: str) -> str | None:
    """The name among `names` that holds labels; a model's own input called 'label' is an input, not labels."""
    taken = {spec.name for spec in inputs}
    present = set(names)
    found = [key for key in LABEL_KEYS if key in present and key not in taken]
    if len(found) > 1:
        raise DataError(f"{source} has both 'label' and 'labels'; keep one of them.")
    return found[0] if found else None


def check_headers(headers: Mapping[str, Header], inputs: Sequence[InputSpec], axis: BatchAxis, source: str) -> int:
    """Check names, types and shapes; return the number of samples (1 for a whole feed)."""
    check_names(headers, inputs, source)
    for spec in inputs:
        _check_kind(headers[spec.name].dtype, spec, source)
    rows = {spec.name: _rows(headers[spec.name].shape, spec, axis, source) for spec in inputs}
    counts = set(rows.values())
    if len(counts) > 1:
        found = ", ".join(f"'{name}' has {count}" for name, count in rows.items())
        raise DataError(
            f"{source} has inputs with different numbers of samples ({found}), but the model reads them side by side; "
            "give every input the same size on axis 0."
        )
    count = counts.pop()
    if count == 0:
        raise DataError(f"{source} holds 0 samples for input '{inputs[0].name}'; remove it or save at least one sample.")
    return count


def check_names(names: Iterable[str], inputs: Sequence[InputSpec], source: str) -> None:
    """Exactly the model's inputs, in any order; labels have been taken out before."""
    present = list(names)
    expected = [spec.name for spec in inputs]
    missing = [name for name in expected if name not in present]
    extra = [name for name in present if name not in expected]
    if missing:
        near = difflib.get_close_matches(missing[0], extra, 1, 0.4)
        hint = f"rename '{near[0]}', which is the nearest" if near else "save each array under its input's name"
        found = ", ".join(f"'{name}'" for name in present) or "nothing"
        raise DataError(
            f"{source} has no array for input '{missing[0]}' (found {found}); the model's inputs are {specs_text(inputs)}; {hint}."
        )
    if extra:
        near = difflib.get_close_matches(extra[0], expected, 1, 0.4)
        hint = f" (nearest: '{near[0]}')" if near else ""
        raise DataError(
            f"{source} has an array '{extra[0]}' that is no input of the model{hint}; the model's inputs are "
            f"{specs_text(inputs)}; "
            "remove the array, or name it 'label' if it holds the labels."
        )


def _rows(shape: tuple[int, ...], spec: InputSpec, axis: BatchAxis, source: str) -> int:
    """Samples in one array; with the input's rank it is a batch, with one axis less it is a sample."""
    if not spec.ranked:
        if axis.batchable and not shape:
            raise DataError(f"{source} has a single number for input {spec_text(spec)}, which needs samples along axis 0; save a batch.")
        return shape[0] if axis.batchable else 1
    rank = len(spec.shape)
    is_sample = axis.batchable and len(shape) == rank - 1
    if len(shape) != rank and not is_sample:
        wanted = f"{rank} axes (a batch) or {rank - 1} (one sample)" if axis.batchable else f"{rank} axes"
        raise DataError(
            f"{source} has an array of shape {shape_text(shape)} for input {spec_text(spec)}, which needs {wanted}; "
            "reshape the array before you save it."
        )
    offset = 1 if is_sample else 0
    for index, found in enumerate(shape):
        wanted_size = spec.shape[index + offset]
        is_batch = axis.batchable and index + offset == 0
        if isinstance(wanted_size, int) and found != wanted_size and not is_batch:
            raise DataError(
                f"{source} has {found} on axis {index} of shape {shape_text(shape)} for input {spec_text(spec)}, "
                "which needs "
                f"{wanted_size} there; resize, transpose or crop the data to fit the model."
            )
    return shape[0] if axis.batchable and not is_sample else 1


def lift(array: Array, spec: InputSpec, axis: BatchAxis) -> Array:
    """The array with a batch axis: a sample becomes a batch of one. No copy."""
    return array[None] if axis.batchable and spec.ranked and array.ndim == len(spec.shape) - 1 else array


def family(dtype: np.dtype[Any]) -> str:
    """The kind of value, also of ONNX's small types (bfloat16, float8, int4), which numpy itself calls void."""
    if dtype.kind == "V" and dtype.names is None:
        for prefix, name in (("bfloat", "float"), ("float", "float"), ("int", "int"), ("uint", "int")):
            if dtype.name.startswith(prefix):
                return name
    return _FAMILY_OF_KIND.get(dtype.kind, "other")


def _is_raw(dtype: np.dtype[Any], spec: InputSpec) -> bool:
    """np.save forgets the name of ONNX's small types and keeps the bytes, as V1 or V2."""
    return dtype.kind == spec.dtype.kind == "V" and family(dtype) == "other" and dtype.itemsize == spec.dtype.itemsize


def _check_kind(dtype: np.dtype[Any], spec: InputSpec, source: str) -> None:
    wanted = "text" if spec.dtype.kind == "O" else family(spec.dtype)
    found = family(dtype)
    if _is_raw(dtype, spec) or found in _ACCEPTED.get(wanted, set()) or (wanted == "text" and found == "object"):
        return
    raise DataError(
        f"{source} has {dtype.name} values for input {spec_text(spec)}, and they cannot become {spec.dtype.name} "
        "without loss; "
        f"save them with .astype('{spec.dtype.name}') if that is what you mean."
    )


def cast(array: Array, spec: InputSpec, source: str, first: int = 0) -> Array:
    """A copy in the input's type; every value is finite, and integers keep their value.

    `first` is the number of the array's first sample in its file, for the message.
    """
    _check_kind(array.dtype, spec, source)
    if _is_raw(array.dtype, spec):
        array = np.ascontiguousarray(array).view(spec.dtype)
    if family(spec.dtype) in ("object", "text"):
        return np.array(array.astype(str) if array.dtype.kind == "S" else array, dtype=object)
    with np.errstate(over="ignore", invalid="ignore"):
        result: Array = np.array(array, dtype=spec.dtype, order="C")
    if family(array.dtype) in ("float", "complex"):
        _refuse(~np.isfinite(array), array, spec, source, first, "only finite numbers; clean the data")
        _refuse(~np.isfinite(result), array, spec, source, first, f"numbers that fit in {spec.dtype.name}; rescale the data")
    elif array.dtype != spec.dtype:
        with np.errstate(invalid="ignore"):
            changed = (result.astype(array.dtype) != array) | ((result < 0) != (array < 0))
        _refuse(changed, array, spec, source, first, f"whole numbers that {spec.dtype.name} holds exactly; convert the data")
    return result


def _refuse(bad: Array, array: Array, spec: InputSpec, source: str, first: int, wanted: str) -> None:
    """Raise for the first True in `bad`, with its place."""
    if not bad.any():
        return
    where = np.unravel_index(int(np.argmax(bad)), bad.shape)
    sample = f" in sample {first + int(where[0])}" if where else ""
    raise DataError(f"{source} has the value {array[where]}{sample} of input {spec_text(spec)}, which needs {wanted}.")


def check_label_header(header: Header, rows: int, source: str) -> None:
    """Labels are integers [N] or [N, 1] (classes from 0), or floats with N on axis 0 (targets)."""
    shape, kind = header.shape, family(header.dtype)
    if kind not in ("int", "float", "bool"):
        raise DataError(f"{source} has labels of type {header.dtype.name}; save class numbers (int64, from 0) or float targets.")
    if kind != "float" and (len(shape) > 2 or (len(shape) == 2 and shape[1] != 1)):
        raise DataError(f"{source} has integer labels of shape {shape_text(shape)}; save one class number per sample, with shape [{rows}].")
    count = shape[0] if shape else 1
    if count != rows:
        raise DataError(f"{source} has {count} labels for {rows} samples; save exactly one label per sample.")


def to_labels(array: Array, rows: int, source: str) -> Array:
    """Checked labels: int64 [rows] class numbers, or float targets as they are."""
    check_label_header(Header(array.shape, array.dtype), rows, source)
    labels = array.reshape(1) if array.ndim == 0 else array
    if family(array.dtype) == "float":
        if not np.isfinite(labels).all():
            raise DataError(f"{source} has a label that is NaN or infinite; clean the labels.")
        return np.array(labels)
    if (labels < 0).any():
        raise DataError(f"{source} has the label {int(labels.min())}; class numbers start at 0, so remove or renumber these samples.")
    return np.array(labels, dtype=np.int64).reshape(-1)
