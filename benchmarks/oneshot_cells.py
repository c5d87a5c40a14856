"""Who is ahead in which cell of the one-shot benchmark, and how much of an opponent's loss is left: pure functions of its results.

Cells are those of flow_cells: one model at one share of weights kept, ours judged by a run at the share that the opponent really kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import flow_cells

Row = Mapping[str, Any]
Model = Mapping[str, Any]  # original, rows by method, matched: more rows of each repaired method

REPAIRED = ("flow + repair", "flow-obs + repair")
OPPONENTS = ("magnitude-layer", "magnitude-global", "wanda", "sparsegpt")
ALL = "all of them"
LEAST_LOSS = 0.001  # a tenth of a point: below it a quotient of losses says nothing
MOST = 1 / 3  # the aim for the median of what is left of SparseGPT's loss

# Floors (a naive prototype's results) and aims of issue 5 that hold for models and metrics of this benchmark, by share kept.
FLOORS: Mapping[str, Mapping[float, float]] = {
    "resnet20": {0.5: 0.919, 0.35: 0.904, 0.25: 0.876, 0.15: 0.758, 0.1: 0.642},
    "minilm_l3": {0.5: 0.986, 0.25: 0.914},
}
AIMS: Mapping[str, Mapping[float, float]] = {"resnet20": {0.25: 0.9, 0.1: 0.8}}


def seen(rows: flow_cells.Rows, own: str) -> dict[str, Sequence[Row]]:
    """One of our methods and the opponents as flow_cells wants them: it calls the method under test `flow`."""
    return {"flow": rows.get(own, ()), **{method: rows[method] for method in OPPONENTS if rows.get(method)}}


def needs_match(rows: flow_cells.Rows, own: str) -> list[float]:
    """Shares that opponents kept and this method has no run at."""
    return flow_cells.needs_match(seen(rows, own))


def words(model: Model, own: str, opponent: str = ALL) -> list[str]:
    """For each share of an opponent (or of all together, the worst counts): `ahead`, `tied`, `behind` or `open`."""
    rows, matched = seen(model["rows"], own), model["matched"].get(own, ())
    if opponent == ALL:
        return flow_cells.best(rows, matched, OPPONENTS)
    return flow_cells.versus(rows, matched, opponent)


def losses(model: Model, own: str, opponent: str = "sparsegpt") -> list[dict[str, float]]:
    """For each share that the opponent kept and we have a run at: both losses (original minus score), and ours / theirs.

    No `left` where the opponent lost less than LEAST_LOSS.
    """
    rows, matched = seen(model["rows"], own), model["matched"].get(own, ())
    found = []
    for row in rows.get(opponent, ()):
        ours = flow_cells.flow_at(rows, matched, row["kept"]) if "score" in row else None
        if ours is None:
            continue
        cell = {"share": row["share"], "kept": row["kept"], "ours": model["original"] - ours["score"]}
        cell["theirs"] = model["original"] - row["score"]
        if cell["theirs"] >= LEAST_LOSS:
            cell["left"] = cell["ours"] / cell["theirs"]
        found.append(cell)
    return found


def median_left(models: Mapping[str, Model], own: str) -> dict[str, Any]:
    """The median of what is left of SparseGPT's loss over all cells, and over those where one of both keeps half of the score."""
    every, alive = [], []
    for model in models.values():
        for cell in losses(model, own):
            if "left" not in cell:
                continue
            every.append(cell["left"])
            if min(cell["ours"], cell["theirs"]) <= model["original"] / 2:
                alive.append(cell["left"])
    return {"cells": len(every), "median": _median(every), "cells_in_use": len(alive), "median_in_use": _median(alive)}


def counts(models: Mapping[str, Model], own: str) -> dict[str, dict[str, int]]:
    """How often ahead, tied, behind and open, against all opponents together and each alone."""
    return {
        opponent: flow_cells.count(word for model in models.values() for word in words(model, own, opponent))
        for opponent in (ALL, *OPPONENTS)
    }


def cost(rows: Sequence[Row]) -> dict[str, Any]:
    """Of a method's runs: median seconds of each stage, of choosing and repair as multiples of the calibration, and the most memory."""
    runs = [row for row in rows if "timing" in row]
    if not runs:
        return {}
    stages = {stage: statistics.median(row["timing"].get(stage, 0.0) for row in runs) for stage in ("calibrate", "choose", "repair")}
    multiples = [(row["timing"].get("choose", 0.0) + row["timing"].get("repair", 0.0)) / row["timing"]["calibrate"] for row in runs]
    found: dict[str, Any] = {f"{stage}_s": round(seconds, 2) for stage, seconds in stages.items()}
    return found | {
        "of_calibration": round(statistics.median(multiples), 2),
        "most_of_calibration": round(max(multiples), 2),
        "seconds": round(statistics.median(row["seconds"] for row in runs), 1),
        "peak_mb": max(row["peak_mb"] for row in runs),
    }


def against(models: Mapping[str, Model], own: str, wanted: Mapping[str, Mapping[float, float]]) -> list[str]:
    """Lines that compare our scores with given ones, in percent."""
    lines = []
    for name, scores in wanted.items():
        reached = {row["share"]: row["score"] for row in models.get(name, {"rows": {}})["rows"].get(own, ()) if "score" in row}
        cells = [
            f"{100 * share:g} %: {100 * reached[share]:.1f} ({'reached' if reached[share] >= score else 'missed'}, {100 * score:.1f})"
            for share, score in scores.items()
            if share in reached
        ]
        if cells:
            lines.append(f"{name}: " + ", ".join(cells))
    return lines


def verdicts(models: Mapping[str, Model]) -> str:
    """Everything that the issue asks for, in words, for each repaired method that was measured."""
    lines = []
    for own in REPAIRED:
        if not any("score" in row for model in models.values() for row in model["rows"].get(own, ())):
            continue
        lines.append(f"{own}: cells ahead / tied / behind / open")
        for opponent, found in counts(models, own).items():
            lines.append(f"  {opponent:17}" + " / ".join(f"{found[word]:>3}" for word in ("ahead", "tied", "behind", "open")))
        for name, model in models.items():
            behind = _behind(model, own)
            lines += [f"  behind on {name}: {behind}"] if behind else []
        lines.append("  left of SparseGPT's loss (original minus pruned), ours / theirs at the share that it kept:")
        for name, model in models.items():
            cells = [f"{100 * cell['kept']:.0f} %: " + (f"{cell['left']:.2f}" if "left" in cell else "-") for cell in losses(model, own)]
            lines += [f"    {name:14}{', '.join(cells)}"] if cells else []
        left = median_left(models, own)
        lines.append(
            f"    median {_number(left['median'])} of {left['cells']} cells; where one of both keeps half of the score "
            f"{_number(left['median_in_use'])} of {left['cells_in_use']} (aim: at most {MOST:.2f})"
        )
        lines += [f"  aim of the issue, {line}" for line in against(models, own, AIMS)]
        lines += [f"  floor of the issue, {line}" for line in against(models, own, FLOORS)]
        for name, model in models.items():
            price = cost(model["rows"].get(own, ()))
            if price:
                lines.append(
                    f"  {name:14}calibrate {price['calibrate_s']} s, choose {price['choose_s']} s, repair {price['repair_s']} s: "
                    f"{price['of_calibration']} x calibration (at most {price['most_of_calibration']} x), {price['peak_mb']} MB"
                )
    return "\n".join(lines)


def _behind(model: Model, own: str) -> str:
    """Where, and behind whom."""
    found = []
    for opponent in OPPONENTS:
        rows = model["rows"].get(opponent, ())
        shares = [f"{100 * row['kept']:.0f}" for row, word in zip(rows, words(model, own, opponent), strict=True) if word == "behind"]
        found += [f"{opponent} at {', '.join(shares)} %"] if shares else []
    return "; ".join(found)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
