"""Torch-Pruning on one model, after onnx2torch: benchmarks/peers.py says what is counted."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.peers_forms import THREADS, UNFINISHED, base, first_line, torch_variants
from benchmarks.zoo_models import float_params


def stub_torchvision() -> None:
    """onnx2torch imports torchvision for two operators that no model here has; the CPU build of torch has no torchvision beside it."""
    vision, ops = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
    for name in ("box_convert", "nms", "roi_align"):
        setattr(ops, name, None)
    vision.ops = ops  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": vision, "torchvision.ops": ops}


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
