"""`retrain`: a model that is pruned already, trained again with its zeros held; the order of the steps."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from relief_onnx import calibrate
from relief_onnx import model as files
from relief_onnx.aside import scoped, whole
from relief_onnx.compare import compare_models
from relief_onnx.control import branching, settle
from relief_onnx.data import ImageOptions
from relief_onnx.errors import ModelError, OptionError, RecipeError
from relief_onnx.fitted import Data, samples_for
from relief_onnx.graph import Graph
from relief_onnx.inner_weights import pack_with_inner
from relief_onnx.measure import measure
from relief_onnx.measuring import work_folder
from relief_onnx.options import resolve
from relief_onnx.pack import unpack
from relief_onnx.prepared import Prepared, prepare
from relief_onnx.ranks import is_first
from relief_onnx.recalibrate import normalisations, recalibrate
from relief_onnx.report import quality_report, to_json
from relief_onnx.rounds import Rounds
from relief_onnx.surgery import apply_weights
from relief_onnx.training import unimproved
from relief_onnx.verify import verify

__all__ = ["Retrained", "retrain"]

SCHEMA = "relief-onnx/retrain/1"


@dataclass(frozen=True)
class Retrained:
    """What `retrain` returns. `model` is the shipped ModelProto, `dense` the same with nothing packed."""

    model: onnx.ModelProto
    dense: onnx.ModelProto
    report: Mapping[str, Any]


@scoped("model", "dense")
def retrain(
    source: files.ModelSource,
    data: Data,
    *,
    teacher: files.ModelSource | None = None,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    images: ImageOptions | None = None,
    recipe: Mapping[str, Any] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    save_report: str | os.PathLike[str] | None = None,
    progress: calibrate.Progress = lambda *_: None,
    **given: Any,
) -> Retrained:
    """Train a model's weights again; those that are 0 stay 0. Verify the result and, with `output`, write it.

    teacher: the model before pruning, whose outputs are the aim; without it the labels of the data are. Further keywords are the fields
    of `Training`, and samples, seed, threads and storage. Raises ReliefError subclasses; then nothing is written at `output`.
    """
    start = time.perf_counter()
    options = resolve(None, recipe or {}, {**given, "repair": "labels" if teacher is None else "distill"})
    if teacher is None and options.training.labels_count("labels") < 1.0:
        raise (RecipeError if recipe else OptionError)(
            "a label weight below 1 mixes in the original's outputs; give the original with --teacher"
        )
    if options.training.iterations > 1 or options.training.rewind is not None:
        raise RecipeError("iterations and rewind choose masks anew; they belong to relief-onnx prune")
    ready = prepare(source)
    target = None if output is None else Path(output)
    if target is not None:
        files.check_target(target, force)
    if save_report is not None:
        files.check_target(Path(save_report), force=True)
    original = ready.original if teacher is None else unpack(files.load(teacher))
    _check_teacher(ready, original)
    dataset = samples_for(ready.original, data, images)
    if branching(ready.graph):
        ready = settle(ready, dataset, samples=options.samples, seed=options.seed, threads=options.threads)
    rounds = Rounds(original, dataset, options, work_folder(work_dir), progress)
    flags = _zeros(ready)
    draws: dict[str, Any] = {"samples": options.samples, "seed": options.seed, "threads": options.threads, "progress": progress}
    again = recalibrate(ready.graph.model, dataset, **draws) if options.training.recalibrate != "off" else {}
    first = apply_weights(ready.graph.model, again) if again else ready.graph.model
    names = [ready.graph.names[number] for number in normalisations(ready.graph)] if again else []
    trained = time.perf_counter()
    arrays = rounds.train(1, first, flags, {"recalibrated": names})
    seconds = {"load": trained - start, "train": time.perf_counter() - trained}
    kept = {weight: ready.graph.array(weight) != 0 for weight in ready.plan.by_weight()}
    tables = [name for name in ready.plan.by_table() if name in flags]
    rounds.count(ready.plan, kept)
    settled, ready = ready.settled(Graph(apply_weights(first, arrays)), flags)
    dense = files.share_again(ready.restored(settled.model), ready.original)
    stored = {*kept, *tables} & {item.name for item in dense.graph.initializer}
    shipped, _ = pack_with_inner(dense, sorted(stored), {*kept, *ready.packed}) if options.storage == "auto" else (dense, ())
    checked = verify(ready.original, dense, shipped, dataset, seed=options.seed, threads=options.threads)
    quality = compare_models(
        original, shipped, dataset, limit=options.samples, seed=options.seed, threads=options.threads, progress=progress
    )  # fmt: skip
    sha256, size = files.identity(shipped, target, ready.origin)
    sample = next(iter(dataset.batches(1, limit=1)))
    total, left = sum(flag.size for flag in kept.values()), sum(int(flag.sum()) for flag in kept.values())
    report = {
        "schema": SCHEMA,
        "input": {
            "path": None if ready.path is None else str(ready.path), "sha256": ready.sha256, "bytes": ready.bytes,
            **asdict(measure(ready.counted, sample)),
        },
        "output": {
            "path": None if target is None else str(target), "sha256": sha256, "bytes": size,
            **asdict(measure(dense, sample)),
        },
        "options": {"repair": options.repair, "seed": options.seed, "threads": options.threads, **asdict(options.training)},
        "data": {"source": dataset.source, "kind": dataset.kind, "samples": quality.samples, "labelled": dataset.labelled},
        "retrain": rounds.document(),
        "totals": {"weights": total, "weights_kept": left, "kept_percent": 100.0 * left / max(total, 1)},
        "verification": {
            "checker": checked.checker, "dense_vs_output_max_abs": checked.max_abs, "dense_vs_output_max_rel": checked.max_rel,
        },
        "quality": quality_report(quality),
        "timing": {stage: round(value, 4) for stage, value in seconds.items()},
        "warnings": [
            *unimproved(options.training, rounds.document()["iterations"]), *quality.warnings, *dataset.notes, *ready.notes,
            *([] if flags else ["no weight is 0, so nothing had to be held"]),
        ],
    }  # fmt: skip
    if save_report is not None and is_first():
        files.write_atomically(Path(save_report), to_json(report))
    if target is not None and is_first():
        files.save(shipped, target, ready.origin)
    return Retrained(whole(shipped), whole(dense), report)


def _zeros(ready: Prepared) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
    """By weight that can be pruned, what is not 0; only weights that have zeros."""
    flags = {weight: ready.graph.array(weight) != 0 for weight in (*ready.plan.by_weight(), *ready.plan.by_table())}
    return {weight: flag for weight, flag in flags.items() if not flag.all()}


def _check_teacher(ready: Prepared, original: onnx.ModelProto) -> None:
    """Raises ModelError where the teacher takes or gives other tensors than the model."""
    graph = Graph(original)
    for what, mine, theirs in (
        ("inputs", [info.name for info in ready.graph.inputs], [info.name for info in graph.inputs]),
        ("outputs", ready.graph.outputs, graph.outputs),
    ):
        if set(mine) != set(theirs):
            raise ModelError(f"the model's {what} are {', '.join(mine)}, the teacher's {', '.join(theirs)}; give the model before pruning")
