"""onnxsim's Wanda and SparseGPT on one model at several shares, for the flow benchmark; runs in the peers' environment.

    python -m benchmarks.flow_peers MODEL METHOD SPEC SHARE ...      prints one line `ROW {json}` for each share

SPEC is a JSON file that benchmarks.flow wrote: the file to prune (every weight an initializer), the shapes of the weights that
relief-onnx calls prunable, and how many calibration samples to use. Each row says what share of those weights is really left and how
good the result is, or the reason why there is none. `run` starts this in a process of its own, with a time limit, and keeps the rows.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.zoo_models import ROOT

METHODS = ("wanda", "sparsegpt")
BATCH_BYTES = 4 << 20  # of inputs, for one calibration batch: both keep whole activations of it

Row = dict[str, Any]


def run(python: Path, name: str, method: str, spec: Path, shares: Sequence[float], cache: Path, limit: int) -> list[Row]:
    """The rows of one method, one for each share; those measured before with the same inputs and code come from `cache`."""
    key = hashlib.sha256(spec.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    stored = json.loads(cache.read_text()) if cache.exists() else {}
    known: dict[str, Row] = stored["rows"] if stored.get("key") == key else {}
    missing = spread([share for share in shares if f"{share:g}" not in known])
    if missing:
        found, reason = _start(python, name, method, spec, missing, limit)
        known |= {f"{row['share']:g}": row for row in found}
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps({"key": key, "rows": known}, indent=1, sort_keys=True) + "\n")
        for share in missing:  # not kept: a slow or broken run may be tried again
            known.setdefault(f"{share:g}", {"share": share, "reason": reason})
    return [known[f"{share:g}"] for share in shares]


def version(python: Path) -> str:
    """The version of onnxsim in that environment."""
    command = [str(python), "-c", "from importlib.metadata import version; print(version('onnxsim'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def spread(shares: Sequence[float]) -> list[float]:
    """Every third first, so that a run that meets its time limit has results all over the range."""
    return [share for first in (1, 0, 2) for share in shares[first::3]]


def _start(python: Path, name: str, method: str, spec: Path, shares: Sequence[float], limit: int) -> tuple[list[Row], str]:
    command = [str(python), "-m", "benchmarks.flow_peers", name, method, str(spec), *(f"{share:g}" for share in shares)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT, check=False)
        out, reason = done.stdout, f"the process died with {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:160]}"
    except subprocess.TimeoutExpired as error:
        out, reason = (error.stdout or b"").decode(), f"longer than {limit} s for this and what came before"
    return [json.loads(line[4:]) for line in out.splitlines() if line.startswith("ROW ")], reason


def measure(name: str, method: str, spec: dict[str, Any], share: float) -> Row:
    """One cut. A peer's failure is a row with its reason: the table must say who could not do what."""
    import onnx
    import onnxsim

    from benchmarks import flow_data

    row: Row = {"share": share}
    start = time.perf_counter()
    feed, _ = flow_data.load(name, "calib_a")
    each = sum(value[:1].nbytes for value in feed.values())
    feeds = flow_data.calibration(name, "calib_a", max(1, min(64, BATCH_BYTES // each)), spec["samples"])
    try:
        pruned = getattr(onnxsim, f"apply_{method}_pruning")(onnx.load(spec["model"]), calibration_data=feeds, sparsity=1 - share)
        row |= {"seconds": round(time.perf_counter() - start, 2)}
        row |= {"kept": density(pruned, spec["weights"]), "score": flow_data.evaluate(name, pruned, "test", spec["threads"])}
    except Exception as error:
        row |= {"reason": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"}
    return row


def density(model: Any, weights: dict[str, Sequence[int]]) -> float:
    """Numbers that are not zero over all numbers of those initializers. Raises ValueError where one is gone or has another shape."""
    import numpy as np
    from onnx import numpy_helper

    found = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer if item.name in weights}
    for name, shape in weights.items():
        if name not in found or found[name].shape != tuple(shape):
            raise ValueError(f"weight {name} {list(shape)} is {list(found[name].shape) if name in found else 'gone'}")
    return sum(int(np.count_nonzero(item)) for item in found.values()) / sum(item.size for item in found.values())


def main() -> None:
    name, method, spec, *shares = sys.argv[1:]
    for share in shares:
        print("ROW " + json.dumps(measure(name, method, json.loads(Path(spec).read_text()), float(share))), flush=True)


if __name__ == "__main__":
    main()
