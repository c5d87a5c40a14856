"""The door to calibration and labelled data: one function that finds out what it was given.

    for batch in open_dataset("calib/", inputs).batches(32, limit=1000):
        outputs = session.run(None, batch.feed)

| what | how it is read |
|---|---|
| `.npy` | a batch, or a sample where it has one axis less; for several inputs a folder of NAME.npy; `label.npy` |
| `.npz` | keys are the inputs' names; `label` or `labels` |
| images | a folder, class sub-folders, or with `labels.csv` (file name, label); resized to the model's size |
| `.csv` | one sample per row, for a single input; a column `label` |
| `test_data_set_*/input_K.pb` | ONNX's own test data |
| Python | feeds (dicts) in any iterable, or onnxruntime's CalibrationDataReader |
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from relief_onnx.data_checks import Feed, batch_axis
from relief_onnx.data_summary import DataSummary, InputSummary, describe
from relief_onnx.dataset import Batch, Dataset
from relief_onnx.datatypes import InputSpec
from relief_onnx.errors import DataError
from relief_onnx.feeds import CalibrationDataReader, open_feeds
from relief_onnx.folders import open_path
from relief_onnx.images import ImageOptions
from relief_onnx.readers import Want

__all__ = [
    "Batch",
    "CalibrationDataReader",
    "DataSummary",
    "Dataset",
    "Feed",
    "ImageOptions",
    "InputSpec",
    "InputSummary",
    "batch_axis",
    "describe",
    "open_dataset",
]

_NO_OPTIONS = ImageOptions()


def open_dataset(
    source: str | os.PathLike[str] | Iterable[Feed] | CalibrationDataReader,
    inputs: Sequence[InputSpec],
    *,
    images: ImageOptions = _NO_OPTIONS,
) -> Dataset:
    """Open data for a model with these inputs, in the model's order.

    Files are found and their headers checked at once; values are read, checked and cast while batches are streamed.
    A one-shot iterator is kept in a temporary folder while it is first read, so it too can be read again; the folder
    goes with the dataset. Each sub-folder is a class where there are several; a lone sub-folder is just a level more.

    Raises DataError with the file, the input, what was found, what the model expects and the fix.
    """
    specs = tuple(inputs)
    if not specs:
        raise DataError("The model has no inputs, so no data can be fed to it; check that this is the right model.")
    if isinstance(source, (str, os.PathLike)):
        return open_path(Path(source), Want(specs, images))
    return open_feeds(source, specs)
