"""The plot of the flow and one-shot benchmarks: small multiples, one panel for each model, score against the share of weights kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.flow_models import NAMES

PEER_LABELS = {"wanda": "Wanda (onnxsim)", "sparsegpt": "SparseGPT (onnxsim, updates weights)"}
COLUMNS = 3


@dataclass(frozen=True)
class Look:
    """How a benchmark's plot looks: colour and marker of each method, the first named first; `own` are drawn wide, `dashed` dashed.

    Colours are Okabe and Ito's, which the colour-blind can tell apart; markers say the same again.
    """

    title: str
    styles: Mapping[str, tuple[str, str]]
    own: tuple[str, ...]
    dashed: tuple[str, ...]
    labels: Mapping[str, str]


FLOW = Look(
    "nothing repaired, single weights",
    {
        "flow": ("#000000", "o"),
        "relief": ("#E69F00", "s"),
        "magnitude-layer": ("#56B4E9", "v"),
        "magnitude-global": ("#0072B2", "^"),
        "wanda-row": ("#CC79A7", "P"),
        "wanda": ("#D55E00", "X"),
        "sparsegpt": ("#009E73", "D"),
    },
    ("flow",),
    ("sparsegpt",),
    {"wanda-row": "Wanda (own)", **PEER_LABELS},
)


def draw(document: dict[str, Any], target: Path, look: Look = FLOW) -> None:
    """Write the SVG: the same bytes for the same document and matplotlib.

    document: `models`, each with `rows` by method and `matched`: more rows of the own methods, by method, or a list.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "flow", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot

    models = {name: document["models"][name] for name in NAMES if name in document["models"]}
    rows = -(-(len(models) + 1) // COLUMNS)  # one more panel for the legend
    figure, grid = pyplot.subplots(rows, COLUMNS, figsize=(3.6 * COLUMNS, 2.7 * rows), squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for panel, (name, model) in zip(panels, models.items(), strict=False):
        _panel(panel, name, model, look)
    handles, labels = (items[::-1] for items in panels[0].get_legend_handles_labels())  # drawn last, named first
    for panel in panels[len(models) :]:
        panel.axis("off")
    panels[len(models)].legend(handles, labels, loc="center left", frameon=False, title=look.title)
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def _panel(panel: Any, name: str, model: dict[str, Any], look: Look) -> None:
    """Kept share on a logarithmic axis from much to little; each method at what it really kept."""
    more = model["matched"] if isinstance(model["matched"], dict) else {look.own[0]: model["matched"]}
    for method, (colour, marker) in reversed(look.styles.items()):
        if method not in model["rows"]:
            continue
        runs = [*model["rows"][method], *more.get(method, ())]
        points = sorted((100 * row["kept"], 100 * row["score"]) for row in runs if "score" in row)
        wide = method in look.own
        panel.plot(
            [x for x, _ in points], [y for _, y in points], color=colour, marker=marker, markersize=4 if wide else 3.5,
            linewidth=2 if wide else 1, label=look.labels.get(method, method), linestyle="--" if method in look.dashed else "-",
        )  # fmt: skip
    panel.axhline(100 * model["original"], color="#999999", linewidth=0.8, linestyle=":")
    panel.set_xscale("log")
    panel.set_xlim(100, 4)
    ticks = [70, 50, 35, 25, 15, 10, 5]
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_ylim(0, 103)
    panel.set_title(f"{name}: {model['kind']}", fontsize=9, loc="left")
    panel.set_xlabel("weights kept, %")
    panel.set_ylabel("accuracy, %" if model["metric"] == "accuracy" else f"{model['metric']}, %")
    panel.grid(axis="y", color="#dddddd", linewidth=0.5)
