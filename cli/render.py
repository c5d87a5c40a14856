"""What people see: live progress on standard error, tables and one closing sentence on standard output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["comparison", "data", "overview", "progress", "prune_report", "quantize_report", "retrain_report"]

_STAGES = {
    "calibrate": "Calibrating and scoring",
    "choose": "Choosing again",
    "repair": "Repairing layers",
    "compare": "Comparing with the original",
    "train": "Training",
    "recalibrate": "Recalibrating",
}


class _Rate(TextColumn):
    """Samples per second."""

    def __init__(self) -> None:
        super().__init__("{task.fields[rate]}")


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    """A callback (stage, done, total) that draws bars with rate and time left; silent with `quiet` or where there is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES.get(stage, stage), total=total, rate="")
            speed = bars.tasks[bars.task_ids.index(tasks[stage])].speed
            bars.update(tasks[stage], completed=done, rate=f"{speed:.0f}/s" if speed else "")

        yield update


def _console() -> Console:
    # A pipe has no width: leave lines whole there, so that nothing is cut.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _bytes(count: int) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:,.2f} GB"


def _count(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _table(*columns: str, title: str = "") -> Table:
    table = Table(title=title or None, title_justify="left", header_style="bold", show_edge=False, pad_edge=False)
    for name in columns:
        number = name.startswith(">")
        table.add_column(name.lstrip(">"), justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table


def _narrow(console: Console) -> bool:
    """Whether a table of all columns would be cut into slivers."""
    return console.width < 110


def _agreement(quality: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, item in quality["agreement"].items():
        noise = (
            "equal"
            if item["sqnr_db"] is None and item["max_abs"] == 0
            else f"{item['sqnr_db']:.1f} dB"
            if item["sqnr_db"] is not None
            else "no signal"
        )
        top1 = f", same top class on {100 * item['top1']:.1f} %" if "top1" in item else ""
        lines.append(f"output {name}: cosine {item['cosine']:.4f}, SQNR {noise}{top1}")
    return lines


def _accuracy(quality: Mapping[str, Any]) -> list[str]:
    if quality["accuracy_before"] is None:
        return []
    return [f"accuracy: {100 * quality['accuracy_before']:.2f} % before, {100 * quality['accuracy_after']:.2f} % after"]


def prune_report(report: Mapping[str, Any]) -> None:
    """The closing table of `prune`, the totals, and what to do next."""
    console = _console()
    _print_layers(console, report["layers"], "weights" if report["options"]["granularity"].endswith("weight") else "connections")
    if report["groups"]:
        console.print()
        console.print(_cut_groups(report["groups"]))
    before, after, totals = report["input"], report["output"], report["totals"]
    sizes = _table("", ">before", ">after", ">%")
    for label, key, show in (
        ("file", "bytes", _bytes),
        ("parameters", "params", _count),
        ("not zero", "nonzero_params", _count),
        ("MACs", "macs", _count),
    ):
        known = before[key] and after[key] is not None
        sizes.add_row(label, show(before[key]), show(after[key]), f"{100 * after[key] / before[key]:.1f}" if known else "")
    console.print()
    console.print(sizes)
    console.print()
    for line in _training_lines(report["retrain"]):
        console.print(line, markup=False, highlight=False)
    for line in (*_agreement(report["quality"]), *_accuracy(report["quality"])):
        console.print(f"{line} (on the {report['quality']['samples']} samples given)", markup=False, highlight=False)
    for warning in report["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)
    console.print(_closing(report, totals, before, after), markup=False, highlight=False, soft_wrap=True)


def _training_lines(document: Mapping[str, Any] | None) -> list[str]:
    """What training did, a line for each round."""
    if document is None or "iterations" not in document:
        return []
    losses = ", ".join(f"{item['output']}: {item['loss']}" for item in document["loss"])
    lines = [f"trained ({document['method']}) on {document['samples']:,} samples; loss {losses}"]
    for row in document["iterations"]:
        judged = "" if row["quality"] is None else f", {document['measure']} {100 * row['quality']:.2f} % on samples set aside"
        lines.append(f"iteration {row['iteration']}: {row['kept_percent']:.2f} % of the weights kept{judged}")
    return lines + ([document["stopped"]] if document["stopped"] else [])


def retrain_report(report: Mapping[str, Any]) -> None:
    """The closing lines of `retrain`."""
    console = _console()
    for line in (*_training_lines(report["retrain"]), *_agreement(report["quality"]), *_accuracy(report["quality"])):
        console.print(line, markup=False, highlight=False)
    for warning in report["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)
    console.print(
        f"Trained; {report['totals']['kept_percent']:.2f} % of the weights are not zero, as before. It is {report['output']['path']}.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _print_layers(console: Console, rows: Sequence[Mapping[str, Any]], unit: str) -> None:
    """What happened to every weight; in a narrow window the reasons of what was not pruned stand below the table."""
    narrow = _narrow(console)
    numbers = (f">{unit} kept", ">of", ">%", ">channels")
    table = _table("layer", "status", *numbers) if narrow else _table("layer", "operator", "status", *numbers, "stored as", "reason")
    for row in rows:
        channels = row.get("channels")
        shown = (
            f"{row[f'{unit}_kept']:,}", f"{row[unit]:,}", f"{100 * row[f'{unit}_kept'] / max(row[unit], 1):.1f}",
            "" if channels is None else f"{channels[1]}/{channels[0]}",
        )  # fmt: skip
        layer, reason = escape(row["node"]), escape(row["reason"] or "")
        if narrow:
            table.add_row(layer, row["status"], *shown)
        else:
            table.add_row(layer, row["op"], row["status"], *shown, row.get("storage", ""), reason)
    console.print(table)
    for row in rows if narrow else ():
        if row["status"] != "pruned":
            console.print(f"{row['node']} {row['status']}: {row['reason']}", markup=False, highlight=False)


def _closing(report: Mapping[str, Any], totals: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    times = before["bytes"] / max(after["bytes"], 1)
    size = f"the file is {times:.2f} times smaller and" if times > 1 else "the file is not smaller, but"
    # Tables such as embeddings count in the totals, but --keep does not speak of them.
    ranked = [row for row in report["layers"] if "channels" in row and row["status"] != "skipped"]
    own = 100 * sum(row["weights_kept"] for row in ranked) / max(sum(row["weights"] for row in ranked), 1)
    part = "" if f"{own:.1f}" == f"{totals['kept_percent']:.1f}" else f" ({own:.1f} % of those that this run could prune)"
    gone = any(row["status"] == "pruned" for row in report["layers"]) or before["nonzero_params"] != after["nonzero_params"]
    removed = "" if gone else "Nothing more was removed. "
    return (
        f"{removed}Kept {totals['kept_percent']:.1f} % of the weights{part}; {size} verified. "
        f"It is {after['path']}; check it on data that was not used here: relief-onnx compare {before['path']} {after['path']} --data TEST"
    )


def quantize_report(report: Mapping[str, Any]) -> None:
    """The closing tables of `quantize`: every layer, every stage, and what to do next."""
    console = _console()
    narrow = _narrow(console)
    layers = _table("layer", "status", ">zeros %") if narrow else _table("layer", "operator", "status", ">zeros %", "stored as", "reason")
    for row in report["layers"]:
        share = "" if row["zeros_after"] is None else f"{100 * row['zeros_after'] / max(row['weights'], 1):.1f}"
        if narrow:
            layers.add_row(escape(row["node"]), row["status"], share)
        else:
            layers.add_row(escape(row["node"]), row["op"], row["status"], share, row["storage"], escape(row["reason"]))
    console.print(layers)
    for row in report["layers"] if narrow else ():
        if row["status"] == "float":
            console.print(f"{row['node']} stays float: {row['reason']}", markup=False, highlight=False)
    console.print()
    console.print(_stage_table(report["stages"]))
    samples, first = report["data"]["samples"], report["stages"][0]["stage"]
    speed = report["speed"]
    console.print(
        f"Agreement is with stage {first}, on the {samples} samples given. Time per sample here: "
        f"{speed['ms_per_sample_before']:.3g} ms before, {speed['ms_per_sample_after']:.3g} ms after.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    for warning in report["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)
    before, after = report["input"], report["output"]
    times = before["bytes"] / max(after["bytes"], 1)
    done = sum(row["status"] != "float" for row in report["layers"])
    console.print(
        f"{done} of {len(report['layers'])} weights are int8; the file is {times:.2f} times smaller and verified. It is {after['path']}; "
        f"check it on data that was not used here: relief-onnx compare {report['input']['path']} {after['path']} --data TEST",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """Size and agreement of every stage; of several outputs the one that agrees least."""
    outputs = max(len(row["agreement"] or {}) for row in stages)
    lowest = "lowest " if outputs > 1 else ""
    columns = [">file", ">%", f">{lowest}cosine", f">{lowest}SQNR dB", ">same top class %", ">accuracy %"]
    shown = [(row["stage"], *_stage_cells(row, stages[0]["bytes"])) for row in stages]
    used = [0, *(i + 1 for i in range(len(columns)) if any(row[i + 1] for row in shown))]
    table = _table(*(["stage", *columns][i] for i in used))
    for row in shown:
        table.add_row(*(row[i] for i in used))
    return table


def _stage_cells(row: Mapping[str, Any], first: int) -> tuple[str, ...]:
    items = list((row["agreement"] or {}).values())
    noise = [item["sqnr_db"] for item in items if item["sqnr_db"] is not None]
    equal = bool(items) and all(item["max_abs"] == 0 for item in items)
    top = [item["top1"] for item in items if "top1" in item]
    return (
        _bytes(row["bytes"]), f"{100 * row['bytes'] / max(first, 1):.1f}",
        f"{min(item['cosine'] for item in items):.4f}" if items else "",
        "equal" if equal else f"{min(noise):.1f}" if noise else "",
        f"{100 * min(top):.1f}" if top else "",
        "" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}",
    )  # fmt: skip


def overview(document: Mapping[str, Any]) -> None:
    """The tables of `inspect`."""
    console = _console()
    if document["layers"]:
        console.print(_layers(document["layers"], _narrow(console)))
    if document["skipped"] or document["tables"]:
        table = _table("node", "operator", "weight", ">shape", "reason", title="Left alone")
        for row in (*document["tables"], *document["skipped"]):
            table.add_row(escape(row["node"]), row["op"], escape(row["weight"]), "x".join(map(str, row["shape"])), escape(row["reason"]))
        console.print()
        console.print(table)
    if document["groups"]:
        console.print()
        console.print(_groups(document["groups"]))
    totals = document["totals"]
    console.print(
        f"\n{totals['prunable_weights']:,} weights can be pruned, {totals['table_weights'] + totals['skipped_weights']:,} are left alone; "
        f"{totals['coupled_params']:,} of {document['input']['params']:,} parameters belong to channels that can go. {_next(document)}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _next(document: Mapping[str, Any]) -> str:
    """The command that makes sense after this look at a model."""
    open_weights, undecided = document["totals"]["open_weights"], ""
    if open_weights:
        undecided = (
            f"{open_weights:,} of those left alone are in branches or loops: the data that you prune with decide which of them run. "
        )
    elif not document["layers"]:
        return "There is nothing to prune in this model."
    channels = " [--granularity channel]" if document["totals"]["coupled_params"] else ""
    return f"{undecided}Next: relief-onnx prune {document['input']['path']} --data FOLDER{channels}"


def _layers(rows: Sequence[Mapping[str, Any]], narrow: bool) -> Table:
    """The weights that can be pruned; a narrow window has no room for their names beside those of their nodes."""
    numbers = (">shape", ">weights", ">MACs", ">channels that can go")
    columns = ("layer", *numbers[:-1], ">can go") if narrow else ("layer", "operator", "weight", *numbers)
    table = _table(*columns, "why not all", title="Can be pruned")
    for row in rows:
        names = (escape(row["node"]),) if narrow else (escape(row["node"]), row["op"], escape(row["weight"]))
        table.add_row(
            *names, "x".join(map(str, row["shape"])), f"{row['weights']:,}", _count(row["macs"]),
            f"{row['removable_channels']}/{row['out_channels']}", escape(row["channel_reason"] or ""),
        )  # fmt: skip
    return table


def _some(names: Sequence[str], shown: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return escape(", ".join(names[:shown]) + more)


def _groups(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line for channels that stand and fall together, wherever they are."""
    table = _table(
        ">#", ">units", ">can go", ">channels each", "written by", "read by", "why not all",
        title="Coupled channels: a unit that goes takes its channels out of every layer named in its line",
    )  # fmt: skip
    for number, row in enumerate(rows, 1):
        table.add_row(
            str(number), f"{row['channels']:,}", f"{row['removable']:,}", str(row["width"]), _some(row["members"]), _some(row["readers"]),
            escape(row["reason"] or ""),
        )  # fmt: skip
    return table


def _cut_groups(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("coupled channels written by", ">units kept", ">of", "reason")
    for row in rows:
        table.add_row(_some(row["members"]), str(row["units_kept"]), str(row["units"]), escape(row["reason"]))
    return table


def comparison(document: Mapping[str, Any]) -> None:
    """The table of `compare`."""
    console = _console()
    a, b = document["a"], document["b"]
    table = _table("", ">A", ">B", ">B in % of A")
    for label, key, show in (
        ("file", "bytes", _bytes), ("parameters", "params", _count), ("not zero", "nonzero_params", _count), ("MACs", "macs", _count),
        ("ms per sample", "ms_per_sample", lambda value: f"{value:.3f}"),
    ):  # fmt: skip
        known = a[key] and b[key] is not None
        table.add_row(label, show(a[key]), show(b[key]), f"{100 * b[key] / a[key]:.1f}" if known else "")
    accuracy = document["quality"]["accuracy_before"], document["quality"]["accuracy_after"]
    if accuracy[0] is not None:
        table.add_row("accuracy %", f"{100 * accuracy[0]:.2f}", f"{100 * accuracy[1]:.2f}", "")
    console.print(table)
    for line in _agreement(document["quality"]):
        console.print(f"{line} (on {document['quality']['samples']} samples)", markup=False, highlight=False)
    for warning in document["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)


def data(document: Mapping[str, Any]) -> None:
    """The table of `check-data`."""
    console = _console()
    labels = f"labelled ({document['labels']})" if document["labelled"] else "no labels"
    console.print(
        f"{document['source']}: {document['kind']}, {document['samples']} samples, {labels}, batches {document['batches']}",
        markup=False,
        highlight=False,
    )
    table = _table("input", "type", "the model wants", "the data has", ">min", ">max", ">mean")
    wanted = {item["name"]: item for item in document["expects"]}
    for item in document["inputs"]:
        sizes = wanted[item["name"]]["shape"]
        shape = "any" if sizes is None else " x ".join("?" if size is None else str(size) for size in sizes)
        shapes = ", ".join(" x ".join(map(str, one)) for one in item["shapes"][:3])
        numbers = ["" if item[key] is None else f"{item[key]:.4g}" for key in ("min", "max", "mean")]
        table.add_row(escape(item["name"]), item["dtype"], escape(shape), shapes, *numbers)
    console.print(table)
    if document["classes"]:
        console.print("classes: " + ", ".join(f"{name} ({count})" for name, count in document["classes"]), markup=False, highlight=False)
    for warning in document["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)
    console.print("The data fits the model.", highlight=False)
