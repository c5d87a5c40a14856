"""The order of the steps, and nothing else: load, plan, calibrate, score, mask, repair, cut, pack, verify, report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from relief_onnx import calibrate
from relief_onnx import model as files
from relief_onnx.compare import compare_models
from relief_onnx.compensate import Shift, compensate
from relief_onnx.cut import Floor
from relief_onnx.data import CalibrationDataReader, Dataset, Feed, ImageOptions, open_dataset
from relief_onnx.decide import Chosen, decide, kept_portions, pools, silenced
from relief_onnx.errors import DataError, ModelError, NothingPrunedError, OutputError, RecipeError
from relief_onnx.flow import DEFAULT_RULE, FlowMeasure, MeanMeasure, passed_evenly
from relief_onnx.graph import Graph
from relief_onnx.layers import Plan, find, select
from relief_onnx.masks import Masks, applied, initializer_masks, insert
from relief_onnx.obs import improve
from relief_onnx.options import Options, idle, resolve
from relief_onnx.pack import pack, unpack
from relief_onnx.paper import PaperRules
from relief_onnx.patterns import parse_pattern
from relief_onnx.probes import instrument
from relief_onnx.repair import Repaired, repair
from relief_onnx.report import Evidence, build_report, to_json
from relief_onnx.scoring import Scores, measurements, normalise, read_scores, write_arrays, write_scores
from relief_onnx.surgery import apply_weights, operate
from relief_onnx.verify import verify

__all__ = ["Data", "Prepared", "Result", "prepare", "prune", "score"]

Data = str | os.PathLike[str] | Iterable[Feed] | CalibrationDataReader
_SILENT: calibrate.Progress = lambda *_: None


@dataclass(frozen=True)
class Prepared:
    """A model ready for work: `original` as given (unpacked), `graph` with every weight an initializer, and its plan."""

    original: onnx.ModelProto
    graph: Graph
    plan: Plan
    path: Path | None
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Result:
    """What `prune` returns. `model` is the shipped ModelProto; `masks` are the rule's, before dead units were removed."""

    model: onnx.ModelProto
    masked: onnx.ModelProto
    masks: Masks
    scores: Scores
    report: Mapping[str, Any]


def prepare(source: files.ModelSource) -> Prepared:
    """Load a model and find its layers. Raises ModelError."""
    loaded = files.load(source)
    path = None if isinstance(source, onnx.ModelProto) else Path(source)
    content = files.serialize(loaded) if path is None else path.read_bytes()
    original = unpack(loaded)
    graph = Graph(files.prepare(original))
    return Prepared(original, graph, find(graph), path, files.sha256(content), len(content))


def score(
    source: files.ModelSource,
    data: Data,
    *,
    images: ImageOptions | None = None,
    progress: calibrate.Progress = _SILENT,
    **given: Any,
) -> Scores:
    """Measure every layer once. Takes the same options as `prune`. Raises NothingPrunedError where there is no layer."""
    ready, options = prepare(source), resolve(None, {}, given)
    if not ready.plan.layers:
        raise _nothing(ready.plan, {})
    _check_outputs(ready.graph, options)
    dataset = open_dataset(data, files.input_specs(ready.original), images=images or ImageOptions())
    with _named(ready.path):
        return _measure(ready, dataset, options, None, progress, None)


def prune(
    source: files.ModelSource,
    data: Data,
    *,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    images: ImageOptions | None = None,
    preset: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    scores: str | os.PathLike[str] | None = None,
    save_masks: str | os.PathLike[str] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    save_report: str | os.PathLike[str] | None = None,
    progress: calibrate.Progress = _SILENT,
    **given: Any,
) -> Result:
    """Prune a model with calibration data, verify the result in onnxruntime and, with `output`, write it.

    source: path of an .onnx file, or a ModelProto. data: a path, an iterable of feeds (dict of arrays, batch first), or an onnxruntime
    CalibrationDataReader. Further keywords are the fields of `Options`: alpha, granularity ("connection", "weight", "channel",
    "channel+connection" or "channel+weight"), round_to, alpha_channel, criterion, skip ...

    Raises ReliefError subclasses: bad input (exit code 1), VerificationError (3), NothingPrunedError (4). Then nothing is written at
    `output`.
    """
    options = resolve(preset, recipe or {}, given)
    clock = _Clock()
    with clock("load"):
        ready = prepare(source)
        target = None if output is None else Path(output)
        if target is not None:
            files.check_target(target, force)
        for path in (save_masks, save_report):
            if path is not None:
                files.check_target(Path(path), force=True)
        _check_outputs(ready.graph, options)
        weights, reasons = select(ready.plan, options.only, options.skip)
        if not weights:
            raise _nothing(ready.plan, reasons)
        dataset = open_dataset(data, files.input_specs(ready.original), images=images or ImageOptions())
        folder = _work_folder(work_dir)
    rules = PaperRules(ready.graph, ready.plan, options)
    with clock("calibrate"), _named(ready.path):
        if scores is not None:
            found: Scores = read_scores(Path(scores), ready.plan, options.scored)
            rules.measure_alone(dataset, options, progress)
            options = replace(options, criterion=_criterion_of(found, options))
        else:
            found = _measure(ready, dataset, options, rules, progress, folder)
    with clock("mask"):
        chosen = decide(ready.graph, ready.plan, options, found, weights, dataset)
        masks, gates = rules.apply(chosen.masks)
        graph, shifts = _shifted(ready, options, found, chosen, masks, dataset, progress)
    plan = ready.plan if graph is ready.graph else find(graph)
    floors, exchanged = chosen.floors, tuple[int, ...]()
    if options.criterion == "flow-obs" and options.fine is not None:
        with clock("choose"), _named(ready.path):
            masks, floors, exchanged = _improved(ready, graph, plan, options, found, chosen, masks, weights, dataset, progress)
    flags = initializer_masks(plan, masks)
    graph, repaired = _repaired(ready, graph, flags, options, chosen, masks, weights, dataset, clock, progress)
    with clock("mask"):
        masked = rules.insert_gates(insert(graph, flags), gates)
    with clock("surgery"):
        operation = operate(rules.insert_gates(apply_weights(graph.model, applied(graph, flags)), gates))
        operation = replace(operation, model=files.share_again(operation.model, ready.original))
    with clock("pack"):
        shipped, packed = pack(operation.model, _packable(operation.model)) if options.storage == "auto" else (operation.model, ())
    evidence = Evidence(
        ready, options, masks, operation, packed, reasons, gates, chosen.choices, shipped, found, floors, shifts,
        passed_evenly(ready.graph, ready.plan) if options.by_flow else (), repaired, exchanged,
    )  # fmt: skip
    if not evidence.pruned:
        raise _nothing(ready.plan, {**evidence.kept_reasons(), **reasons})
    with clock("verify"):
        verification = verify(ready.original, masked, shipped, dataset, seed=options.seed, threads=options.threads)
    with clock("compare"):
        quality = compare_models(
            ready.original,
            shipped,
            dataset,
            limit=options.samples,
            seed=options.seed,
            threads=options.threads,
            progress=progress,
        )
    report = build_report(evidence, verification, quality, clock.seconds, dataset, target, idle(options, given, scores))
    with clock("write"):
        if folder is not None:
            files.save(masked, folder / "masked.onnx")
            files.save(operation.model, folder / "pruned.onnx")
        if save_masks is not None:
            write_arrays(masks.arrays(), Path(save_masks))
        if save_report is not None:
            files.write_atomically(Path(save_report), to_json(report))
        # Last, so that no other failure leaves a file here.
        if target is not None:
            files.save(shipped, target)
    return Result(shipped, masked, masks, found, report)


def _check_outputs(graph: Graph, options: Options) -> None:
    weights = dict(options.output_weight)
    for name in weights:
        if name not in graph.outputs:
            raise RecipeError(f"output-weight names {name!r}, which is no output of the model; its outputs are {', '.join(graph.outputs)}")
    if all(weights.get(name, 1.0) == 0 for name in graph.outputs):
        raise RecipeError("output-weight is 0 for every output, so nothing would matter; give one of them a weight")


def _shifted(
    ready: Prepared, options: Options, scores: Scores, chosen: Chosen, masks: Masks, dataset: Dataset, progress: calibrate.Progress
) -> tuple[Graph, tuple[Shift, ...]]:
    """The graph with the mean of what goes in its biases, where that is wanted."""
    if not options.shifts_means and (options.repair == "none" or options.mean_shift == "off"):
        return ready.graph, ()
    means = {name: score.means for name, score in scores.items() if score.means is not None}
    if not means:
        measure = MeanMeasure(ready.plan)
        probe = instrument(ready.graph, [item.tensor for item in measure.measurements])
        calibrate.run(
            probe, measure.measurements, dataset, limit=options.samples, seed=options.seed, threads=options.threads or os.cpu_count() or 1,
            progress=progress,
        )  # fmt: skip
        means = measure.means()
    # Channels that go as a whole leave the others as they were, and repair makes sure that means hold.
    portions = None if options.fine is None or options.repair != "none" else kept_portions(ready.graph, ready.plan, scores, masks)
    model, shifts = compensate(ready.graph, ready.plan, masks, means, silenced(ready.plan, chosen, masks), portions)
    return (ready.graph if model is ready.graph.model else Graph(model)), shifts


def _improved(
    ready: Prepared, graph: Graph, plan: Plan, options: Options, scores: Scores, chosen: Chosen, masks: Masks, weights: frozenset[str],
    dataset: Dataset, progress: calibrate.Progress,
) -> tuple[Masks, tuple[Floor, ...], tuple[int, ...]]:  # fmt: skip
    """The masks chosen again by what is lost after repair, the floors that acted, and how many weights were exchanged."""
    gone = silenced(ready.plan, chosen, masks)
    found = improve(
        ready.graph, graph, plan, masks, chosen.within(masks),
        [pool.weights for pool in pools(ready.plan, options, weights, None if options.by_channel else options.keep)],
        {score.weight: score.relevance for score in scores.values() if score.relevance is not None}, weights, dataset,
        pattern=None if options.pattern is None else parse_pattern(options.pattern),
        removed={layer.weight: gone[layer.name] for layer in ready.plan.layers if layer.name in gone}, samples=options.samples,
        seed=options.seed, threads=options.threads, progress=progress,
    )  # fmt: skip
    return found.masks, found.floors, found.exchanged


def _repaired(
    ready: Prepared, graph: Graph, flags: Mapping[str, Any], options: Options, chosen: Chosen, masks: Masks, weights: frozenset[str],
    dataset: Dataset, clock: _Clock, progress: calibrate.Progress,
) -> tuple[Graph, tuple[Repaired, ...]]:  # fmt: skip
    """The graph with the weights that are left solved for again, where that is wanted."""
    if options.repair == "none" or not flags:
        return graph, ()
    with clock("repair"), _named(ready.path):
        gone = silenced(ready.plan, chosen, masks)
        removed = {layer.weight: gone[layer.name] for layer in ready.plan.layers if layer.name in gone}
        model, rows = repair(
            ready.graph, apply_weights(graph.model, applied(graph, flags)), flags, weights, dataset, removed=removed,
            samples=options.samples, seed=options.seed, threads=options.threads, progress=progress,
        )  # fmt: skip
    return Graph(model), rows


def _criterion_of(scores: Scores, options: Options) -> str:
    """What a score file holds decides: R of every unit makes it flow."""
    if all(score.relevance is not None for score in scores.values()):
        return options.criterion if options.by_flow else "flow"
    return options.criterion if not options.by_flow else "relief"


@contextmanager
def _named(path: Path | None) -> Iterator[None]:
    """Name the user's file where onnxruntime refuses a model that was made from it."""
    try:
        yield
    except ModelError as error:
        if path is None:
            raise
        raise ModelError(f"{path}: {error}") from error


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _packable(model: onnx.ModelProto) -> list[str]:
    """Weights of layers; everything else is stored as it is."""
    return sorted({layer.weight for layer in find(Graph(model)).layers})


def _measure(
    ready: Prepared,
    dataset: Dataset,
    options: Options,
    rules: PaperRules | None,
    progress: calibrate.Progress,
    folder: Path | None,
) -> Scores:
    """Scores of every layer from one calibration pass; with a work folder, those of an earlier run with the same inputs."""
    key = _key(ready, dataset, options)
    stored = None if folder is None or dataset.fingerprint is None else folder / "scores.npz"
    needs_pass = rules is not None and rules.measurements
    if stored is not None and stored.exists() and _key_of(stored) == key and not needs_pass:
        try:
            return read_scores(stored, ready.plan, options.scored)
        except DataError as error:
            raise DataError(f"{stored} is damaged; delete it, or choose another --work-dir, and run again") from error
    threads = options.threads or os.cpu_count() or 1
    flow, grouping = None, None
    if options.by_flow:
        grouping = calibrate.sort_samples(
            ready.graph.model, dataset, DEFAULT_RULE.bits, limit=options.samples, seed=options.seed, threads=threads
        )
        flow = FlowMeasure(ready.graph, ready.plan, options.scored, grouping=grouping)
    wanted, statistics, inside = measurements(ready.graph, ready.plan, options.criterion, options.scored) if flow is None else ([], {}, {})
    wanted += flow.measurements if flow is not None else []
    wanted += rules.measurements if rules is not None else []
    probe = instrument(ready.graph, [item.tensor for item in wanted], inside)
    if folder is not None:
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
        else {layer.name: normalise(ready.graph, layer, statistics.get(layer.name), options.scored) for layer in ready.plan.layers}
    )
    if stored is not None:
        note = stored.with_suffix(".json")
        note.unlink(missing_ok=True)  # no moment in which an old note stands beside new scores
        write_scores(scores, stored)
        files.write_atomically(note, json.dumps({"key": key}).encode())
    return scores


def _key(ready: Prepared, dataset: Dataset, options: Options) -> str:
    parts = (
        ready.sha256, dataset.fingerprint, options.scored, "flow" if options.by_flow else options.criterion, options.samples, options.seed,
        options.output_weight,
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


def _work_folder(work_dir: str | os.PathLike[str] | None) -> Path | None:
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


def _nothing(plan: Plan, reasons: Mapping[str, str]) -> NothingPrunedError:
    # The reasons that another option would change come first.
    rows = list(reasons.items()) + [(row.weight, row.reason) for row in plan.skipped]
    if not rows:
        return NothingPrunedError("nothing could be pruned: the model has no Conv, ConvTranspose, Gemm or MatMul with a constant weight")
    return NothingPrunedError(
        f"nothing could be pruned: {rows[0][0]}: {rows[0][1]}" + (f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""),
        rows,
    )
