"""The plot of the flow benchmark: small multiples, one panel for each model, score against the share of weights kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.flow_models import NAMES

# Okabe and Ito's colours, which the colour-blind can tell apart; markers say the same again.
STYLES: dict[str, tuple[str, str]] = {
    "flow": ("#000000", "o"),
    "relief": ("#E69F00", "s"),
    "magnitude-layer": ("#56B4E9", "v"),
    "magnitude-global": ("#0072B2", "^"),
    "wanda-row": ("#CC79A7", "P"),
    "wanda": ("#D55E00", "X"),
    "sparsegpt": ("#009E73", "D"),
}
LABELS = {"wanda-row": "Wanda (own)", "wanda": "Wanda (onnxsim)", "sparsegpt": "SparseGPT (onnxsim, updates weights)"}
COLUMNS = 3


def draw(document: dict[str, Any], target: Path) -> None:
    """Write the SVG: the same bytes for the same document and matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "flow", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot

    models = {name: document["models"][name] for name in NAMES if name in document["models"]}
    rows = -(-(len(models) + 1) // COLUMNS)  # one more panel for the legend
    figure, grid = pyplot.subplots(rows, COLUMNS, figsize=(3.6 * COLUMNS, 2.7 * rows), squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for panel, (name, model) in zip(panels, models.items(), strict=False):
        _panel(panel, name, model)
    handles, labels = (items[::-1] for items in panels[0].get_legend_handles_labels())  # flow is drawn last and named first
    for panel in panels[len(models) :]:
        panel.axis("off")
    panels[len(models)].legend(handles, labels, loc="center left", frameon=False, title="nothing repaired, single weights")
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def _panel(panel: Any, name: str, model: dict[str, Any]) -> None:
    """Kept share on a logarithmic axis from much to little; each method at what it really kept."""
    for method, rows in sorted(model["rows"].items(), key=lambda item: list(STYLES).index(item[0]), reverse=True):
        colour, marker = STYLES[method]
        runs = [*rows, *model["matched"]] if method == "flow" else rows
        points = sorted((100 * row["kept"], 100 * row["score"]) for row in runs if "score" in row)
        wide = method == "flow"
        panel.plot(
            [x for x, _ in points], [y for _, y in points], color=colour, marker=marker, markersize=4 if wide else 3.5,
            linewidth=2 if wide else 1, label=LABELS.get(method, method), linestyle="--" if method == "sparsegpt" else "-",
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
