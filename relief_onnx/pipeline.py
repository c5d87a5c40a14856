"""The order of the steps, and nothing else: load, plan, calibrate, score, mask, repair or train, cut, pack, verify, report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from relief_onnx import calibrate
from relief_onnx import model as files
from relief_onnx.aside import scoped, whole
from relief_onnx.blocks import in_blocks
from relief_onnx.channels import Choice, relevance
from relief_onnx.clock import Clock
from relief_onnx.compare import compare_models
from relief_onnx.compensate import Shift, compensate
from relief_onnx.contest import Contest, worth_choosing
from relief_onnx.control import branching, settle
from relief_onnx.coupling import Coupling
from relief_onnx.cut import Floor
from relief_onnx.data import Dataset, ImageOptions
from relief_onnx.decide import Choose, Chosen, Search, Worth, decide, kept_portions, pools, silenced
from relief_onnx.errors import ModelError, NothingPrunedError, RecipeError
from relief_onnx.fitted import Data, samples_for
from relief_onnx.flow import MeanMeasure, passed_evenly
from relief_onnx.graph import Graph
from relief_onnx.inner_weights import pack_with_inner
from relief_onnx.layers import LAYER_OPERATORS, Layer, Plan, find
from relief_onnx.leftovers import training_notes
from relief_onnx.masks import Masks, applied, both, initializer_masks, insert
from relief_onnx.measuring import measure_scores, work_folder
from relief_onnx.obs import Improved, improve
from relief_onnx.obs_units import improve_units, unit_losses
from relief_onnx.options import Options, idle, resolve
from relief_onnx.paper import Gate, PaperRules, both_gates
from relief_onnx.patterns import parse_pattern
from relief_onnx.prepared import Prepared, prepare
from relief_onnx.probes import instrument
from relief_onnx.ranks import is_first
from relief_onnx.recalibrate import normalisations, recalibrate
from relief_onnx.repair import Repaired
from relief_onnx.repair_choice import repaired as repaired_best
from relief_onnx.report import Evidence, build_report, to_json
from relief_onnx.rounds import Rounds
from relief_onnx.scoring import Scores, criterion_of, read_scores, write_arrays
from relief_onnx.selection import select, unmatched
from relief_onnx.session import Session
from relief_onnx.state_changes import cut_states
from relief_onnx.surgery import apply_weights, operate
from relief_onnx.table_masks import table_masks, unranked
from relief_onnx.verify import verify

__all__ = ["Data", "Result", "prune", "score"]

_SILENT: calibrate.Progress = lambda *_: None


@dataclass(frozen=True)
class Result:
    """What `prune` returns. `model` is the shipped ModelProto; `masks` are the rule's, before dead units were removed.

    Models over 2 GB have their weights set aside: `relief_onnx.aside.array_of` reads a tensor, `relief_onnx.model.save` writes a model.
    """

    model: onnx.ModelProto
    masked: onnx.ModelProto
    masks: Masks
    scores: Scores
    report: Mapping[str, Any]


@scoped()
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
    if not (ready.plan.layers or ready.plan.tables) and not branching(ready.graph):
        raise _nothing(ready.plan, {})
    _check_outputs(ready.graph, options)
    with _named(ready.path):
        dataset = samples_for(ready.original, data, images)
        if branching(ready.graph):
            ready = settle(ready, dataset, samples=options.samples, seed=options.seed, threads=options.threads)
            if not ready.plan.layers:
                raise _nothing(ready.plan, {})
        return measure_scores(ready, dataset, options, None, progress, None, ready.plan.tables)


@scoped("model", "masked")
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
    clock = Clock()
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
        reasons |= unranked(ready.plan, options, weights)
        weights -= reasons.keys()
        if not weights and not branching(ready.graph):
            if not ready.plan.layers:
                with _named(ready.path):
                    Session(ready.original, 1)  # a model that does not run is that first
            raise _nothing(ready.plan, reasons)
        with _named(ready.path):
            dataset = samples_for(ready.original, data, images)
        options, few = worth_choosing(options, dataset)
        folder = work_folder(work_dir)
    if branching(ready.graph):
        with clock("branches"), _named(ready.path):
            ready = settle(ready, dataset, samples=options.samples, seed=options.seed, threads=options.threads)
            weights, reasons = select(ready.plan, options.only, options.skip)
            if not weights:
                raise _nothing(ready.plan, reasons)
    job = _Job(ready, options, weights, dataset, folder, clock, progress)
    if options.trains:
        retrained: Mapping[str, Any] | None
        repaired: tuple[Repaired, ...] = ()
        ridge: Contest | None = None
        cut, graph, retrained = _trained(job, scores)
    else:
        cut = _cut(job, ready, options, scores)
        graph, repaired, ridge = _repaired(job, cut)
        graph, retrained = _recalibrated(job, cut, graph)
    options, masks, flags, gates = cut.options, cut.masks, cut.flags, cut.gates
    with clock("mask"):
        graph, ready = ready.settled(graph, flags)
        masked = ready.restored(cut.rules.insert_gates(insert(graph, flags), gates))
    with clock("surgery"):
        operation, masked, states = cut_states(
            cut.masked(graph), masked, cut.ready.graph, cut.ready.plan, cut.chosen.coupling if options.allow_state_change else None,
            options.cuts_units,
        )  # fmt: skip
        final = files.share_again(ready.restored(operation.model, operation.kept), ready.original)
        operation = replace(operation, model=files.share_again(operation.model, ready.original))
    with clock("pack"):
        inner = {*ready.plan.by_weight(), *ready.packed}  # of which some are back in the branch that they came from
        names = _packable(operation.model, final, masks)
        shipped, packed = pack_with_inner(final, names, inner) if options.storage == "auto" else (final, ())
    evidence = Evidence(
        ready, options, masks, operation, packed, reasons, gates, cut.chosen.choices, shipped, cut.found, cut.floors, cut.shifts,
        passed_evenly(ready.graph, ready.plan) if options.by_flow else (), repaired, cut.improved, retrained, states, ridge,
    )  # fmt: skip
    if not (evidence.pruned or evidence.smaller):
        raise _nothing(ready.plan, {**evidence.kept_reasons(), **reasons})
    with clock("verify"):
        verification = verify(ready.original, masked, shipped, dataset, seed=options.seed, threads=options.threads, states=states)
    with clock("compare"):
        quality = compare_models(
            ready.original, shipped, dataset, limit=options.samples, seed=options.seed, threads=options.threads, progress=progress,
            states=states,
        )  # fmt: skip
    notes = [*few, *idle(options, given, scores), *unmatched(ready.plan, options), *training_notes(Graph(ready.original)), *ready.notes]
    report = build_report(evidence, verification, quality, clock.seconds, dataset, target, notes)
    with clock("write"):
        if folder is not None and is_first():
            files.save(masked, folder / "masked.onnx", ready.origin)
            files.save(final, folder / "pruned.onnx", ready.origin)
        if save_masks is not None and is_first():
            write_arrays(masks.arrays(), Path(save_masks))
        if save_report is not None and is_first():
            files.write_atomically(Path(save_report), to_json(report))
        if target is not None and is_first():  # last, so that no other failure leaves a file here
            files.save(shipped, target, ready.origin)
    return Result(whole(shipped), whole(masked), masks, cut.found, report)


def _check_outputs(graph: Graph, options: Options) -> None:
    weights = dict(options.output_weight)
    for name in weights:
        if name not in graph.outputs:
            raise RecipeError(f"output-weight names {name!r}, which is no output of the model; its outputs are {', '.join(graph.outputs)}")
    if all(weights.get(name, 1.0) == 0 for name in graph.outputs):
        raise RecipeError("output-weight is 0 for every output, so nothing would matter; give one of them a weight")


@dataclass(frozen=True)
class _Job:
    """What all steps of one run share."""

    ready: Prepared
    options: Options
    weights: frozenset[str]
    dataset: Dataset
    folder: Path | None
    clock: Clock
    progress: calibrate.Progress

    def tables(self, plan: Plan) -> tuple[Layer, ...]:
        """The readers of embedding tables that are to be pruned."""
        return tuple(layer for layer in plan.tables if layer.weight in self.weights)

    def draws(self) -> dict[str, Any]:
        """How samples are drawn and run."""
        options = self.options
        return {"samples": options.samples, "seed": options.seed, "threads": options.threads, "progress": self.progress}


@dataclass(frozen=True)
class _Cut:
    """What one round of scoring decided. `graph` has the means of what goes in its biases; its weights are whole still.

    flags: by initializer, what stays.
    """

    ready: Prepared
    options: Options
    rules: PaperRules
    found: Scores
    chosen: Chosen
    masks: Masks
    gates: tuple[Gate, ...]
    graph: Graph
    plan: Plan
    flags: Mapping[str, Any]
    shifts: tuple[Shift, ...]
    floors: tuple[Floor, ...]
    improved: Improved | None

    def masked(self, graph: Graph) -> onnx.ModelProto:
        """`graph` with zeros where something goes, and the gates of its shortcuts."""
        return self.rules.insert_gates(apply_weights(graph.model, applied(graph, self.flags)), self.gates)

    @property
    def removed(self) -> dict[str, Any]:
        """By weight, flags [out] of the units that are silent from now on."""
        gone = silenced(self.ready.plan, self.chosen, self.masks)
        return {layer.weight: gone[layer.name] for layer in self.ready.plan.layers if layer.name in gone}


def _cut(
    job: _Job, ready: Prepared, options: Options, scores: str | os.PathLike[str] | None, before: _Cut | None = None,
    folder: Path | None = None,
) -> _Cut:  # fmt: skip
    """Score and mask `ready`; what an earlier round (`before`) let go stays away. scores: a file, instead of measuring."""
    rules = PaperRules(ready.graph, ready.plan, options)
    with job.clock("calibrate"), _named(ready.path):
        if scores is not None:
            found: Scores = read_scores(Path(scores), ready.plan, options.scored, job.tables(ready.plan))
            rules.measure_alone(job.dataset, options, job.progress)
            options = replace(options, criterion=criterion_of(found, options))
        else:
            found = measure_scores(ready, job.dataset, options, rules, job.progress, folder or job.folder, job.tables(ready.plan))
    with job.clock("mask"):
        search, worth = _search(job, ready, found) if options.criterion == "flow-obs" else (None, None)
        chosen = decide(ready.graph, ready.plan, options, found, job.weights, job.dataset, search, worth)
        chosen = table_masks(ready.graph, ready.plan, options, found, job.weights, chosen)
        masks, gates = rules.apply(chosen.masks)
        if before is not None:
            masks, gates = both(before.masks, masks), both_gates(before.gates, gates)
        allowed = chosen.within(masks) if before is None else both(before.masks, chosen.within(masks))
        fit = partial(in_blocks, ready, options, chosen, found, allowed=allowed, gated=lambda model: rules.insert_gates(model, gates))
        masks = fit(ready.graph, masks, again=True)
        graph, shifts = _shifted(job, ready, options, found, chosen, masks)
    plan = ready.plan if graph is ready.graph else find(graph)
    floors, improved = chosen.floors, None
    if options.criterion == "flow-obs" and options.fine is not None:
        with job.clock("choose"), _named(ready.path):
            improved = _improved(job, ready, graph, plan, options, found, chosen, masks, allowed)
        masks, floors = improved.masks, floors if improved.taken == "flow" else improved.floors
    masks = fit(graph, masks)
    return _Cut(ready, options, rules, found, chosen, masks, gates, graph, plan, initializer_masks(plan, masks), shifts, floors, improved)


def _search(job: _Job, ready: Prepared, scores: Scores) -> tuple[Search, Worth]:
    """A better choice of whole units than flow's, and what units are worth to it before any is gone."""
    value = {name: score.relevance for name, score in scores.items() if score.relevance is not None}

    def search(coupling: Coupling, first: Sequence[Choice], choose: Choose, share: float) -> tuple[Choice, ...]:
        given = ready.graph, ready.plan, coupling, relevance(ready.plan, coupling, scores), value
        with job.clock("choose"), _named(ready.path):
            return improve_units(*given, tuple(first), choose, share, job.weights, job.dataset, **job.draws())

    def worth(coupling: Coupling) -> Mapping[int, float]:
        given = ready.graph, ready.plan, coupling, relevance(ready.plan, coupling, scores), value
        with job.clock("choose"), _named(ready.path):
            return unit_losses(*given, job.weights, job.dataset, **job.draws())

    return search, worth


def _shifted(job: _Job, ready: Prepared, options: Options, scores: Scores, chosen: Chosen, masks: Masks) -> tuple[Graph, tuple[Shift, ...]]:
    """The graph with the mean of what goes in its biases, where that is wanted."""
    solves = options.repair == "least-squares" and options.mean_shift != "off"
    if not options.shifts_means and not solves:
        return ready.graph, ()
    # Weights that start anew, or statistics that are measured anew, need no means from before.
    again = options.training.rewind is not None or (_recalibrates(options) and normalisations(ready.graph))
    if options.mean_shift == "auto" and options.trains and again:
        return ready.graph, ()
    means = {name: score.means for name, score in scores.items() if score.means is not None}
    if not means:
        measure = MeanMeasure(ready.plan)
        probe = instrument(ready.running, [item.tensor for item in measure.measurements])
        calibrate.run(
            probe, measure.measurements, job.dataset, limit=options.samples, seed=options.seed,
            threads=options.threads or os.cpu_count() or 1, progress=job.progress,
        )  # fmt: skip
        means = measure.means()
    # Channels that go as a whole leave the others as they were, and repair makes sure that means hold.
    portions = None if options.fine is None or options.repair == "least-squares" else kept_portions(ready.graph, ready.plan, scores, masks)
    model, shifts = compensate(ready.graph, ready.plan, masks, means, silenced(ready.plan, chosen, masks), portions)
    return (ready.graph if model is ready.graph.model else Graph(model)), shifts


def _improved(
    job: _Job, ready: Prepared, graph: Graph, plan: Plan, options: Options, scores: Scores, chosen: Chosen, masks: Masks,
    allowed: Masks,
) -> Improved:  # fmt: skip
    """The masks chosen again by what is lost after repair."""
    gone = silenced(ready.plan, chosen, masks)
    return improve(
        ready.graph, graph, plan, masks, allowed,
        [pool.weights for pool in pools(ready.plan, options, job.weights, None if options.by_channel else options.keep)],
        {score.weight: score.relevance for score in scores.values() if score.relevance is not None}, job.weights, job.dataset,
        pattern=None if options.pattern is None else parse_pattern(options.pattern),
        removed={layer.weight: gone[layer.name] for layer in ready.plan.layers if layer.name in gone}, **job.draws(),
    )  # fmt: skip


def _repaired(job: _Job, cut: _Cut) -> tuple[Graph, tuple[Repaired, ...], Contest | None]:
    """The graph with the weights that are left solved for again, where that is wanted, and how the ridge was decided."""
    if job.options.repair == "none" or not cut.flags:
        return cut.graph, (), None
    with job.clock("repair"), _named(job.ready.path):
        masked = apply_weights(cut.graph.model, applied(cut.graph, cut.flags))
        model, rows, ridge = repaired_best(
            cut.ready.graph, masked, cut.flags, job.weights, job.dataset, removed=cut.removed, **job.draws()
        )  # fmt: skip
    return Graph(model), rows, ridge


def _recalibrates(options: Options) -> bool:
    """Whether statistics of BatchNormalization are measured again."""
    wanted = options.training.recalibrate
    return wanted == "on" or (wanted == "auto" and options.trains and options.training.rewind is None)


def _recalibrated(job: _Job, cut: _Cut, graph: Graph) -> tuple[Graph, dict[str, Any] | None]:
    """The graph with statistics of BatchNormalization measured again where that is wanted, and what the report says about it."""
    if not _recalibrates(job.options) or not cut.flags:
        return graph, None
    with job.clock("recalibrate"), _named(job.ready.path):
        new = recalibrate(cut.masked(graph), job.dataset, **job.draws())
        names = [graph.names[number] for number in normalisations(graph)]
    return (Graph(apply_weights(graph.model, new)) if new else graph), {"recalibrated": names}


def _trained(job: _Job, scores: str | os.PathLike[str] | None) -> tuple[_Cut, Graph, dict[str, Any]]:
    """Rounds of score, mask and training; the last good one, its graph with new weights, and what the report says."""
    rounds = Rounds(job.ready.original, job.dataset, job.options, job.folder, job.progress)
    current, good, before = job.ready, None, None
    for number in range(1, job.options.training.iterations + 1):
        options = rounds.options(number)
        cut = _cut(job, current, options, scores if number == 1 else None, before, rounds.folder(number))
        graph = cut.graph
        if options.criterion == "flow-obs" and options.training.rewind is None:
            graph = _repaired(job, cut)[0]
        graph = rounds.rewound(graph)
        graph, again = _recalibrated(job, cut, graph)
        with job.clock("train"):
            arrays = rounds.train(number, cut.masked(graph), cut.flags, again)
        graph = Graph(apply_weights(graph.model, {**applied(graph, cut.flags), **arrays}))
        with job.clock("surgery"):
            rounds.count(cut.plan, operate(cut.masked(graph)).surviving)
        if rounds.lost_too_much():
            break
        good, before = (cut, graph), cut
        current = replace(
            job.ready, graph=graph, plan=cut.plan, sha256=files.digest(graph.model), origin=files.Origin(),
            gated=Graph(cut.masked(graph)) if cut.gates else None,
        )  # fmt: skip
    if good is None:
        raise NothingPrunedError(rounds.refusal())
    return *good, rounds.document()


@contextmanager
def _named(path: Path | None) -> Iterator[None]:
    """Name the user's file where onnxruntime refuses a model that was made from it."""
    try:
        yield
    except ModelError as error:
        if path is None:
            raise
        raise ModelError(f"{path}: {error}") from error


def _packable(model: onnx.ModelProto, final: onnx.ModelProto, masks: Masks) -> list[str]:
    """Weights of layers, and tables that were pruned, in the form of the file; everything else is stored as it is."""
    plan = find(Graph(model))
    found = {layer.weight for layer in plan.layers} | {layer.weight for layer in plan.tables if layer.weight in masks.keep}
    return sorted(found & {item.name for item in final.graph.initializer})


def _nothing(plan: Plan, reasons: Mapping[str, str]) -> NothingPrunedError:
    # The reasons that another option would change come first.
    rows = list(reasons.items()) + [(row.weight, row.reason) for row in plan.unranked]
    if not rows:
        operators = ", ".join(LAYER_OPERATORS).replace(", RNN", " or RNN")
        return NothingPrunedError(f"nothing could be pruned: the model has no {operators} with a constant weight")
    return NothingPrunedError(
        f"nothing could be pruned: {rows[0][0]}: {rows[0][1]}" + (f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""),
        rows,
    )
