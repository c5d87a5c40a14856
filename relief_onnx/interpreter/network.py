"""The torch module: parameters are the graph's own initializers, `forward` does what the model does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Self

import onnx
import torch
from numpy.typing import NDArray

from relief_onnx.aside import array_of
from relief_onnx.errors import ModelError
from relief_onnx.interpreter.build import Builder, Shared
from relief_onnx.interpreter.expansion import expand, opsets_of
from relief_onnx.interpreter.program import Store
from relief_onnx.interpreter.readers import all_initializers, roles
from relief_onnx.interpreter.registry import Mode
from relief_onnx.interpreter.values import HALVES, to_array, to_tensor

__all__ = ["Network"]


class Network(torch.nn.Module):
    """An ONNX model, interpreted.

    Weights are floating initializers that are read as data, addressed by name; running statistics of BatchNormalization are buffers, which
    train() updates; everything else is constant. Half precision is held and computed in float32.
    """

    def __init__(self, model: onnx.ModelProto, *, trainable: Collection[str] | None = None) -> None:
        """`trainable`: names of the initializers to train; by default all that are read as data.

        Raises Unsupported where a node cannot be run in torch, ModelError where `trainable` names no weight.
        """
        super().__init__()
        self.model = model
        model = expand(model)
        opsets = opsets_of(model)
        stored = all_initializers(model)
        found = roles(model, opsets, trainable)
        self._keys: dict[str, tuple[bool, str]] = {}
        self._stored = {name: stored[name] for name in (*found.weights, *found.statistics)}
        for number, name in enumerate(found.weights):
            self._keys[name] = (True, f"weight{number}")
            self.register_parameter(f"weight{number}", torch.nn.Parameter(to_tensor(stored[name])))
        for number, name in enumerate(found.statistics):
            self._keys[name] = (False, f"statistic{number}")
            self.register_buffer(f"statistic{number}", to_tensor(stored[name]))
        self._mode = Mode()
        store = Store(self._parameters, self._buffers)
        builder = Builder(model.graph, Shared(opsets, self._keys, self._register, store, self._mode))
        self._program = builder.build()
        given = {item.name: item for item in model.graph.input}
        taken = {item.name for item in model.graph.initializer}
        self.inputs = tuple(name for name in given if name not in taken)
        self.outputs = tuple(item.name for item in model.graph.output)
        self._casts = [_declared(item) for item in model.graph.output]
        self.train(False)

    def _register(self, value: torch.Tensor) -> str:
        key = f"constant{len(self._buffers)}"
        self.register_buffer(key, value, persistent=False)
        return key

    def train(self, mode: bool = True) -> Self:
        """As in torch: BatchNormalization uses the batch and updates its running statistics, Dropout that asks for it is active."""
        self._mode.training = mode
        super().train(mode)
        return self

    def weight(self, name: str) -> torch.nn.Parameter:
        """The parameter of an initializer. Raises KeyError where it is not trained."""
        trainable, key = self._keys[name]
        if not trainable:
            raise KeyError(name)
        return self._parameters[key]

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """All parameters by the names of their initializers."""
        return {name: self._parameters[key] for name, (trainable, key) in self._keys.items() if trainable}

    def forward(self, feed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All outputs of the model by name. Raises ModelError where an input is missing or unknown."""
        if feed.keys() != set(self.inputs):
            wrong = sorted(feed.keys() ^ set(self.inputs))
            raise ModelError(
                f"the model's inputs are {', '.join(self.inputs)}; {wrong[0]} is {'unknown' if wrong[0] in feed else 'missing'}"
            )
        values = self._program.run([_single(feed[name]) for name in self.inputs])
        return {
            name: value if dtype is None else value.to(dtype) for name, value, dtype in zip(self.outputs, values, self._casts, strict=True)
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The current values of every initializer that changed, in its stored type and shape: for surgery.apply_weights."""
        found = {}
        for name, (trainable, key) in self._keys.items():
            tensor = self._stored[name]
            value = to_array((self._parameters if trainable else self._buffers)[key], tensor.data_type)
            if value.tobytes() != array_of(tensor).tobytes():
                found[name] = value
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        """A network of its own with the same weights; the steps of a program belong to one network."""
        other = Network(self.model, trainable=list(self.weights()))
        other.load_state_dict(self.state_dict())
        return other.train(self.training)


def _single(value: Any) -> Any:
    """Half precision is computed in float32."""
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def _declared(info: onnx.ValueInfoProto) -> torch.dtype | None:
    """The type of a half precision output, which is computed in float32."""
    kind = info.type.tensor_type.elem_type
    if kind not in HALVES:
        return None
    return torch.float16 if kind == onnx.TensorProto.FLOAT16 else torch.bfloat16
