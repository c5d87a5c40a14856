"""make peers: which share of the zoo's parameters Torch-Pruning and onnxsim can remove by whole channels. Writes results/peers.json.

Runs in an environment of its own (build/peers, see the Makefile), each peer on each model in a process of its own with a time limit,
two threads, because a peer may crash or hang. Every model is tried as it is and after onnxsim.simplify with the input shapes fixed and
Constant nodes as initializers, for Torch-Pruning also converted to opset 13, and the best share counts: both peers get the form of the
file that suits them.

What is counted, for both: float numbers of the model that have an index in a removable channel, over all float numbers in the
file's initializers and Constant nodes.
- Torch-Pruning, after onnx2torch: every group of DependencyGraph.get_all_groups with its own default roots (Conv, Linear, LSTM). A group
  counts when removing half of its channels (or a quarter, or one) leaves a model that runs with output shapes unchanged: groups that
  reach an output are thereby left out, as its users do with ignored_layers. The numbers of a group are those that its own pruning
  functions remove when they are asked to remove all of the group's channels, parameters and buffers alike, each number once.
  Then half of the channels of all these groups go in one run of its MagnitudePruner: `runs_after_pruning` says whether that works,
  and has no part in the share.
- onnxsim: apply_structured_pruning (the Python one and the C++ port, which knows more) followed by apply_attention_head_pruning, all
  at sparsity 0.5: the whole size of each float initializer of which any axis shrank. That is never less than what it can remove. A
  model that onnxruntime then refuses, or whose outputs change shape, is no result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.peers_forms import STAGES, THREADS, UNFINISHED, base, first_line, run_shapes, variants
from benchmarks.peers_torch import torch_pruning
from benchmarks.zoo_models import RESULTS, ROOT, ZOO, feed, float_params, gather, is_float, rows, tensors

PEERS = ("torch-pruning", "onnxsim")
LIMIT_S = 120


def onnxsim_pruning(path: Path, inputs: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    import onnxsim

    total = float_params(onnx.load(path))
    functions = {"python": onnxsim.apply_structured_pruning, "C++": onnxsim.apply_structured_pruning_cpp}
    for form, load in variants(path, inputs):
        for which, function in functions.items():
            row: dict[str, Any] = {"form": f"{form}, {which}", "stage": "load"}
            try:
                model = load()
                reference = run_shapes(model, inputs)
                row["stage"] = "apply_structured_pruning"
                pruned = function(model, 0.5)
                row["stage"] = "apply_attention_head_pruning"
                pruned = onnxsim.apply_attention_head_pruning(pruned, 0.5)
                elements, removed = shrunk(model, pruned)
                row |= {"elements": elements, "removed": removed, "share": elements / base(total, model)}
                if not elements:
                    row |= {"reason": "nothing matched, nothing removed"}
                else:
                    row["stage"] = "onnxruntime"
                    try:
                        row |= {"runs_after_pruning": True, "output_shape_unchanged": run_shapes(pruned, inputs) == reference}
                    except Exception as error:
                        row |= {"runs_after_pruning": False, "after_reason": first_line(error)}
                say(row)
            except Exception as error:
                say(row | {"reason": f"{row['stage']}: {first_line(error)}"})


def shrunk(before: onnx.ModelProto, after: onnx.ModelProto) -> tuple[int, int]:
    """Numbers of float initializers of which any axis got shorter, and how many of them went."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in tensors(after.graph) if tensor.name}
    elements = removed = 0
    for tensor in tensors(before.graph):
        shape = sizes.get(tensor.name, ())
        if tensor.name in sizes and is_float(tensor) and shape != tuple(tensor.dims):
            elements += int(np.prod(tensor.dims))
            removed += int(np.prod(tensor.dims)) - int(np.prod(shape))
    return elements, removed


def usable(row: dict[str, Any]) -> bool:
    return bool(row.get("share")) and (bool(row.get("groups_prunable")) or bool(row.get("output_shape_unchanged")))


def best(found: list[dict[str, Any]], died: str | None) -> dict[str, Any]:
    """The row with the largest share that works; else the one that got furthest, and why it ended."""
    working = [row for row in found if usable(row)]
    if working:
        chosen = max(working, key=lambda row: row["share"])
        return chosen | ({"ended": died} if died and chosen.get("partial") else {})
    if found:
        furthest = max(
            found, key=lambda row: (row.get("share") or 0, STAGES.index(row["stage"]) if row["stage"] in STAGES else len(STAGES))
        )
        why = furthest.get("reason") or furthest.get("after_reason") or died or "output shape changes"
        return furthest | {"share": None, "found_share": furthest.get("share"), "reason": why}
    return {"share": None, "reason": died or "no answer"}


def measure(peer: str, model: dict[str, Any], folder: Path, limit: int) -> dict[str, Any]:
    """One peer on one model in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.peers", "--models", str(folder), "--one", peer, model["id"]]
    died = None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT, check=False)
        out, code = done.stdout, done.returncode
        if code:
            died = f"the process died with {code}: {(done.stderr.strip().splitlines() or [''])[-1][:160]}"
    except subprocess.TimeoutExpired as error:
        out, died = (error.stdout or b"").decode(), f"longer than {limit} s"
    answers: dict[str, dict[str, Any]] = {}
    for line in out.splitlines():
        if line.startswith("ROW "):
            answer = json.loads(line[4:])
            if died and UNFINISHED in answer.get("reason", ""):
                answer["reason"] = answer["reason"].replace(UNFINISHED, died)
            answers[answer["form"]] = answer
    row = best(list(answers.values()), died)
    row.pop("stage", None)
    return row | {"seconds": round(time.perf_counter() - start, 1), "tried": [brief(answer) for answer in answers.values()]}


def brief(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("form", "share", "groups", "groups_prunable", "runs_after_pruning", "output_shape_unchanged", "parameters_left", "reason")
    return {key: row[key] for key in keys if key in row} | ({"after_reason": row["after_reason"]} if "after_reason" in row else {})


def say(row: dict[str, Any]) -> None:
    print("ROW " + json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=ZOO, help="folder with the models (default: build/zoo, filled from PyPI)")
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds for one peer on one model")
    parser.add_argument("--only", nargs="*", help="only these models; the others' results stay")
    parser.add_argument("--one", nargs=2, metavar=("PEER", "MODEL"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        peer, name = given.one
        model = next(row for row in rows() if row["id"] == name)
        {"torch-pruning": torch_pruning, "onnxsim": onnxsim_pruning}[peer](given.models / f"{name}.onnx", feed(model, 0), say)
        return
    gather(given.models)
    target = RESULTS / "peers.json"
    models = json.loads(target.read_text())["models"] if given.only and target.exists() else {}
    versions = {name: metadata.version(name) for name in ("torch", "torch-pruning", "onnx2torch", "onnxsim", "onnx", "onnxruntime")}
    for model in rows():
        if given.only and model["id"] not in given.only:
            continue
        found = {peer: measure(peer, model, given.models, given.limit) for peer in PEERS}
        models[model["id"]] = {"params": float_params(onnx.load(given.models / f"{model['id']}.onnx"))} | found
        for peer, row in found.items():
            share = "-" if row["share"] is None else f"{100 * row['share']:.1f} %"
            print(
                f"{model['id']:24} {peer:14} {share:>8}  {row['seconds']:6.1f} s  {row.get('reason') or row.get('ended') or ''}", flush=True
            )
        RESULTS.mkdir(exist_ok=True)
        document = {"versions": versions, "limit_s": given.limit, "threads": THREADS, "models": models}
        target.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
