"""make bench-flow-channels: accuracy of CIFAR-10 ResNets after whole channels went, at 75 and 50 % of the multiply-accumulates.

Nothing is trained or repaired. Ours: `flow` with `keep` as the share of work, and `relief` with the alpha that comes closest to it from
below. Opponents: all one-shot criteria of Torch-Pruning, and onnxsim's structured pruning (benchmarks/flow_channels_peers.py, run here in
the peers' environment; what it measured stays in build/flow_channels until the tools' versions change). Of each criterion the best of its
scopes and forms on the test images counts, and of each opponent the best criterion: chosen on the test images, which favours the opponents.
Of each of our two criteria it is the better of the two forms of the file.
Work is counted the same way for everyone. Prints tables, writes results/flow_channels.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import onnx

import relief_onnx
from benchmarks.flow_channels_data import (
    ALL,
    CACHE,
    CALIBRATION,
    FIRST,
    FORMS,
    INPUT,
    MODELS,
    ROUNDING,
    TARGETS,
    Row,
    accuracies,
    at_most,
    batches,
    best_rows,
    images,
    model_path,
    onnx_macs,
    runner,
    unpack_images,
)
from benchmarks.zoo_models import RESULTS, ROOT
from relief_onnx.options import CHOICES
from relief_onnx.scoring import write_scores

CRITERIA = ("flow", "relief")
TOOL = "relief-onnx"


def by_keep(path: Path, feeds: list[Any], criterion: str, round_to: int, target: float) -> onnx.ModelProto:
    """One run with the share of the work as `keep`, as a user gives it."""
    given: dict[str, Any] = {"criterion": criterion, "granularity": "channel", "keep": f"{100 * target:g}%"}
    return relief_onnx.prune(path, feeds, round_to=round_to, storage="dense", **given).model


class ByAlpha:
    """The largest cuts by alpha that are at most a target; scores are measured once, and no alpha is tried twice."""

    def __init__(self, path: Path, feeds: list[Any], criterion: str, folder: Path) -> None:
        self.path, self.feeds, self.scores = path, feeds[:1], folder / "scores.npz"
        self.total = onnx_macs(onnx.load(path))
        self.found: dict[tuple[int, float], tuple[onnx.ModelProto, float]] = {}
        write_scores(relief_onnx.score(path, feeds, criterion=criterion, granularity="channel"), self.scores)

    def share(self, round_to: int, alpha: float) -> float:
        key = (round_to, alpha)
        if key not in self.found:
            given: dict[str, Any] = {"granularity": "channel", "alpha": alpha, "round_to": round_to, "storage": "dense"}
            try:
                model = relief_onnx.prune(self.path, self.feeds, scores=self.scores, **given).model
            except relief_onnx.NothingPrunedError:
                model = onnx.load(self.path)
            self.found[key] = (model, onnx_macs(model) / self.total)
        return self.found[key][1]

    def __call__(self, round_to: int, target: float) -> onnx.ModelProto | None:
        best = at_most(partial(self.share, round_to), target, steps=10)
        return None if best is None else self.found[round_to, best[0]][0]


def ours(name: str, form: str, criterion: str, rounding: Iterable[int]) -> list[Row]:
    """A row per rounding and target. Raises ReliefError where a cut fails; only a version without the criterion is a reason."""
    path, rows = model_path(name, form), []
    feeds = [{INPUT: batch} for batch in batches(images("calib")[0], 100)]
    known = criterion in CHOICES["criterion"]
    with tempfile.TemporaryDirectory() as folder:
        by_alpha = ByAlpha(path, feeds, criterion, Path(folder)) if criterion != "flow" else None
        for round_to in rounding:
            for target in TARGETS:
                start = time.perf_counter()
                row: Row = {"tool": TOOL, "criterion": criterion, "labels": False, "setting": "alpha" if by_alpha else "keep"}
                row |= {"form": form, "round_to": round_to, "target": target}
                rows.append(row)
                if not known:
                    row["reason"] = "this version does not have it"
                    continue
                pruned = by_alpha(round_to, target) if by_alpha else by_keep(path, feeds, criterion, round_to, target)
                row["seconds"] = round(time.perf_counter() - start, 1)
                if pruned is None:
                    row["reason"] = "cannot come down to the target"
                    continue
                row |= {"macs": onnx_macs(pruned), "share": round(onnx_macs(pruned) / onnx_macs(onnx.load(path)), 4)}
                row |= accuracies(runner(pruned))
    return rows


# -- tables ----------------------------------------------------------------------------------------------------------------


def cell(rows: list[Row]) -> str:
    """The best of a criterion's rows in words; one that fell far behind was measured on 500 images only."""
    measured = [row for row in rows if "accuracy_2500" in row]
    if not measured:
        quick = [row["accuracy_500"] for row in rows if "accuracy_500" in row]
        return f"about {max(quick):.0f} (500 images)" if quick else "-"
    row = max(measured, key=lambda row: row["accuracy_2500"])
    where = f"{row['form']}, {row['setting']}"
    whole = f" ({row['accuracy_10000']:.2f})" if "accuracy_10000" in row else ""
    return f"{row['accuracy_2500']:.2f}{whole} at {100 * row['share']:.1f} %, {where}"


def table(rows: list[Row], round_to: int) -> list[list[str]]:
    """A line per tool and criterion, best first at the smallest target; a column per target; only rows of one rounding."""
    chosen = [row for row in rows if row["round_to"] == round_to]
    best = best_rows(chosen, ("tool", "criterion", "target"))
    names = list(dict.fromkeys((row["tool"], row["criterion"]) for row in chosen))

    def order(name: tuple[str, str]) -> list[float]:
        return [-(best[*name, target]["accuracy_2500"] if (*name, target) in best else -1.0) for target in TARGETS]

    lines = []
    for tool, criterion in sorted(names, key=lambda name: (name[0] != TOOL, order(name))):
        mine = [row for row in chosen if (row["tool"], row["criterion"]) == (tool, criterion)]
        cells = [cell([row for row in mine if row["target"] == target]) for target in TARGETS]
        lines.append([tool, criterion + (" (reads labels)" if mine[0]["labels"] else ""), *cells])
    return lines


def verdicts(rows: list[Row]) -> list[Row]:
    """For each rounding and target: ours and the best of every opponent, and whether ours is ahead of all of them."""
    found = []
    for round_to in sorted({row["round_to"] for row in rows}):
        for target in TARGETS:
            here = [row for row in rows if row["target"] == target and row["round_to"] == round_to]
            own = best_rows([row for row in here if row["tool"] == TOOL], ("criterion",))
            # onnxsim cannot round, so its one row stands against both of ours.
            peers = [row for row in rows if row["target"] == target and (row["round_to"] == round_to or row["tool"] == "onnxsim")]
            best = best_rows([row for row in peers if row["tool"] != TOOL], ("tool", "labels"))
            line: Row = {"round_to": round_to, "target": target}
            line |= {criterion: row["accuracy_2500"] for (criterion,), row in own.items()}
            line |= {f"{tool}{', labels' if labels else ''}": row["accuracy_2500"] for (tool, labels), row in best.items()}
            mine = line.get("flow")
            unlabelled = [row["accuracy_2500"] for (_, labels), row in best.items() if not labels]
            line["flow ahead"] = None if mine is None or not unlabelled else mine > max(unlabelled)
            line["flow ahead of labels too"] = None if mine is None or not best else mine > max(r["accuracy_2500"] for r in best.values())
            found.append(line)
    return found


def show(heads: list[str], lines: Iterable[list[str]]) -> None:
    whole = [heads, *lines]
    widths = [max(len(line[column]) for line in whole) for column in range(len(heads))]
    for line in whole:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def report(name: str, entry: dict[str, Any]) -> None:
    before = entry["accuracy_2500"], entry["accuracy_10000"]
    print(f"\n{name}: {entry['macs'] / 1e6:.1f} MMACs, {before[0]} % on the first {FIRST:,} test images, {before[1]} % on all {ALL:,}")
    for round_to in sorted({row["round_to"] for row in entry["rows"]}):
        print(
            f"\nChannels in multiples of {round_to}: % on {FIRST:,} test images (on all), share of the work, form and setting of the best"
        )
        show(["tool", "criterion", *(f"{100 * target:g} % of the MACs" for target in TARGETS)], table(entry["rows"], round_to))
    print()
    for line in entry["verdicts"]:
        print(", ".join(f"{key} {value}" for key, value in line.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy after channel pruning, beside Torch-Pruning and onnxsim.")
    parser.add_argument("--ours-only", action="store_true", help="do not measure the peers; their stored rows are shown")
    parser.add_argument("--peers", type=Path, default=ROOT / "build" / "peers" / "bin" / "python", help="python of the peers' environment")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--round-to", nargs="*", type=int, default=ROUNDING)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "flow_channels.json")
    given = parser.parse_args()
    unpack_images()
    if not given.ours_only:
        chosen = ["--models", *given.models, "--round-to", *map(str, given.round_to)]
        subprocess.run([given.peers, "-m", "benchmarks.flow_channels_peers", *chosen], cwd=ROOT, check=True)
    document = json.loads(given.output.read_text()) if given.output.exists() else {}
    document |= {"calibration_images": CALIBRATION, "relief_onnx": relief_onnx.__version__}
    models = document.setdefault("models", {})
    for name in given.models:
        original = onnx.load(model_path(name, "folded"))
        run = runner(original)
        entry = {"macs": onnx_macs(original)} | accuracies(run)
        rows = []
        for criterion in CRITERIA:
            for form in FORMS:
                rows += ours(name, form, criterion, given.round_to)
        stored = CACHE / f"{name}_peers.json"
        if stored.exists():
            peers = json.loads(stored.read_text())
            document["versions"] = peers["versions"]
            rows += [row for row in peers["rows"].values() if row["round_to"] in given.round_to or row["tool"] == "onnxsim"]
        models[name] = entry | {"rows": rows, "verdicts": verdicts(rows)}
        # After every model, so that a run that is stopped leaves what it measured.
        given.output.parent.mkdir(exist_ok=True)
        given.output.write_text(json.dumps(document, indent=1) + "\n")
        report(name, models[name])


if __name__ == "__main__":
    main()
