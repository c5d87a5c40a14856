"""Small models with one kind of fused node each, between layers, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from builders import Net
from numpy.typing import NDArray
from onnx import TensorProto, helper

Feed = dict[str, NDArray[Any]]
Case = Callable[[], tuple[onnx.ModelProto, Feed]]
MS = "com.microsoft"
T, C, HEADS = 5, 12, 3


class Fused(Net):
    """A net with com.microsoft's operators."""

    def ms(self, operator: str, *inputs: str, outputs: int = 1, **values: Any) -> Any:
        return self.op(operator, *inputs, outputs=outputs, domain=MS, **values)

    def done(self, *outputs: tuple[str, int]) -> onnx.ModelProto:
        """The model; outputs with their ranks. ONNX's inference does not know the operators, so sizes are left open."""
        tensors = [onnx.numpy_helper.from_array(value, name) for name, value in self.initializers.items()]
        inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape, kind in self.inputs]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name, rank in outputs]
        graph = helper.make_graph(self.nodes, "fused", inputs, ends, tensors)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(MS, 1)]
        model = helper.make_model(graph, opset_imports=imports, producer_name="tests")
        model.ir_version = self.ir_version
        return model

    def vector(self, size: int = C) -> str:
        return self.constant(self.rng.uniform(0.5, 1.5, size).astype(np.float32), "v")


def image(build: Callable[[Fused, str], str], opset: int = 17) -> Case:
    """3 channels of 8 x 8 pixels to 6 through a convolution, the fused node under test, and a last convolution of 6 channels."""

    def make() -> tuple[onnx.ModelProto, Feed]:
        net = Fused(seed=1, opset=opset)
        x = net.input("N", 3, 8, 8)
        first = net.op("Relu", net.op("Conv", x, net.weight(6, 3, 3, 3), net.bias(6), pads=[1] * 4))
        y = net.op("Conv", build(net, first), net.weight(4, 6, 1, 1), net.bias(4))
        return net.done((y, 4)), {x: net.rng.standard_normal((6, 3, 8, 8)).astype(np.float32)}

    return make


def tokens(build: Callable[[Fused, str], str], opset: int = 17, mask: str = "") -> Case:
    """T tokens of 7 numbers to C through a layer, the fused node under test, and a last layer. mask: "lengths", "keys" or "pairs"."""

    def make() -> tuple[onnx.ModelProto, Feed]:
        net = Fused(seed=2, opset=opset)
        x = net.input("N", T, 7)
        feed: Feed = {x: net.rng.standard_normal((6, T, 7)).astype(np.float32)}
        if mask:
            shapes: Mapping[str, tuple[int | str, ...]] = {"lengths": ("N",), "keys": ("N", T), "pairs": ("N", T, T)}
            net.inputs.append(("mask", shapes[mask], TensorProto.INT32))
            lengths = net.rng.integers(2, T + 1, 6)
            keys = np.arange(T) < lengths[:, None]
            values = {"lengths": lengths, "keys": keys, "pairs": keys[:, None] & (net.rng.random((6, T, T)) < 0.8)}
            feed["mask"] = values[mask].astype(np.int32)
        first = dense(net, x, 7, C)
        return net.done((dense(net, build(net, first), C, 3), 3)), feed

    return make


def dense(net: Net, x: str, inputs: int, out: int) -> str:
    return str(net.op("Add", net.op("MatMul", x, net.weight(inputs, out)), net.bias(out)))


def conv(activation: str, parameters: list[float] | None = None, summed: bool = False, bias: bool = True, **values: Any) -> Any:
    def build(net: Fused, x: str) -> str:
        given = {"activation": activation, **({"activation_params": parameters} if parameters else {}), **values}
        inputs = [x, net.weight(6, 6 // values.get("group", 1), 3, 3), net.bias(6) if bias else "", *([x] if summed else [])]
        return str(net.ms("FusedConv", *inputs, pads=[1] * 4, **given))

    return build


def gemm(net: Fused, x: str) -> str:
    y = net.op("Reshape", x, net.ints(-1, C))
    y = net.ms("FusedGemm", y, net.weight(C, C), net.bias(C), transB=1, alpha=0.5, activation="LeakyRelu", activation_alpha=0.1)
    return str(net.op("Reshape", y, net.ints(-1, T, C)))


def scaled_product(net: Fused, x: str) -> str:
    return str(net.ms("FusedMatMul", x, net.weight(C, C), alpha=0.3, transB=1))


def product_of_two(flip: int) -> Any:
    def build(net: Fused, x: str) -> str:
        y = net.op("Transpose", x, perm=[0, 2, 1]) if flip else x
        square = net.ms("FusedMatMul", y, x, alpha=0.2, transA=1 - flip)
        return str(net.op("MatMul", x, square))

    return build


def batch_in_rows(net: Fused, x: str) -> str:
    """[T, N, C] of which the batch is brought to the front."""
    turned = net.op("Transpose", x, perm=[1, 0, 2])
    square = net.ms("FusedMatMul", turned, turned, transBatchA=1, transBatchB=1, transB=1, alpha=0.1)
    return str(net.op("MatMul", square, x))


def element(operator: str, bias: bool, **values: Any) -> Any:
    return lambda net, x: str(net.ms(operator, x, *([net.bias(C)] if bias else []), **values))


def skipped(simple: bool = False, bias: bool = False, total: bool = False) -> Any:
    """A residual branch, then the sum and the norm in one node; `total`: the sum goes on too."""

    def build(net: Fused, x: str) -> str:
        y = net.op("MatMul", net.op("Relu", dense(net, x, C, 8)), net.weight(8, C))
        extra = [net.bias(C)] if bias else []
        scales = [net.vector()] if simple else [net.vector(), net.bias(C)]
        name = "SkipSimplifiedLayerNormalization" if simple else "SkipLayerNormalization"
        found = net.ms(name, y, x, *scales, *extra, outputs=4 if total else 1, epsilon=1e-5)
        if not total:
            return str(found)
        net.nodes[-1].output[1] = net.nodes[-1].output[2] = ""
        return str(net.op("Add", dense(net, found[0], C, C), found[3]))

    return build


def embedded(kinds: bool = True, mask: bool = False, places: bool = False, total: bool = False) -> Case:
    def make() -> tuple[onnx.ModelProto, Feed]:
        net = Fused(seed=3)
        feed: Feed = {"ids": net.rng.integers(0, 20, (6, T)).astype(np.int32)}
        net.inputs.append(("ids", ("N", T), TensorProto.INT32))
        given = {"kinds": kinds, "mask": mask, "places": places}
        limits = {"kinds": 2, "mask": 2, "places": 9}
        for name in [name for name, wanted in given.items() if wanted]:
            net.inputs.append((name, ("N", T), TensorProto.INT32))
            feed[name] = net.rng.integers(0, limits[name], (6, T)).astype(np.int32)
        if mask:
            feed["mask"][:, 0] = 1
        tables = [net.weight(20, C, prefix="table"), net.weight(9, C, prefix="table"), net.weight(2, C, prefix="table") if kinds else ""]
        inputs = ["ids", "kinds" if kinds else "", *tables, net.vector(), net.bias(C), "mask" if mask else "", "places" if places else ""]
        while not inputs[-1]:
            inputs.pop()
        found = net.ms("EmbedLayerNormalization", *inputs, outputs=3 if total else 2, epsilon=1e-6)
        x = found[0]
        if mask:
            x = net.ms("Attention", x, net.weight(C, 3 * C), net.bias(3 * C), found[1], num_heads=HEADS)
        if total:
            x = net.op("Add", x, found[2])
        return net.done((dense(net, x, C, 3), 3)), feed

    return make


def attention(mask: str = "", bias: bool = True, sizes: bool = False, added: bool = False, past: bool = False, **values: Any) -> Any:
    def build(net: Fused, x: str) -> str:
        inner = [C, C, 6] if sizes else [C] * 3
        inputs = [x, net.weight(C, sum(inner)), net.bias(sum(inner)) if bias else "", "mask" if mask else ""]
        if past:
            batch = net.op("Gather", net.op("Shape", x), net.ints(0))
            target = net.op("Concat", net.ints(2), batch, net.ints(HEADS, 2, C // HEADS), axis=0)
            inputs.append(net.op("Expand", net.weight(2, 1, HEADS, 2, C // HEADS), target))
        if added:
            inputs += ["", net.weight(1, HEADS, T, T)]
        while not inputs[-1]:
            inputs.pop()
        given = {"num_heads": HEADS, **({"qkv_hidden_sizes": inner} if sizes else {}), **values}
        y = net.ms("Attention", *inputs, outputs=2 if past else 1, **given)
        y = y[0] if past else y
        return dense(net, y, inner[2], C) if sizes else str(y)

    return build


def many_heads(mask: str = "", bias: bool = True, **values: Any) -> Any:
    def build(net: Fused, x: str) -> str:
        parts = [net.op("MatMul", x, net.weight(C, C)) for _ in range(3)]
        inputs = [*parts, net.bias(3 * C) if bias else "", "mask" if mask else ""]
        while not inputs[-1]:
            inputs.pop()
        return str(net.ms("MultiHeadAttention", *inputs, num_heads=HEADS, **values))

    return build


def with_past(net: Fused, x: str, heads: int, size: int) -> list[str]:
    """Keys and values of two tokens before, the same for every sample."""
    batch = net.op("Gather", net.op("Shape", x), net.ints(0))
    target = net.op("Concat", batch, net.ints(heads, 2, size), axis=0)
    return [net.op("Expand", net.weight(1, heads, 2, size), target) for _ in "kv"]


def heads_with_past(bias: bool = True, past: bool = True, **values: Any) -> Any:
    def build(net: Fused, x: str) -> str:
        parts = [net.op("MatMul", x, net.weight(C, C)) for _ in range(3)]
        inputs = [*parts, net.bias(3 * C) if bias else "", "", "", *(with_past(net, x, HEADS, C // HEADS) if past else [])]
        while not inputs[-1]:
            inputs.pop()
        y = net.ms("MultiHeadAttention", *inputs, outputs=3, num_heads=HEADS, **values)
        total = net.op("Add", net.op("ReduceMean", y[1], axes=[2, 3], keepdims=0), net.op("ReduceMean", y[2], axes=[2, 3], keepdims=0))
        return str(net.op("Add", dense(net, y[0], C, C), net.op("Unsqueeze", dense(net, total, HEADS, C), net.ints(1))))

    return build


def grouped(
    heads: int = 4, groups: int = 2, size: int = 8, rotary: bool = False, present: bool = False, packed: bool = False, column: bool = False,
    **values: Any,
) -> Any:  # fmt: skip
    """Prompts: what came before is empty. packed: queries, keys and values side by side. column: lengths [batch, 1]."""

    def build(net: Fused, x: str) -> str:
        if packed:
            parts = [net.op("MatMul", x, net.weight(C, (heads + 2 * groups) * size)), "", ""]
        else:
            parts = [net.op("MatMul", x, net.weight(C, count * size)) for count in (heads, groups, groups)]
        batch = net.op("Gather", net.op("Shape", x), net.ints(0))
        batch = net.op("Concat", batch, net.ints(1), axis=0) if column else batch
        last = net.constant(np.array([T - 1], np.int32), "last")
        inputs = [*parts, "", "", net.op("Expand", last, batch), net.constant(np.array(T, np.int32), "total")]
        if rotary:
            angle = np.arange(16)[:, None] * net.rng.uniform(0.1, 1, size // 2)
            inputs += [net.constant(turn(angle).astype(np.float32), "turn") for turn in (np.cos, np.sin)]
            values["do_rotary"] = 1
        y = net.ms("GroupQueryAttention", *inputs, outputs=3, num_heads=heads, kv_num_heads=groups, **values)
        out = dense(net, y[0], heads * size, C)
        if present:
            total = net.op("Add", net.op("ReduceMean", y[1], axes=[2, 3], keepdims=0), net.op("ReduceMean", y[2], axes=[2, 3], keepdims=0))
            out = net.op("Add", out, net.op("Unsqueeze", dense(net, total, groups, C), net.ints(1)))
        return str(out)

    return build


def standard(
    heads: int = HEADS, groups: int = HEADS, four: bool = False, mask: str = "", past: bool = False, turned: str = "", wide: int = 4,
    packed: bool = False, filled: bool = False, **values: Any,
) -> Any:  # fmt: skip
    """ONNX's own Attention of heads of 4 numbers, values of `wide`. four: on [batch, heads, tokens, size]. mask: "pairs" or "heads".

    turned: how RotaryEmbedding turns queries and keys before ("halves", "pairs", "part", "given": angles of each place as they are).
    """

    def build(net: Fused, x: str) -> str:
        counts, sizes = (heads, groups, groups), (4, 4, wide)
        widths = [count * size for count, size in zip(counts, sizes, strict=True)]
        if packed:
            parts = net.op("Split", dense(net, x, C, sum(widths)), net.ints(*widths), axis=-1, outputs=3)
        else:
            parts = [dense(net, x, C, width) for width in widths]
        if four:
            apart = [net.op("Reshape", part, net.ints(0, 0, count, -1)) for part, count in zip(parts, counts, strict=True)]
            parts = [net.op("Transpose", part, perm=[0, 2, 1, 3]) for part in apart]
        batch = net.op("Shape", x, start=0, end=1)
        if turned:
            pairs = 1 if turned == "part" else 2
            angles = net.rng.uniform(0, 3, (T, pairs))
            given = [net.constant(turn(angles).astype(np.float32), "turn") for turn in (np.cos, np.sin)]
            each = net.op("Concat", batch, net.ints(T), axis=0)
            if turned == "given":
                each = net.op("Concat", batch, net.ints(T, pairs), axis=0)
                given = [net.op("Expand", item, each) for item in given]
            else:
                given.append(net.op("Expand", net.constant(np.arange(T)[::-1].copy()), each))
            how: dict[str, Any] = {"interleaved": int(turned == "pairs"), **({"rotary_embedding_dim": 2} if turned == "part" else {})}
            parts = [
                net.op("RotaryEmbedding", part, *given, **how, **({} if four and turned == "given" else {"num_heads": count}))
                for part, count in zip(parts[:2], counts[:2], strict=True)
            ] + list(parts[2:])
        last = ""
        if mask == "pairs":
            last = net.op("Unsqueeze", net.op("Cast", "mask", to=TensorProto.BOOL), net.ints(1))
        elif mask:
            last = net.weight(1, heads, T, T)
        inputs = [*parts, last, *(with_past(net, x, groups, 4) if past else ["", ""])]
        inputs.append(net.op("Expand", net.constant(np.array([T - 1])), batch) if filled else "")
        while not inputs[-1]:
            inputs.pop()
        given_heads = {} if four else {"q_num_heads": heads, "kv_num_heads": groups}
        y = net.op("Attention", *inputs, outputs=3 if past else 1, **given_heads, **values)
        context = y[0] if past else y
        if four:
            context = net.op("Reshape", net.op("Transpose", context, perm=[0, 2, 1, 3]), net.ints(0, 0, -1))
        out = dense(net, context, heads * wide, C)
        if past:
            total = net.op("Add", *(net.op("ReduceMean", item, net.ints(2, 3), keepdims=0) for item in y[1:]))
            out = net.op("Add", out, net.op("Unsqueeze", dense(net, total, groups, C), net.ints(1)))
        return str(out)

    return build


def joined_heads(net: Fused, x: str) -> str:
    """Attention as PyTorch's exporter writes nn.MultiheadAttention: one projection for all three, heads that join the batch."""
    parts = dense(net, net.op("Transpose", x, perm=[1, 0, 2]), C, 3 * C)
    parts = net.op("Unsqueeze", net.op("Reshape", parts, net.ints(T, -1, 3, C)), net.ints(0))
    parts = net.op("Squeeze", net.op("Transpose", parts, perm=[3, 1, 2, 0, 4]), net.ints(3))
    heads = []
    for number in range(3):
        part = net.op("Reshape", net.op("Gather", parts, net.constant(np.array(number)), axis=0), net.ints(T, -1, 4))
        heads.append(net.op("Reshape", net.op("Transpose", part, perm=[1, 0, 2]), net.ints(-1, HEADS, T, 4)))
    y = net.op("Attention", *heads, q_num_heads=0, kv_num_heads=0)
    y = dense(net, net.op("Reshape", net.op("Transpose", y, perm=[2, 0, 1, 3]), net.ints(-1, C)), C, C)
    return str(net.op("Transpose", net.op("Reshape", y, net.ints(T, -1, C)), perm=[1, 0, 2]))


def projected(equation: str, *shape: int, first: bool = False) -> Callable[[Fused, str], str]:
    """An Einsum with a stored operand of that shape, and one back to C channels: heads of Keras's attention."""

    def build(net: Fused, x: str) -> str:
        weight = net.weight(*shape)
        y = net.op("Einsum", *((weight, x) if first else (x, weight)), equation=equation)
        rank = equation.split("->")[1].replace(" ", "")
        back = net.weight(3, 4, C) if len(rank) > 3 else net.weight(8, C)
        return net.op("Einsum", net.op("Relu", y), back, equation="abde,dec->abc" if len(rank) > 3 else "abd,dc->abc")

    return build


def keras_attention(net: Fused, x: str) -> str:
    """Queries, keys and values of 3 heads of 4, products of activations, and the way back: Einsums all of them, biases of two axes."""
    q, k, v = (net.op("Add", net.op("Einsum", x, net.weight(C, HEADS, 4), equation="abc,cde->abde"), net.bias(HEADS, 4)) for _ in range(3))
    scores = net.op("Softmax", net.op("Einsum", k, q, equation="aecd,abcd->acbe"), axis=-1)
    mixed = net.op("Einsum", scores, v, equation="acbe,aecd->abcd")
    return net.op("Add", net.op("Einsum", mixed, net.weight(HEADS, 4, C), equation="abcd,cde->abe"), net.bias(C))


def stacked(*lead: int) -> Callable[[Fused, str], str]:
    """A weight for each of three groups, with `lead` axes in front of it, and for each one back; the mean over groups."""

    def build(net: Fused, x: str) -> str:
        axis = len(lead) - 1 - lead[::-1].index(3)
        h = net.op("Relu", net.op("Add", net.op("MatMul", x, net.weight(*lead, C, 8)), net.bias(3, *[1] * (len(lead) - axis), 8)))
        return str(net.op("ReduceMean", net.op("MatMul", h, net.weight(*lead, 8, C)), axes=list(range(len(lead) - 1)), keepdims=0))

    return build


def experts(net: Fused, x: str) -> str:
    """Every token to all of three experts, weighed by a router."""
    part = net.op("Unsqueeze", net.op("Softmax", net.op("MatMul", x, net.weight(C, 3)), axis=-1), net.ints(-1))
    h = net.op("MatMul", net.op("Unsqueeze", x, net.ints(1)), net.weight(3, C, 8))
    h = net.op("Mul", h, net.op("Sigmoid", h))
    y = net.op("Mul", net.op("MatMul", h, net.weight(3, 8, C)), net.op("Transpose", part, perm=[0, 2, 1, 3]))
    return str(net.op("ReduceSum", y, net.ints(1), keepdims=0))


def grouped_product(equation: str, *shape: int, turned: bool = False) -> Callable[[Fused, str], str]:
    """An Einsum with a weight for each of three heads of 4."""

    def build(net: Fused, x: str) -> str:
        heads = net.op("Reshape", x, net.ints(0, 0, HEADS, 4))
        heads = net.op("Transpose", heads, perm=[0, 2, 1, 3]) if turned else heads
        y = net.op("Relu", net.op("Einsum", heads, net.weight(*shape), equation=equation))
        y = net.op("Transpose", y, perm=[0, 2, 1, 3]) if turned else y
        return dense(net, net.op("Reshape", y, net.ints(0, 0, -1)), 15, C)

    return build


CASES: Mapping[str, Case] = {
    "stack": tokens(stacked(3, 1)),
    "stack, opset 11": tokens(stacked(3, 1), 11),
    "stack, one in front": tokens(stacked(1, 3, 1)),
    "stack, experts": tokens(experts),
    "einsum, groups": tokens(grouped_product("abhc,hcd->abhd", HEADS, 4, 5)),
    "einsum, groups, turned": tokens(grouped_product("ahbc,cdh->ahbd", 4, 5, HEADS, turned=True)),
    "einsum": tokens(projected("abc,cd->abd", C, 8)),
    "einsum, turned": tokens(projected("a b c, d c -> abd", 8, C)),
    "einsum, weight first": tokens(projected("cd,abc->abd", C, 8, first=True)),
    "einsum, heads": tokens(projected("abc,cde->abde", C, 3, 4)),
    "einsum, keras": tokens(keras_attention),
    "heads, past": tokens(heads_with_past()),
    "heads, past, no bias": tokens(heads_with_past(bias=False)),
    "heads, handed on": tokens(heads_with_past(past=False)),
    "groups": tokens(grouped()),
    "groups, one": tokens(grouped(groups=1)),
    "groups, all": tokens(grouped(groups=4)),
    "groups, handed on": tokens(grouped(present=True)),
    "groups, packed": tokens(grouped(packed=True)),
    "groups, lengths in a column": tokens(grouped(column=True)),
    "groups, rotary": tokens(grouped(heads=6, size=16, rotary=True)),
    "groups, softcap": tokens(grouped(softcap=1.5)),
    "groups, window": tokens(grouped(local_window_size=2)),
    "groups, rotary in pairs": tokens(grouped(size=16, rotary=True, rotary_interleaved=1)),
    "standard": tokens(standard(), 23),
    "standard, opset 24": tokens(standard(wide=3), 24),
    "standard, groups": tokens(standard(4, 2), 23),
    "standard, one group": tokens(standard(3, 1, mask="heads"), 23),
    "standard, packed": tokens(standard(packed=True), 23),
    "standard, causal": tokens(standard(is_causal=1, scale=0.3, softcap=1.5), 23),
    "standard, pairs": tokens(standard(mask="pairs"), 23, mask="pairs"),
    "standard, added": tokens(standard(mask="heads", is_causal=1), 23),
    "standard, filled": tokens(standard(4, 2, filled=True), 24),
    "standard, past": tokens(standard(4, 2, past=True, is_causal=1), 23),
    "joined heads": tokens(joined_heads, 23),
    "standard, four axes": tokens(standard(four=True), 23),
    "standard, four axes, groups": tokens(standard(4, 2, four=True, wide=3), 24),
    "standard, four axes, past": tokens(standard(past=True, four=True, is_causal=1), 23),
    **{f"rotary, {turned}": tokens(standard(4, 2, turned=turned), 23) for turned in ("halves", "pairs", "part")},
    **{f"rotary, {turned}, four axes": tokens(standard(turned=turned, four=True), 23) for turned in ("pairs", "part", "given")},
    "conv relu": image(conv("Relu")),
    "conv relu, no bias": image(conv("Relu", bias=False)),
    "conv leaky": image(conv("LeakyRelu", [0.1])),
    "conv clip": image(conv("Clip", [0.0, 6.0])),
    "conv clip, opset 9": image(conv("Clip", [0.0, 6.0]), opset=9),
    "conv hard sigmoid": image(conv("HardSigmoid", [0.2, 0.5])),
    "conv sum": image(conv("Relu", summed=True)),
    "conv sum, no bias": image(conv("Relu", summed=True, bias=False)),
    "conv depthwise": image(conv("Relu", group=6)),
    "gemm": tokens(gemm),
    "scaled product": tokens(scaled_product),
    "product of two": tokens(product_of_two(0)),
    "product of two, turned": tokens(product_of_two(1)),
    "batch in rows": tokens(batch_in_rows),
    "gelu": tokens(element("Gelu", False)),
    "fast gelu": tokens(element("FastGelu", False)),
    "fast gelu, bias": tokens(element("FastGelu", True)),
    "bias gelu": tokens(element("BiasGelu", True)),
    "quick gelu": tokens(element("QuickGelu", False, alpha=1.5)),
    **{f"skip, opset {opset}": tokens(skipped(), opset) for opset in (11, 13, 17, 18)},
    "skip, bias": tokens(skipped(bias=True)),
    "skip, bias, opset 13": tokens(skipped(bias=True), 13),
    "skip, total": tokens(skipped(total=True, bias=True)),
    "skip simple": tokens(skipped(simple=True)),
    "skip simple, bias, opset 13": tokens(skipped(simple=True, bias=True), 13),
    "embed": embedded(),
    "embed, no kinds": embedded(kinds=False),
    "embed, mask": embedded(mask=True),
    "embed, places, total": embedded(places=True, total=True),
    "attention": tokens(attention()),
    "attention, opset 11": tokens(attention(), 11),
    "attention, keys": tokens(attention("keys"), mask="keys"),
    "attention, keys, opset 12": tokens(attention("keys"), 12, mask="keys"),
    "attention, lengths": tokens(attention("lengths"), mask="lengths"),
    "attention, pairs": tokens(attention("pairs", mask_filter_value=-3.0), mask="pairs"),
    "attention, sizes": tokens(attention(sizes=True)),
    "attention, added": tokens(attention(added=True)),
    "attention, causal": tokens(attention("keys", unidirectional=1), mask="keys"),
    "attention, scale": tokens(attention(scale=0.3)),
    "attention, past": tokens(attention(past=True, unidirectional=1)),
    "heads": tokens(many_heads()),
    "heads, no bias": tokens(many_heads(bias=False)),
    "heads, keys": tokens(many_heads("keys"), mask="keys"),
    "heads, causal": tokens(many_heads(unidirectional=1, scale=0.4)),
}
