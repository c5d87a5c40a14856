"""Who is ahead in which cell of the flow benchmark: pure functions of its results.

A cell is one model at one share of weights kept. Where an opponent kept another share than asked, flow is judged by a run at the share
that the opponent really kept, so nobody gains from keeping more. Cells that an opponent could not fill are counted apart, and
so are ties: a tie at the bottom, where every result is garbage, is no merit. `of these, in use` leaves the garbage out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]  # share, kept and score, or share and reason
Rows = Mapping[str, Sequence[Row]]  # by method

WITHOUT_UPDATES = ("relief", "magnitude-layer", "magnitude-global", "wanda-row", "wanda")
WITH_UPDATES = ("sparsegpt",)
SAME_SHARE = 0.002  # of all prunable weights


def needs_match(rows: Rows, tolerance: float = SAME_SHARE) -> list[float]:
    """Shares that opponents kept and flow has no run at, ascending: one for each group within the tolerance."""
    at = [row["kept"] for row in rows["flow"] if "kept" in row]
    wanted: list[float] = []
    for method in (*WITHOUT_UPDATES, *WITH_UPDATES):
        for row in rows.get(method, ()):
            if "kept" in row and not any(abs(row["kept"] - kept) <= tolerance for kept in (*at, *wanted)):
                wanted.append(row["kept"])
    return sorted(wanted)


def flow_at(rows: Rows, matched: Iterable[Row], kept: float) -> Row | None:
    """Flow's run nearest to a kept share, None where none is within the tolerance."""
    runs = [row for row in (*rows["flow"], *matched) if "score" in row and abs(row["kept"] - kept) <= SAME_SHARE]
    return min(runs, key=lambda row: abs(row["kept"] - kept)) if runs else None


def versus(rows: Rows, matched: Iterable[Row], method: str) -> list[str]:
    """For each share: `ahead`, `tied` or `behind` of one opponent, or `open` where one of both has no result."""
    matched = list(matched)
    found = []
    for row in rows.get(method, ()):
        ours = flow_at(rows, matched, row["kept"]) if "score" in row else None
        found.append("open" if ours is None else _word(ours["score"] - row["score"]))
    return found


def best(rows: Rows, matched: Iterable[Row], methods: Sequence[str] = WITHOUT_UPDATES) -> list[str]:
    """For each share: the worst word against those methods that have a result there; `open` where none has."""
    matched = list(matched)
    words = [versus(rows, matched, method) for method in methods if rows.get(method)]
    found = []
    for cell in zip(*words, strict=True):
        known = [word for word in cell if word != "open"]
        found.append(next((word for word in ("behind", "tied", "ahead") if word in known), "open"))
    return found


def count(words: Iterable[str]) -> dict[str, int]:
    """How often each word stands there."""
    listed = list(words)
    return {word: listed.count(word) for word in ("ahead", "tied", "behind", "open")}


def useful(model: Mapping[str, Any]) -> list[bool]:
    """For each share: whether flow or anyone without weight updates keeps half of the original's score; below that no one would use it."""
    columns = zip(*(rows for method, rows in model["rows"].items() if method not in WITH_UPDATES), strict=True)
    return [max((row["score"] for row in column if "score" in row), default=0.0) >= model["original"] / 2 for column in columns]


def summary(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Counts over all models: against every opponent without weight updates together, and against each opponent alone."""
    found = {"all without updates": count(word for model in models.values() for word in best(model["rows"], model["matched"]))}
    found["of these, in use"] = count(
        word for model in models.values() for word, alive in zip(best(model["rows"], model["matched"]), useful(model), strict=True) if alive
    )
    for method in (*WITHOUT_UPDATES, *WITH_UPDATES):
        found[method] = count(word for model in models.values() for word in versus(model["rows"], model["matched"], method))
    return found


def _word(difference: float) -> str:
    return "tied" if abs(difference) < 1e-9 else "ahead" if difference > 0 else "behind"
