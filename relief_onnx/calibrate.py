"""One pass of the calibration data through the probe, in onnxruntime, feeding every statistic."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from relief_onnx.dataset import Batch, Dataset
from relief_onnx.grouping import FIT_SAMPLES, Grouping
from relief_onnx.nodes import chooses
from relief_onnx.probes import Probe
from relief_onnx.ranks import rank, world
from relief_onnx.session import Session
from relief_onnx.sharding import collect, restore, unite
from relief_onnx.streaming import Statistic

__all__ = ["Measurement", "Progress", "batch_size_for", "run", "sort_samples"]

# Activations of one batch that the probe may hand over at a time: bounds memory whatever the model.
TAP_BYTES = 32 << 20
LARGEST_BATCH = 256

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Measurement:
    """What a statistic listens to."""

    tensor: str
    statistic: Statistic


def batch_size_for(session: Session, probe: Probe, dataset: Dataset, seed: int) -> int:
    """Samples per batch so that the tapped activations stay within TAP_BYTES, from one sample's run."""
    first = next(iter(dataset.batches(1, limit=1, seed=seed)))
    names = [name for name in probe.taps.values() if name not in first.feed]
    values = session.run(first.feed, names, first.source) if names else []
    each = sum(value.nbytes for value in values) / max(first.size, 1)
    return int(max(1, min(LARGEST_BATCH, TAP_BYTES // max(each, 1))))


def run(
    probe: Probe,
    measurements: Sequence[Measurement],
    dataset: Dataset,
    *,
    limit: int | None,
    seed: int,
    threads: int,
    progress: Progress,
    grouping: Grouping | None = None,
) -> tuple[int, float]:
    """Feed every measurement with every sample; memory does not grow with their number. `grouping` sorts the samples of each batch first.

    Returns the number of samples and the seconds taken. Raises DataError where there is none or a run fails.
    """
    start = time.perf_counter()
    session = Session(probe.model, threads, "the probe model", working=True)
    # Where samples take different branches of an If, each has to take its own.
    size = 1 if chooses(probe.model.graph.node) else batch_size_for(session, probe, dataset, seed)
    samples = feed(
        session, probe, measurements, dataset, size, limit=limit, seed=seed, threads=threads, progress=progress, grouping=grouping
    )
    return samples, time.perf_counter() - start


def feed(
    session: Session,
    probe: Probe,
    measurements: Sequence[Measurement],
    dataset: Dataset,
    batch_size: int,
    *,
    limit: int | None,
    seed: int,
    threads: int,
    progress: Progress = lambda stage, done, total: None,
    grouping: Grouping | None = None,
) -> int:
    """The pass itself, in batches of `batch_size`; returns the number of samples, under torchrun those of this process."""
    seen = grouping.outputs if grouping is not None and grouping.groups > 1 else ()
    names = sorted({*probe.fetched(item.tensor for item in measurements), *seen})
    samples = 0.0
    total = dataset.samples if limit is None or dataset.samples is None else min(limit, dataset.samples)
    with ThreadPoolExecutor(threads) as pool, _blas().limit(limits=1, user_api="blas"):
        for number, batch in enumerate(dataset.batches(batch_size, limit=limit, seed=seed)):
            if number % world() != rank():
                continue  # another process measures it
            _add(pool, measurements, probe, _values(session, names, batch), batch, grouping)
            samples += batch.size * batch.weight
            progress("calibrate", round(samples), total)
    if world() > 1:
        _together(measurements)
    return round(samples)


def _together(measurements: Sequence[Measurement]) -> None:
    """The statistics of all processes as one, in each of them."""
    from relief_onnx.trainer.processes import gather

    own = list({id(item.statistic): item.statistic for item in measurements}.values())
    parts = gather([collect(statistic) for statistic in own])
    for place, statistic in enumerate(own):
        restore(statistic, unite([part[place] for part in parts], getattr(statistic, "UNITE", np.add)))


def sort_samples(model: onnx.ModelProto, dataset: Dataset, bits: int, *, limit: int | None, seed: int, threads: int) -> Grouping:
    """The rule that sorts samples by the model's outputs, from a run of a few of them. Raises DataError where a run fails."""
    session = Session(model, threads)
    few = FIT_SAMPLES if limit is None else min(limit, FIT_SAMPLES)
    batches = (
        (dict(zip(session.outputs, session.run(batch.feed, session.outputs, batch.source), strict=True)), batch.size)
        for batch in dataset.batches(16, limit=few, seed=seed)
    )
    return Grouping(session.outputs, batches, bits)


def _add(
    pool: ThreadPoolExecutor,
    measurements: Sequence[Measurement],
    probe: Probe,
    values: Mapping[str, NDArray[Any]],
    batch: Batch,
    grouping: Grouping | None,
) -> None:
    """One batch into every statistic. A function of its own, so that the activations are gone before the next batch runs."""
    if grouping is not None:
        grouping.look(values, batch.size)
    tensors = {name: probe.value(name, values) for name in {item.tensor for item in measurements}}
    found = ((item.statistic, tensors[item.tensor]) for item in measurements)
    # What is empty comes from a body that did not run.
    jobs = (statistic.jobs(value, batch.weight) for statistic, value in found if value.size)
    for _ in pool.map(lambda job: job(), chain.from_iterable(jobs)):
        pass


@cache
def _blas() -> ThreadpoolController:
    """Numpy's matrix library, whose own threads would compete with the pool's. Found once: looking costs a millisecond."""
    return ThreadpoolController()


def _values(session: Session, names: Sequence[str], batch: Batch) -> Mapping[str, NDArray[Any]]:
    fetched = [name for name in names if name not in batch.feed]
    values = dict(zip(fetched, session.run(batch.feed, fetched, batch.source), strict=True)) if fetched else {}
    return {name: np.asarray(batch.feed.get(name, values.get(name))) for name in names}
