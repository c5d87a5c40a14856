"""Packing: exact in onnxruntime, exactly undone, never larger than dense, close to the entropy bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import relief_onnx.pack as pack_module
from relief_onnx.codecs import CODECS, Codec
from relief_onnx.errors import ModelError
from relief_onnx.pack import PackedTensor, entropy_bound, pack, packed_names, unpack

# the IR version that came with each opset
IR = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9}
IR |= {21: 10, 22: 10, 23: 11, 24: 12, 25: 13, 26: 13}
BITS: dict[int, str] = {
    TensorProto.FLOAT: "u4",
    TensorProto.DOUBLE: "u8",
    TensorProto.FLOAT16: "u2",
    TensorProto.BFLOAT16: "u2",
    TensorProto.INT8: "u1",
}
FLOATS: dict[int, str] = {TensorProto.FLOAT: "f4", TensorProto.DOUBLE: "f8", TensorProto.FLOAT16: "f2"}
OFF, BASIC, ALL = (getattr(ort.GraphOptimizationLevel, f"ORT_{k}") for k in ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_ALL"))


def sparse(shape: tuple[int, ...], share: float, unit: int = 1, data_type: int = TensorProto.FLOAT, seed: int = 0) -> Any:
    """Random bit patterns, of which `share` of the blocks is kept; not one element of a kept block is zero."""
    rng = np.random.default_rng(seed)
    size = math.prod(shape)
    ones = {1: 1, 2: 0x3C00, 4: 0x3F800000, 8: 0x3FF0000000000000}[np.dtype(BITS[data_type]).itemsize]
    bits = (rng.integers(0, 1 << 7, size) + ones).astype(BITS[data_type])
    return np.where(np.repeat(rng.random(size // unit) < share, unit), bits, 0).astype(bits.dtype).reshape(shape)


def tensor(bits: Any, data_type: int = TensorProto.FLOAT, name: str = "W") -> TensorProto:
    return TensorProto(name=name, data_type=data_type, dims=bits.shape, raw_data=bits.tobytes())


def model_of(*tensors: TensorProto, opset: int = 17) -> onnx.ModelProto:
    """y_k = W_k reshaped to the shape of x, which onnxruntime cannot fold away."""
    nodes = [helper.make_node("Shape", ["x"], ["s"])]
    nodes += [helper.make_node("Reshape", [t.name, "s"], [f"y{k}"]) for k, t in enumerate(tensors)]
    outputs = [helper.make_tensor_value_info(f"y{k}", t.data_type, ["n"]) for k, t in enumerate(tensors)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])]
    if IR[opset] < 4:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR[opset])


def named(**shares: float) -> list[TensorProto]:
    """One tensor of 70 x 70 per name, of the given share."""
    return [tensor(sparse((70, 70), s, seed=k), name=n) for k, (n, s) in enumerate(shares.items())]


def only(monkeypatch: pytest.MonkeyPatch, *codecs: Codec) -> None:
    monkeypatch.setattr(pack_module, "CODECS", codecs)


def session(model: onnx.ModelProto, level: Any, save: Path | None = None) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if save:
        options.optimized_model_filepath = str(save)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, size: int, level: Any) -> Any:
    return session(model, level).run(None, {"x": np.zeros(size, np.float32)})


def folded(model: onnx.ModelProto, path: Path, level: Any = BASIC) -> onnx.ModelProto:
    session(model, level, path)
    return onnx.load(path)


def assert_rebuilt(model: onnx.ModelProto, bits: Any, path: Path) -> None:
    """The checker accepts it; onnxruntime folds it to the same bytes; so are the outputs without folding."""
    onnx.checker.check_model(model, full_check=True)
    optimized = folded(model, path)
    assert [n.op_type for n in optimized.graph.node] == ["Shape", "Reshape"]
    (dense,) = optimized.graph.initializer
    assert list(dense.dims) == list(bits.shape)
    assert numpy_helper.to_array(dense).tobytes() == bits.tobytes()
    (output,) = model.graph.output
    if output.type.tensor_type.elem_type != TensorProto.BFLOAT16:  # numpy has none
        for level in (OFF, ALL):
            assert run(model, bits.size, level)[0].tobytes() == bits.tobytes()


def storages(rows: Sequence[PackedTensor]) -> list[str]:
    return [row.storage for row in rows]


# ---- every opset, codec and type


@pytest.mark.parametrize("unit", [1, 9])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
@pytest.mark.parametrize("opset", IR)
def test_every_opset(opset: int, codec: Codec, unit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, codec)
    bits = sparse((31, 10, 3, 3), 0.1, unit)  # no multiple of 8 elements
    model = model_of(tensor(bits), opset=opset)
    packed, (row,) = pack(model, ["W"])
    if opset < codec.first:
        assert row.storage == "dense"
        assert packed == model
        return
    assert row.storage == ("kernel-" if unit > 1 else "") + codec.name
    assert packed.opset_import == model.opset_import
    assert_rebuilt(packed, bits, tmp_path / "m.onnx")
    assert unpack(packed) == model


@pytest.mark.parametrize("data_type", BITS, ids=TensorProto.DataType.Name)
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
@pytest.mark.parametrize("opset", [7, 10, 13, 20, 26])
def test_every_type(data_type: int, codec: Codec, opset: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, codec)
    bits = sparse((100, 50), 0.1, data_type=data_type)
    model = model_of(tensor(bits, data_type), opset=opset)
    packed, (row,) = pack(model, {"W": 1})
    if opset < codec.first or (data_type == TensorProto.BFLOAT16 and opset < 13):
        assert (row.storage, packed) == ("dense", model)
        return
    assert row.storage == codec.name
    assert_rebuilt(packed, bits, tmp_path / "m.onnx")
    assert unpack(packed) == model


@settings(max_examples=120, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    share=st.sampled_from([0.0, 0.003, 0.05, 0.3, 0.9, 1.0]),
    data_type=st.sampled_from(list(FLOATS)),
    opset=st.sampled_from([7, 9, 10, 11, 13, 18, 26]),
    codec=st.sampled_from(CODECS),
    whole=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_tensor_is_rebuilt_exactly(
    shape: list[int], share: float, data_type: int, opset: int, codec: Codec, whole: bool, seed: int
) -> None:
    unit = math.prod(shape[2:]) if whole else 1
    bits = sparse(tuple(shape), share, unit, data_type, seed)
    model = model_of(tensor(bits, data_type), opset=opset)
    with pytest.MonkeyPatch.context() as patch:
        only(patch, codec)
        patch.setattr(pack_module, "_wire", lambda message: -1)  # any packed form is smaller than dense
        packed, (row,) = pack(model, {"W": unit})
    if row.storage == "dense":  # too few zeros for the fillers of whole words
        assert packed == model
        assert opset < codec.first or (codec.name == "gaps" and np.count_nonzero(bits == 0) < 63 * unit)
        return
    for level in (OFF, BASIC):
        assert run(packed, bits.size, level)[0].tobytes() == bits.tobytes()
    assert unpack(packed) == model


# ---- size


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize(("shape", "unit"), [((512, 512), 1), ((300, 784), 1), ((256, 128, 3, 3), 9), ((256, 128, 3, 3), 1)])
@pytest.mark.parametrize(("opset", "limit"), [(17, 1.06), (10, 1.11)])
def test_close_to_the_entropy_bound(shape: tuple[int, ...], unit: int, share: float, opset: int, limit: float) -> None:
    bits = sparse(shape, share, unit)
    kept = int(np.count_nonzero(bits))
    model = model_of(tensor(bits), opset=opset)
    packed, (row,) = pack(model, ["W"])
    assert row.storage.startswith("kernel-") == (unit > 1)
    bound = entropy_bound(kept // unit, bits.size // unit, 32 * unit)
    assert row.entropy_bytes == pytest.approx(min(bound, entropy_bound(kept, bits.size, 32)))
    assert bound <= row.packed_bytes <= limit * bound
    saved = len(model.SerializeToString()) - len(packed.SerializeToString())
    assert saved == pytest.approx(row.dense_bytes - row.packed_bytes, abs=16)


def test_entropy_bound_is_that_of_a_fair_coin() -> None:
    assert entropy_bound(50, 100, 32) == pytest.approx((50 * 32 + 100) / 8)
    assert entropy_bound(0, 100, 32) == entropy_bound(0, 0, 32) == 0


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.3, 0.6, 0.97])
@pytest.mark.parametrize("opset", [8, 10, 11, 19])
def test_the_smallest_form_is_chosen(share: float, opset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = sparse((40, 30, 3, 3), share, 9)
    model = model_of(tensor(bits), opset=opset)
    _, (chosen,) = pack(model, ["W"])
    sizes = {"dense": chosen.dense_bytes}
    for codec in CODECS:
        for unit in (1, 9):
            only(monkeypatch, codec)
            _, (row,) = pack(model, {"W": unit})
            sizes[row.storage] = row.packed_bytes
    assert chosen.packed_bytes == min(sizes.values()) == sizes[chosen.storage]


def test_a_share_that_does_not_pay_stays_dense() -> None:
    model = model_of(tensor(sparse((100, 100), 0.99)), tensor(sparse((7, 8), 0.1), name="V"))
    packed, rows = pack(model, ["W", "V"])
    assert storages(rows) == ["dense", "dense"]
    assert all("the smallest packed form" in row.reason and row.packed_bytes == row.dense_bytes for row in rows)
    assert packed == model


# ---- values


def test_odd_values_survive() -> None:
    values = sparse((64, 32, 3, 3), 0.1, 9)
    odd = [0x80000000, 0, 0x7FC00001, 0xFF800000, 1, 0x80000001]  # -0, 0, NaN with payload, -inf, subnormals
    kernel = np.flatnonzero(values.reshape(-1, 9)[:, 0])[0]
    dropped = np.flatnonzero(values.reshape(-1, 9)[:, 0] == 0)[0]
    values.reshape(-1, 9)[kernel, : len(odd)] = odd
    model = model_of(tensor(values))
    values.reshape(-1, 9)[dropped] = 0x80000000  # a block of -0.0 is dropped
    packed, (row,) = pack(model_of(tensor(values)), ["W"])
    assert row.storage.startswith("kernel-")
    assert unpack(packed) == model
    assert run(packed, values.size, BASIC)[0].tobytes() == model.graph.initializer[0].raw_data


@pytest.mark.parametrize("data_type", FLOATS, ids=TensorProto.DataType.Name)
def test_typed_fields_pack_like_raw_data(data_type: int) -> None:
    bits = sparse((50, 60), 0.1, data_type=data_type)
    raw = model_of(tensor(bits, data_type))
    values = bits.view(FLOATS[data_type])
    typed = model_of(helper.make_tensor("W", data_type, values.shape, values.ravel().tolist()))
    assert not typed.graph.initializer[0].HasField("raw_data")
    assert pack(typed, ["W"])[0] == pack(raw, ["W"])[0]
    assert unpack(pack(typed, ["W"])[0]) == raw


# ---- the rest of the model


def full_model() -> onnx.ModelProto:
    """Four tensors, of which B and D are sparse, with everything else that a model may carry."""
    model = model_of(*named(A=1, B=0.1, C=1, D=0.2))
    model.graph.initializer[1].doc_string = "kept"
    model.graph.value_info.extend([helper.make_tensor_value_info("B", TensorProto.FLOAT, [70, 70])])
    helper.set_model_props(model, {"author": "someone"})
    model.opset_import.append(helper.make_opsetid("local", 1))
    body = [helper.make_node("Relu", ["a"], ["b"])]
    model.functions.append(helper.make_function("local", "Twin", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    return model


def test_everything_else_survives() -> None:
    model = full_model()
    before = model.SerializeToString()
    packed, rows = pack(model, ["D", "B", "A"])
    assert [row.name for row in rows] == ["D", "B", "A"]
    assert [storage == "dense" for storage in storages(rows)] == [False, False, True]
    assert model.SerializeToString() == before
    assert packed_names(packed) == ("D", "B")
    onnx.checker.check_model(packed, full_check=True)
    assert unpack(packed) == model
    for field in ("metadata_props", "functions", "opset_import", "ir_version", "producer_name"):
        assert getattr(packed, field) == getattr(model, field)
    assert packed.graph.value_info == model.graph.value_info
    assert packed.graph.input == model.graph.input
    assert list(packed.graph.node)[-len(model.graph.node) :] == list(model.graph.node)


def test_laws_of_repetition() -> None:
    model = full_model()
    packed, rows = pack(model, ["B", "D"])
    assert pack(model, ["B", "D"])[0].SerializeToString() == packed.SerializeToString()
    again, same_rows = pack(packed, ["B", "D"])
    assert (again, same_rows) == (packed, rows)
    assert unpack(model) == model
    assert packed_names(model) == ()
    in_two_steps, _ = pack(pack(model, ["B"])[0], ["D"])
    assert set(packed_names(in_two_steps)) == {"B", "D"}
    assert unpack(in_two_steps) == model


def test_names_that_are_taken() -> None:
    model = model_of(tensor(sparse((60, 60), 0.1)), tensor(sparse((60, 60), 0.2), name="p0/values"))
    packed, _ = pack(model, ["W", "p0/values"])
    onnx.checker.check_model(packed, full_check=True)
    names = [t.name for t in packed.graph.initializer] + [n for node in packed.graph.node for n in node.output]
    assert len(names) == len(set(names))
    assert "p0_/values" in names
    assert unpack(packed) == model


@pytest.mark.parametrize("opset", [7, 8])
def test_before_ir_4_no_initializer_stays_an_input(opset: int) -> None:
    """From IR 4 on an initializer among the inputs can be overridden, and onnxruntime fuses nothing that reads it."""
    model = model_of(*named(A=0.1, B=1, C=0.2), opset=opset)
    packed, _ = pack(model, ["A", "B", "C"])
    assert packed.ir_version == 4
    assert [v.name for v in packed.graph.input] == ["x"]
    onnx.checker.check_model(packed, full_check=True)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(run(model, 4900, ALL), run(packed, 4900, ALL), strict=True))
    assert unpack(packed) == model
    for order in ("AC", "CA", "ACA"):
        steps = model
        for name in order:
            steps, _ = pack(steps, [name])
        assert unpack(steps) == model


def test_a_subgraph_may_read_a_packed_weight(tmp_path: Path) -> None:
    bits = sparse((80, 80), 0.1)
    then, other = (
        helper.make_graph([helper.make_node(op, ["W"], [op])], op, [], [helper.make_tensor_value_info(op, 1, [80, 80])])
        for op in ("Neg", "Identity")
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other)],
        "g",
        [helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [80, 80])],
        [tensor(bits)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    packed, (row,) = pack(model, ["W"])
    assert row.storage != "dense"
    onnx.checker.check_model(packed, full_check=True)
    assert [n.op_type for n in folded(packed, tmp_path / "m.onnx").graph.node] == ["If"]
    for flag in (True, False):
        feed = {"flag": np.array(flag)}
        for level in (OFF, ALL):
            expected, found = (session(m, level).run(None, feed)[0] for m in (model, packed))
            assert expected.tobytes() == found.tobytes()
    assert unpack(packed) == model


# ---- refusals and errors


def as_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [80, 80]))


def as_external(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def as_int64(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((80, 80), np.int64), "W"))


def as_scalar(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array(0, np.float32), "W"))


def as_empty(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((0, 3), np.float32), "W"))


def as_opset_6(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 6


def as_huge(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 2**28


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (as_output, "output of the graph"),
        (as_external, "external data is not loaded"),
        (as_int64, "values of type INT64"),
        (as_scalar, "scalar"),
        (as_empty, "empty"),
        (as_huge, "above 1 GiB"),
        (as_opset_6, "opset 6 cannot rebuild it; opset 7 or newer can"),
    ],
)
def test_what_stays_dense_says_why(change: Any, reason: str) -> None:
    model = model_of(tensor(sparse((80, 80), 0.1)))
    change(model)
    packed, (row,) = pack(model, ["W"])
    assert row.storage == "dense"
    assert reason in row.reason
    assert packed == model


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["nope"], "Weight 'nope' is not an initializer"),
        ({"W": 7}, r"Unit length 7 does not divide weight 'W' of shape \[80, 80\]"),
        ({"W": 0}, "Unit length 0"),
    ],
)
def test_wrong_requests(weights: Sequence[str] | Mapping[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        pack(model_of(tensor(sparse((80, 80), 0.1))), weights)


def test_a_shape_that_does_not_fit_the_data() -> None:
    damaged = model_of(tensor(sparse((80, 80), 0.1)))
    damaged.graph.initializer[0].dims[0] = 81
    with pytest.raises(ModelError, match=r"holds 6400 elements but its shape is \[81, 80\]"):
        pack(damaged, ["W"])


@pytest.mark.parametrize("damage", ["values", "gaps", "shape", "notes", "codec"])
def test_damaged_packing_is_one_clear_error(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, *(c for c in CODECS if c.name == "gaps8"))
    packed, _ = pack(model_of(tensor(sparse((80, 80), 0.1))), ["W"])
    last = next(n for n in packed.graph.node if n.output[0] == "W")
    if damage == "notes":
        last.doc_string = last.doc_string[:-1]
    elif damage == "codec":
        last.doc_string = last.doc_string.replace("gaps8", "none")
    else:
        kept = [t for t in packed.graph.initializer if t.name != f"p0/{damage}"]
        del packed.graph.initializer[:]
        packed.graph.initializer.extend(kept)
    with pytest.raises(ModelError, match="restore the file from its origin"):
        unpack(packed)
