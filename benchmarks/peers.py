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
import copy
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter

from benchmarks.zoo_models import RESULTS, ROOT, ZOO, feed, float_params, gather, is_float, rows, tensors

PEERS = ("torch-pruning", "onnxsim")
THREADS = 2
LIMIT_S = 120


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def simplified(model: onnx.ModelProto, inputs: dict[str, Any]) -> onnx.ModelProto:
    """onnxsim.simplify with the sample's shapes (without them where that fails), Constant nodes turned into initializers."""
    import onnxsim

    shapes = {name: list(array.shape) for name, array in inputs.items() if array.ndim}
    try:
        result, ok = onnxsim.simplify(model, overwrite_input_shapes=shapes)
        run_shapes(result, inputs)
    except Exception:
        result, ok = onnxsim.simplify(model)
    if not ok:
        raise RuntimeError("onnxsim.simplify: its own check failed")
    return lifted(result)


def lifted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Both peers look for weights among the initializers; some exporters keep them in Constant nodes."""
    for node in [node for node in model.graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"]:
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        model.graph.node.remove(node)
    return model


def variants(path: Path, inputs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], onnx.ModelProto]]]:
    yield "as it is", lambda: onnx.load(path)
    yield "simplified", lambda: simplified(onnx.load(path), inputs)


def torch_variants(path: Path, inputs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], onnx.ModelProto]]]:
    """onnx2torch knows opset 13 best."""
    yield from variants(path, inputs)
    yield "opset 13, simplified", lambda: simplified(onnx.version_converter.convert_version(lifted(onnx.load(path)), 13), inputs)


def base(original: int, model: onnx.ModelProto) -> int:
    """All float numbers that a share is a share of. A form that turned quantized weights into floats is another model."""
    found = float_params(model)
    if found > 1.5 * original:
        raise RuntimeError(f"this form unfolds quantized weights into {found:,} floats; the file has {original:,}")
    return max(original, found, 1)


# --- Torch-Pruning ---------------------------------------------------------------------------------------------------------------


def stub_torchvision() -> None:
    """onnx2torch imports torchvision for two operators that no model here has; the CPU build of torch has no torchvision beside it."""
    vision, ops = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
    for name in ("box_convert", "nms", "roi_align"):
        setattr(ops, name, None)
    vision.ops = ops  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": vision, "torchvision.ops": ops}


STAGES = ("load", "onnx2torch", "forward", "DependencyGraph", "groups")
UNFINISHED = "did not finish"


def torch_pruning(path: Path, inputs: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    stub_torchvision()
    import onnx2torch
    import torch

    torch.set_num_threads(THREADS)
    total = float_params(onnx.load(path))
    for form, load in torch_variants(path, inputs):
        row: dict[str, Any] = {"form": form}

        def enter(stage: str, row: dict[str, Any] = row) -> None:
            row["stage"] = stage
            say(row | {"reason": f"{stage}: {UNFINISHED}"})

        try:
            enter("load")
            model = load()
            order = [item.name for item in model.graph.input if item.name in inputs]
            example = tuple(torch.from_numpy(inputs[name].copy()) for name in order)
            enter("onnx2torch")
            network = onnx2torch.convert(model).eval()
            enter("forward")
            with torch.no_grad():
                reference = shapes(network(*example))
            enter("DependencyGraph")
            graph = graph_of(copy.deepcopy(network), example)
            enter("groups")
            groups = list(graph.get_all_groups(root_module_types=roots()))
            for found in prune_groups(graph, groups, Trial(network, example, reference), base(total, model)):
                say(row | found)
        except Exception as error:
            say(row | {"reason": f"{row['stage']}: {first_line(error)}"})


def shapes(result: Any) -> list[tuple[int, ...]]:
    return [tuple(item.shape) for item in (result if isinstance(result, (tuple, list)) else [result])]


def roots() -> tuple[type, ...]:
    import torch_pruning as tp

    return (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_LSTM)


def graph_of(network: Any, example: Any) -> Any:
    import torch_pruning as tp

    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return tp.DependencyGraph().build_dependency(network, example_inputs=example, verbose=False)


def prune_groups(graph: Any, groups: list[Any], trial: Trial, total: int) -> Iterator[dict[str, Any]]:
    """What is known after each group, so that a time limit leaves something; last the whole."""
    found: dict[str, Any] = {}
    good, refused = 0, {}
    result: dict[str, Any] = {"groups": len(groups)}
    for group in groups:
        root = graph._module2name[group[0].dep.target.module]
        problem = trial.prune(root)
        if problem is None:
            merge(found, marked(graph, group))
            good += 1
        else:
            refused[root] = problem
        elements = sum(int(mask.sum()) for mask in found.values())
        result |= {"groups_prunable": good, "elements": elements, "share": elements / total, "refused": refused}
        yield result | {"partial": True}
    if good:
        yield result | halved(trial, list(refused))
    else:
        why = next(iter(refused.values()), "no Conv, Linear or LSTM module whose channels it can trace")
        yield result | {"reason": f"no prunable group: {why}"}


class Trial:
    """A copy of a network that loses channels, group after group, and is replaced by a fresh one where that breaks it."""

    def __init__(self, network: Any, example: Any, reference: Any) -> None:
        self.network, self.example, self.reference = network, example, reference
        self.renew()

    def renew(self) -> None:
        self.copy = copy.deepcopy(self.network)
        self.graph = graph_of(self.copy, self.example)
        self.used = False

    def prune(self, root: str) -> str | None:
        """Why a group can lose neither half, nor a quarter, nor one (or one per block of a grouped layer) of its channels."""
        if self.used and self.attempt(root, 2) is None:
            return None
        problem = "one channel"
        for part in (2, 4, None):
            if self.used:
                self.renew()
            problem = self.attempt(root, part)
            if problem is None:
                return None
        return problem

    def attempt(self, root: str, part: int | None) -> str | None:
        import torch

        self.used = True
        try:
            module = dict(self.copy.named_modules())[root]
            pruner = self.graph.get_pruner_of_module(module)
            channels = pruner.get_out_channels(module)
            whole = self.graph.get_pruning_group(module, pruner.prune_out_channels, list(range(channels)))
            blocks = max(grouping(dep.target.module) for dep, _ in whole)
            size = channels // blocks
            drop = 1 if part is None else size // part
            if not 0 < drop < size:
                return "one channel"
            half = self.graph.get_pruning_group(
                module, pruner.prune_out_channels, [block * size + i for block in range(blocks) for i in range(drop)]
            )
            if not self.graph.check_pruning_group(half):
                return "its check_pruning_group refuses: a layer of the group would lose all channels"
            half.prune()
            with torch.no_grad():
                after = shapes(self.copy(*self.example))
        except Exception as error:
            return first_line(error)
        return None if after == self.reference else "the output's shape changes"


def grouping(module: Any) -> int:
    """Blocks of a layer that must lose equally many channels; a depthwise convolution has none."""
    import torch

    if isinstance(module, torch.nn.GroupNorm):
        return int(module.num_groups)
    if isinstance(module, torch.nn.modules.conv._ConvNd) and module.groups != module.out_channels:
        return int(module.groups)
    return 1


def halved(trial: Trial, refused: list[str]) -> dict[str, Any]:
    """Half of the channels of all good groups in one run of the peer's own pruner."""
    import torch
    import torch_pruning as tp

    try:
        pruned = copy.deepcopy(trial.network)
        before = sum(item.numel() for item in pruned.parameters())
        modules = dict(pruned.named_modules())
        pruner = tp.pruner.MagnitudePruner(
            pruned,
            trial.example,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[modules[name] for name in refused],
            root_module_types=list(roots()),
        )
        pruner.step()
        with torch.no_grad():
            after = shapes(pruned(*trial.example))
        left = sum(item.numel() for item in pruned.parameters())
        return {"runs_after_pruning": True, "output_shape_unchanged": after == trial.reference, "parameters_left": round(left / before, 3)}
    except Exception as error:
        return {"runs_after_pruning": False, "after_reason": first_line(error)}


def marked(graph: Any, group: Any) -> dict[str, Any]:
    """Which numbers of which parameter or buffer this group's own pruning functions remove when all of its channels go."""
    import torch

    found: dict[str, Any] = {}
    for dep, idxs in group:
        module = dep.target.module
        bare = isinstance(module, torch.nn.Parameter)
        name = graph._param_to_name[module] if bare else graph._module2name.get(module)
        if name is None:
            continue
        if bare:
            before = {"": module}
        else:
            before = {key: item for key, item in [*module.named_parameters(), *module.named_buffers()] if item.is_floating_point()}
        if not before:
            continue
        numbered = {key: torch.arange(item.numel(), dtype=torch.float64).reshape(item.shape) for key, item in before.items()}
        if bare:
            trial: Any = torch.nn.Parameter(numbered[""])
        else:
            trial = copy.deepcopy(module)
            for key, value in numbered.items():
                if key in trial._parameters:
                    trial._parameters[key] = torch.nn.Parameter(value)
                else:
                    trial._buffers[key] = value
        dep.handler.__self__.pruning_dim = dep.target.pruning_dim
        trial = dep.handler(trial, idxs)
        left = {"": trial} if bare else dict([*trial.named_parameters(), *trial.named_buffers()])
        for key, item in numbered.items():
            mask = np.ones(item.numel(), bool)
            if left.get(key) is not None:
                mask[left[key].detach().numpy().astype(np.int64).reshape(-1)] = False
            merge(found, {f"{name}.{key}": mask})
    return found


def merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, mask in more.items():
        into[key] = into[key] | mask if key in into else mask


# --- onnxsim ---------------------------------------------------------------------------------------------------------------------


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


def run_shapes(model: onnx.ModelProto, inputs: dict[str, Any]) -> list[tuple[int, ...]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {item.name for item in session.get_inputs()}
    return [np.shape(item) for item in session.run(None, {name: array for name, array in inputs.items() if name in wanted})]


# --- all of them -----------------------------------------------------------------------------------------------------------------


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
