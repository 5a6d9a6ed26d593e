"""Bad calls of the fused decoder layer: refused in one line before native code sees them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoder_layer_twin import SMALL, needs, packed, random_parts
from torch import Tensor

from dtm_fast.ops.decoder_layer import States, decoder_layer
from dtm_fast.ops.layer_weights import Arithmetic, PackedMatrix, Projection, Start

FLOAT32, CHANGE, BFLOAT16, FINE_CHANGE = Arithmetic

changes = pytest.mark.parametrize("change", [CHANGE, FINE_CHANGE], ids=lambda each: each.name.lower())


class Call:
    """A good call of a small layer, two sequences of five positions from the third on, to be spoiled."""

    def __init__(self, arithmetic: Arithmetic = FLOAT32) -> None:
        needs(FLOAT32, arithmetic)
        parts = random_parts(SMALL, positions=9, fused=False, bias=True, norms=True)
        self.layer = packed(parts, arithmetic)
        self.x: Tensor | None = torch.randn(2, 5, SMALL.hidden)
        self.out = torch.empty(2, 5, SMALL.hidden)
        self.kv = torch.zeros(3, 9, 2 * SMALL.kv_heads * SMALL.head_dim)
        self.base = States(**{name: torch.randn(4, 9, width) for name, width in SMALL.widths.items()})
        self.rest: dict[str, Any] = {"first": 2, "rows": [3, 0], "kv_rows": [2, 1], "lengths": [5, 4]}

    def __call__(self) -> None:
        decoder_layer(self.layer, self.x, self.out, self.kv, base=self.base, **self.rest)

    def projection(self, index: int, **changes: Any) -> None:
        """Changes one of the layer's projections."""
        changed = replace(self.layer.projections[index], **changes)
        self.layer = self.layer.with_projection(index, changed)

    def weight(self, index: int, **changes: Any) -> None:
        """Changes the weight of one of the layer's projections."""
        self.projection(index, weight=replace(self.layer.projections[index].weight, **changes))

    def shape(self, **changes: Any) -> None:
        """Changes the layer's shape alone."""
        self.layer = replace(self.layer, shape=replace(SMALL, **changes))


def apart(value: Tensor) -> Tensor:
    """The same values, neighbours in the last dimension no longer beside each other."""
    return value.mT.contiguous().mT


def put(name: str, value: Any) -> Callable[[Call], None]:
    """Puts a value, or what it makes of what is there, in place of an argument, or of a member of one."""

    def spoil(call: Call) -> None:
        owner, _, member = name.rpartition(".")
        if name in call.rest or name in ("first_output", "keep"):
            call.rest[name] = value
        elif owner:
            whole = getattr(call, owner)
            new = value(getattr(whole, member)) if callable(value) else value
            setattr(call, owner, replace(whole, **{member: new}))
        else:
            setattr(call, name, value(getattr(call, name)) if callable(value) else value)

    return spoil


BAD_CALLS: list[tuple[Callable[[Call], object], type[Exception], str]] = [
    # sizes
    (put("x", lambda x: x[:, :4]), ValueError, r"x: expected size 5 in dimension 1 \(T of out\)"),
    (put("x", lambda x: x[:1]), ValueError, r"x: expected size 2 in dimension 0 \(S of out\)"),
    (put("x", lambda x: x[..., :9]), ValueError, r"x: expected size 20 in dimension 2 \(hidden\)"),
    (put("x", lambda x: x[0]), ValueError, r"x: expected shape \[S, T, 20\], got \[5, 20\]"),
    (put("x", None), TypeError, r"x: expected a torch.Tensor, for the layer is in FLOAT32, got None"),
    (put("out", lambda out: out[..., :9]), ValueError, r"out: expected size 20 in dimension 2"),
    (put("kv", lambda kv: kv[:, :6]), ValueError, r"kv: expected at least 7 positions"),
    (put("kv", lambda kv: kv[..., :9]), ValueError, r"kv: expected size 12 in dimension 2"),
    (put("base.input", lambda x: x[:, :6]), ValueError, r"base.input: expected at least 7 positions"),
    (put("base.gate_up", lambda x: x[..., :9]), ValueError, r"base.gate_up: expected size 64 .*intermediate"),
    (put("layer.attention_norm", torch.ones(19)), ValueError, r"layer.attention_norm: expected size 20"),
    (put("layer.mlp_norm", torch.ones(1, 20)), ValueError, r"layer.mlp_norm: expected shape \[20\]"),
    (put("layer.q_norm", torch.ones(5)), ValueError, r"layer.q_norm: expected size 6"),
    (put("layer.k_norm", torch.ones(5)), ValueError, r"layer.k_norm: expected size 6"),
    (put("layer.cosine", lambda x: x[:6]), ValueError, r"layer.cosine: expected at least 7 positions"),
    (put("layer.sine", lambda x: x[:, :4]), ValueError, r"layer.sine: expected size 6 in dimension 1"),
    # dtypes, devices, strides
    (put("x", Tensor.double), TypeError, r"x: expected dtype torch.float32, got torch.float64"),
    (put("out", Tensor.bfloat16), TypeError, r"out: expected dtype torch.float32, got torch.bfloat16"),
    (put("kv", Tensor.half), TypeError, r"kv: expected dtype torch.float32, got torch.float16"),
    (put("kv", "kv"), TypeError, r"kv: expected a torch.Tensor, got str"),
    (put("base.qkv", Tensor.double), TypeError, r"base.qkv: expected dtype torch.float32"),
    (put("layer.mlp_norm", Tensor.double), TypeError, r"layer.mlp_norm: expected dtype torch.float32"),
    (put("layer.cosine", Tensor.double), TypeError, r"layer.cosine: expected dtype torch.float32"),
    (put("x", lambda x: x.to("meta")), ValueError, r"x: expected device cpu, got meta"),
    (put("out", lambda x: x.to("meta")), ValueError, r"out: expected device cpu, got meta"),
    (put("kv", lambda x: x.to("meta")), ValueError, r"kv: expected device cpu, got meta"),
    (put("base.mid", lambda x: x.to("meta")), ValueError, r"base.mid: expected device cpu, got meta"),
    (put("layer.sine", lambda x: x.to("meta")), ValueError, r"layer.sine: expected device cpu, got meta"),
    (put("x", apart), ValueError, r"x: expected each sequence to be contiguous, got strides"),
    (put("out", apart), ValueError, r"out: expected each sequence to be contiguous, got strides"),
    (put("kv", apart), ValueError, r"kv: expected each sequence to be contiguous, got strides"),
    (put("layer.cosine", apart), ValueError, r"layer.cosine: expected a contiguous tensor, got strides"),
    (put("x", torch._neg_view), TypeError, r"x: expected values as they lie in memory"),
    (put("x", Tensor.to_sparse), TypeError, r"x: expected a dense \(strided\) tensor"),
    (
        put("out", lambda x: x[:1].expand(2, 5, 20)),
        ValueError,
        r"out: expected sequences that do not overlap",
    ),
    # numbers
    (put("first", -1), ValueError, r"first: expected a number of at least 0, got -1"),
    (put("first", 5), ValueError, r"kv: expected at least 10 positions"),
    (put("first", 1.0), TypeError, r"first: expected a whole number, got 1.0"),
    (put("first_output", -3), ValueError, r"first_output: expected a number of at least 0, got -3"),
    (put("lengths", [5, 6]), ValueError, r"lengths: expected numbers from 0 to 5 \(T of out\), got 6"),
    (put("lengths", [-1, 5]), ValueError, r"lengths: expected numbers from 0 to 5 \(T of out\), got -1"),
    (put("lengths", [5]), ValueError, r"lengths: expected 2 numbers \(S of out\), got shape \[1\]"),
    (put("lengths", [5.0, 4.5]), TypeError, r"lengths: expected whole numbers, got float64"),
    (put("rows", [0, 4]), ValueError, r"rows: expected numbers from 0 to 3 \(sequences of base\), got 4"),
    (put("rows", [-1, 0]), ValueError, r"rows: expected numbers from 0 to 3 \(sequences of base\), got -1"),
    (put("rows", [0]), ValueError, r"rows: expected 2 numbers"),
    (put("rows", [True, False]), TypeError, r"rows: expected whole numbers, got bool"),
    (put("kv_rows", [0, 3]), ValueError, r"kv_rows: expected numbers from 0 to 2 \(sequences of kv\), got 3"),
    (put("kv_rows", [1, 1]), ValueError, r"kv_rows: expected each number once, got \[1, 1\]"),
    # what is wrong with the layer
    (lambda call: call.shape(kv_heads=0), ValueError, r"layer.shape.kv_heads: .* at least 1, got 0"),
    (lambda call: call.shape(heads=-2), ValueError, r"layer.shape.heads: .* at least 0, got -2"),
    (
        lambda call: call.shape(heads=3, kv_heads=2),
        ValueError,
        r"layer.shape.heads: .*multiple of kv_heads = 2",
    ),
    (lambda call: call.shape(head_dim=258), ValueError, r"layer.shape.head_dim: .*at most 256, got 258"),
    (lambda call: call.shape(head_dim=5), ValueError, r"layer.shape.head_dim: expected an even number"),
    (lambda call: call.shape(intermediate=48), ValueError, r"layer.shape.intermediate: .*of 32, got 48"),
    (lambda call: call.shape(hidden=20.5), TypeError, r"layer.shape.hidden: expected a whole number"),
    (
        lambda call: call.weight(1, arithmetic=BFLOAT16),
        ValueError,
        r"attention_in\[1\].weight: .*got one for BF",
    ),
    (
        lambda call: call.weight(3, K=13),
        ValueError,
        r"attention_out.weight: expected N = 20 and K = 12, got .*13",
    ),
    (lambda call: call.weight(2, N=7), ValueError, r"attention_in\[2\].bias: expected size 7"),
    (lambda call: call.weight(6, panels=torch.ones(3)), ValueError, r"mlp_out.weight.panels: expected size"),
    (lambda call: call.weight(6, panels=[]), TypeError, r"mlp_out.weight.panels: expected a torch.Tensor"),
    (lambda call: call.projection(4, bias=torch.ones(5)), ValueError, r"mlp_in\[0\].bias: expected size 32"),
    (lambda call: call.projection(1, first=13), ValueError, r"attention_in\[1\].first: expected 12,"),
    (lambda call: call.projection(6, first=1), ValueError, r"mlp_out.first: expected 0,"),
    (
        put("layer.attention_in", lambda several: several[:2]),
        ValueError,
        r"attention_in: .*24 columns, got 2 to 18",
    ),
    (put("layer.mlp_in", ()), ValueError, r"mlp_in: expected 1 to 2 projections to 64 columns, got 0"),
]


@pytest.mark.parametrize(("spoil", "kind", "complaint"), BAD_CALLS, ids=[each[2] for each in BAD_CALLS])
def test_a_bad_call_is_refused(
    spoil: Callable[[Call], object], kind: type[Exception], complaint: str
) -> None:
    call = Call()
    call()
    spoil(call)
    with pytest.raises(kind, match=complaint) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_sequences_without_numbers_are_the_first_ones() -> None:
    call = Call()
    del call.rest["rows"], call.rest["kv_rows"]
    call()
    call.kv = call.kv[:1]
    with pytest.raises(
        ValueError, match=r"kv: expected at least 2 sequences \(S of out\), got shape \[1, 9, 12"
    ):
        call()
    call = Call()
    del call.rest["rows"]
    call.base = States(input=torch.randn(1, 9, 20))
    with pytest.raises(ValueError, match=r"base: expected at least 2 sequences \(S of out\), got 1"):
        call()


@pytest.mark.parametrize("start", Start)
def test_what_is_read_of_the_base_must_be_there(start: Start) -> None:
    read = {Start.ATTENTION_OUT: "attention", Start.MLP: "mid", Start.MLP_OUT: "gate_up"}
    call = Call()
    call.layer = replace(call.layer, start=start)
    call()
    if start in read:
        call.base = replace(call.base, **{read[start]: None})
        with pytest.raises(
            TypeError, match=rf"base.{read[start]}: .* is in FLOAT32 from {start.name} on, got N"
        ):
            call()
    else:
        call.base = States()
        call.rest["rows"] = None
        call()


@pytest.mark.parametrize("name", SMALL.widths)
@changes
def test_a_change_needs_all_of_the_base_and_keeps_nothing(change: Arithmetic, name: str) -> None:
    call = Call(change)
    call()
    call.rest["keep"] = States(**{name: torch.empty(2, 5, SMALL.widths[name])})
    with pytest.raises(ValueError, match=rf"keep.{name}: expected None, for the layer is in {change.name}"):
        call()
    del call.rest["keep"]
    call.base = replace(call.base, **{name: None})
    with pytest.raises(
        TypeError, match=rf"base.{name}: expected a torch.Tensor, for the layer is in {change.name}"
    ):
        call()


@changes
def test_what_changes_is_packed_as_the_weight_is(change: Arithmetic) -> None:
    call = Call(change)
    weight = call.layer.mlp_out.weight
    call.projection(6, change=weight)
    call()
    call.projection(6, change=PackedMatrix.pack(torch.ones(20, 33), change))
    with pytest.raises(
        ValueError, match=r"layer.mlp_out.change: expected N = 20 and K = 32, got N = 20 and K = 33"
    ):
        call()
    call.projection(6, change=PackedMatrix.pack(torch.ones(20, 32), FLOAT32))
    with pytest.raises(
        ValueError, match=rf"layer.mlp_out.change: .*packed for {change.name}, .* for FLOAT32"
    ):
        call()


def test_a_fine_matrix_has_its_rest() -> None:
    call = Call(FINE_CHANGE)
    call.weight(6, rest=None)
    with pytest.raises(TypeError, match=r"layer.mlp_out.weight.rest: expected a torch.Tensor, got NoneType"):
        call()


@pytest.mark.parametrize("name", SMALL.widths)
def test_states_to_keep_are_of_the_output(name: str) -> None:
    call = Call()
    call.rest["keep"] = States(**{name: torch.empty(2, 4, SMALL.widths[name])})
    complaint = "expected None, for it is x" if name == "input" else "expected size 5 in dimension 1"
    with pytest.raises(ValueError, match=rf"keep.{name}: {complaint}"):
        call()


def test_two_projections_of_the_mlp_are_gate_and_up() -> None:
    call = Call()
    gate = [
        Projection(PackedMatrix.pack(torch.ones(n, 20), FLOAT32), first) for n, first in ((16, 0), (48, 16))
    ]
    call.layer = replace(call.layer, mlp_in=tuple(gate))
    with pytest.raises(ValueError, match=r"layer.mlp_in: expected 32 columns \(intermediate\) .*, got 16"):
        call()


def test_only_matrices_are_packed() -> None:
    needs(FLOAT32)
    for matrix, kind, complaint in (
        (torch.ones(3), ValueError, r"matrix: expected shape \[N, K\], got \[3\]"),
        (torch.ones(3, 4, dtype=torch.int32), TypeError, "matrix: expected dtype torch.float32 or"),
        (torch.ones(3, 4, device="meta"), ValueError, "matrix: expected device cpu, got meta"),
    ):
        with pytest.raises(kind, match=complaint):
            PackedMatrix.pack(matrix, FLOAT32)
    with pytest.raises(ValueError, match="finer: expected a matrix packed for CHANGE, got FLOAT32"):
        PackedMatrix.pack(torch.ones(3, 4), FLOAT32).finer(torch.ones(3, 4))
    needs(FINE_CHANGE)
    with pytest.raises(ValueError, match=r"matrix: expected size 4 in dimension 1 \(K of what is packed\)"):
        PackedMatrix.pack(torch.ones(3, 4), CHANGE).finer(torch.ones(3, 5))
