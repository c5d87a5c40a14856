"""The data of a model, in batches that it takes: a file may promise any number of samples, and hold a 1 that was traced into it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import onnx

from relief_onnx.data import CalibrationDataReader, Dataset, Feed, ImageOptions, batch_axis, open_dataset
from relief_onnx.errors import DataError
from relief_onnx.model import input_specs
from relief_onnx.session import Session

__all__ = ["Data", "samples_for"]

Data = str | os.PathLike[str] | Iterable[Feed] | CalibrationDataReader


def samples_for(model: onnx.ModelProto, data: Data, images: ImageOptions | None = None) -> Dataset:
    """Open data for a model: one sample at a time, with a note, where it runs with one and not with two of it.

    Raises DataError where the data do not fit, ModelError where onnxruntime does not load the model.
    """
    dataset = open_dataset(data, input_specs(model), images=images or ImageOptions())
    axis = batch_axis(dataset.inputs)
    if not axis.batchable or axis.fixed is not None:
        return dataset
    two, one = (next(iter(dataset.batches(size, limit=size))) for size in (2, 1))
    if two.size < 2:
        return dataset
    session = Session(model, 1)
    if _runs(session, two.feed) or not _runs(session, one.feed):
        return dataset  # a model that does not run at all says so, with the names of the files, where it is run
    note = "the file says that the model takes any number of samples at once, but it runs with one only, so each runs by itself"
    return replace(
        dataset, inputs=tuple(replace(item, shape=(1, *item.shape[1:])) for item in dataset.inputs), notes=(*dataset.notes, note)
    )


def _runs(session: Session, feed: Mapping[str, Any]) -> bool:
    try:
        session.run(feed)
    except DataError:
        return False
    return True
