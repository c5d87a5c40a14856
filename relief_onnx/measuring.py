"""Scores from one calibration pass, kept in a work folder for a later run with the same inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from relief_onnx import calibrate
from relief_onnx import model as files
from relief_onnx.dataset import Dataset
from relief_onnx.embeddings import TableMeasure
from relief_onnx.errors import DataError, OutputError
from relief_onnx.flow import DEFAULT_RULE, FlowMeasure
from relief_onnx.layers import Layer, Plan
from relief_onnx.options import Options
from relief_onnx.paper import PaperRules
from relief_onnx.probes import instrument
from relief_onnx.ranks import is_first
from relief_onnx.scoring import Scores, measurements, normalise, read_scores, write_scores

if TYPE_CHECKING:
    from relief_onnx.prepared import Prepared

__all__ = ["measure_scores", "work_folder"]


def measure_scores(
    ready: Prepared,
    dataset: Dataset,
    options: Options,
    rules: PaperRules | None,
    progress: calibrate.Progress,
    folder: Path | None,
    tables: Sequence[Layer] = (),
) -> Scores:
    """Scores of every layer from one calibration pass; with a work folder, those of an earlier run with the same inputs.

    tables: readers of embedding tables that are scored too.
    """
    key = "" if folder is None else _key(ready, dataset, options, tables)
    stored = None if folder is None or dataset.fingerprint is None else folder / "scores.npz"
    needs_pass = rules is not None and rules.measurements
    if stored is not None and stored.exists() and _key_of(stored) == key and not needs_pass:
        try:
            return read_scores(stored, ready.plan, options.scored, tables)
        except DataError as error:
            raise DataError(f"{stored} is damaged; delete it, or choose another --work-dir, and run again") from error
    threads = options.threads or os.cpu_count() or 1
    flow, grouping = None, None
    if options.by_flow:
        grouping = calibrate.sort_samples(
            ready.running.model, dataset, DEFAULT_RULE.bits, limit=options.samples, seed=options.seed, threads=threads
        )
        flow = FlowMeasure(ready.graph, ready.plan, options.scored, grouping=grouping, tables=tables)
    lookups = TableMeasure.of(ready.graph, tables)
    every = Plan((*ready.plan.layers, *(layer for layer in tables if not layer.is_table)), ())
    wanted, statistics, inside = measurements(ready.graph, every, options.criterion, options.scored) if flow is None else ([], {}, {})
    wanted += flow.measurements if flow is not None else lookups.measurements
    wanted += rules.measurements if rules is not None else []
    probe = instrument(ready.running, [item.tensor for item in wanted], inside)
    if folder is not None and is_first():
        files.save(probe.model, folder / "probe.onnx")
    if wanted:
        calibrate.run(
            probe,
            wanted,
            dataset,
            limit=options.samples,
            seed=options.seed,
            threads=threads,
            progress=progress,
            grouping=grouping,
        )
    scores = (
        flow.scores(dict(options.output_weight))
        if flow is not None
        else {layer.name: normalise(ready.graph, layer, statistics.get(layer.name), options.scored) for layer in every.layers}
        | lookups.scores({})
    )
    if stored is not None and is_first():
        note = stored.with_suffix(".json")
        note.unlink(missing_ok=True)  # no moment in which an old note stands beside new scores
        write_scores(scores, stored)
        files.write_atomically(note, json.dumps({"key": key}).encode())
    return scores


def _key(ready: Prepared, dataset: Dataset, options: Options, tables: Sequence[Layer]) -> str:
    parts = (
        ready.key, dataset.fingerprint, options.scored, "flow" if options.by_flow else options.criterion, options.samples, options.seed,
        options.output_weight, *(layer.name for layer in tables),
    )  # fmt: skip
    return files.sha256(repr(parts).encode())


def _key_of(stored: Path) -> str | None:
    note = stored.with_suffix(".json")
    if not note.exists():
        return None
    try:
        return str(json.loads(note.read_text())["key"])
    except (ValueError, KeyError):
        return None  # a note that cannot be read means: measure again


def work_folder(work_dir: str | os.PathLike[str] | None) -> Path | None:
    if work_dir is None:
        return None
    folder = Path(work_dir)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, not a folder; choose another --work-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made ({error.strerror}); choose another --work-dir") from error
    return folder
