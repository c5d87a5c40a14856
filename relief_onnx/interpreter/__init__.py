"""An ONNX model as a torch module: the graph is interpreted, its initializers are the parameters, and they go back by name.

    network = Network(onnx.load("model.onnx"))
    outputs = network({"input": torch.rand(8, 1, 28, 28)})
    ...                                     # train network.parameters()
    trained = apply_weights(model, network.arrays())

This package and the one that trains are the only ones that import torch.
"""

from __future__ import annotations

from relief_onnx.errors import Unsupported
from relief_onnx.interpreter.network import Network

__all__ = ["Network", "Unsupported"]
