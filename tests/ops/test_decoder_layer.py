"""The fused decoder layer beside transformers' own layers, and beside a twin in float64."""

from dataclasses import fields, replace

import pytest
import tiny
import torch
from decoder_layer_twin import needs, packed, random_parts, treated, twin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dtm_fast as dtm
from dtm_fast import ops
from dtm_fast.compression import Treatment
from dtm_fast.model import Decoder
from dtm_fast.model.gated_decoder import LayerParts, parts_of
from dtm_fast.model.stepping import record
from dtm_fast.ops import native
from dtm_fast.ops.decoder_layer import States, decoder_layer, new_states
from dtm_fast.ops.layer_weights import (
    Arithmetic,
    DecoderLayer,
    LayerShape,
    PackedMatrix,
    Start,
    has_arithmetic,
)

# The families whose layers the kernel computes.
KNOWN = ("llama", "mistral", "phi3", "qwen2", "qwen3")
FLOAT32, CHANGE, BFLOAT16, FINE_CHANGE = Arithmetic
NOTHING = States()

# In units of what a layer adds to a row, as FusedLayers measures: a float32 sum of some hundred terms is off by
# some 2^-24 of their magnitude, and some ten sums follow one another.
FLOAT32_DEVIATION = 5e-6
# Every result is off by 2^-9 of it; some ten follow one another. In units of what a layer adds to all rows.
BFLOAT16_DEVIATION = 2**-7
# Differences and weights are rounded, 2^-9 each. In units of all rows' differences: where the terms of a product
# cancel, its own norm is less than that of what is rounded. In two pieces they are rounded by 2^-17, and what float32
# loses of the states themselves, 2^-24 of them, is 2^-15 of a change that is 2^-9 of them.
CHANGE_DEVIATION = {CHANGE: 2**-7, FINE_CHANGE: 2**-13}

changes = pytest.mark.parametrize("change", CHANGE_DEVIATION, ids=lambda each: each.name.lower())


def available() -> list[Arithmetic]:
    return [each for each in Arithmetic if has_arithmetic(each)]


def recorded(family: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[LayerParts]]:
    """The states of a tiny model on three texts of 40 tokens, and the parts of its layers."""
    model = tiny.model_of(family).to(dtype).requires_grad_(False)
    for each in model.parameters():
        if each.dim() == 1:  # norms are made as ones, biases as zeros
            each += 0.3 * torch.randn(each.shape)
    calls, states = record(Decoder.of(model), torch.randint(3, tiny.VOCABULARY, (3, 40)))
    parts = [parts_of(call, 256) for call in calls]
    assert not any(isinstance(each, str) for each in parts), parts
    return states, parts


def room(shape: LayerShape, rows: int, positions: int) -> tuple[Tensor, Tensor, States]:
    """An output, keys and values, and states: nothing in them yet."""
    out = torch.full((rows, positions, shape.hidden), torch.nan)
    kv = torch.full((rows, positions, 2 * shape.kv_heads * shape.head_dim), torch.nan)
    kept = {name: torch.full((rows, positions, width), torch.nan) for name, width in shape.widths.items()}
    return out, kv, States(**(kept | {"input": None}))


def run(layer: DecoderLayer, x: Tensor | None, base: States = NOTHING) -> tuple[Tensor, Tensor, States]:
    """The output of whole sequences from their first position on, their keys and values, and their states."""
    like = x if x is not None else base.input
    assert like is not None
    out, kv, kept = room(layer.shape, *like.shape[:2])
    decoder_layer(layer, x, out, kv, base=base, keep=NOTHING if layer.arithmetic.is_change else kept)
    return out, kv, replace(kept, input=x)


def deviation(found: Tensor, expected: Tensor, unit: Tensor) -> float:
    """The largest of the rows' errors in units of the rows of ``unit``."""
    return float(((found.double() - expected.double()).norm(dim=-1) / unit.double().norm(dim=-1)).max())


@pytest.mark.parametrize("family", KNOWN)
def test_the_twin_is_transformers_layer(family: str) -> None:
    states, parts = recorded(family)
    for each, before, after in zip(parts, states[:-1], states[1:], strict=True):
        expected, _ = twin(each, before)
        assert deviation(after, expected, expected - before) <= FLOAT32_DEVIATION


@pytest.mark.parametrize("family", KNOWN)
def test_in_float32_it_is_transformers_layer(family: str) -> None:
    needs(FLOAT32)
    states, parts = recorded(family)
    for each, before, after in zip(parts, states[:-1], states[1:], strict=True):
        out, _, _ = run(packed(each, FLOAT32), before)
        assert deviation(out, after, after - before) <= FLOAT32_DEVIATION


@pytest.mark.parametrize("family", KNOWN)
def test_in_bfloat16_it_is_as_near_to_the_truth_as_transformers_layer(family: str) -> None:
    needs(BFLOAT16)
    states, parts = recorded(family, torch.bfloat16)
    for each, before, after in zip(parts, states[:-1], states[1:], strict=True):
        out, _, _ = run(packed(each, BFLOAT16), before.float())
        truth, _ = twin(each, before)
        assert torch.equal(out, out.bfloat16().float())
        assert (out - after).norm() <= BFLOAT16_DEVIATION * (after - before).float().norm()
        # Which of two neighbouring numbers a sum in another order is rounded to is a matter of luck.
        assert (out - truth).norm() <= 1.1 * (after - truth).norm()


@pytest.mark.parametrize("family", KNOWN)
def test_the_states_that_it_keeps_are_the_twins(family: str) -> None:
    needs(FLOAT32)
    states, parts = recorded(family)
    _, _, kept = run(packed(parts[1], FLOAT32), states[1])
    _, expected = twin(parts[1], states[1])
    for found, of_twin in zip(kept.tensors(), expected.tensors(), strict=True):
        assert found is not None
        assert of_twin is not None
        assert deviation(found, of_twin, of_twin) <= FLOAT32_DEVIATION


@pytest.mark.parametrize("arithmetic", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_from_kept_states_it_ends_in_the_same_bits(family: str, arithmetic: Arithmetic) -> None:
    needs(arithmetic)
    states, parts = recorded(family, torch.bfloat16)
    layer, x = packed(parts[0], arithmetic), states[0].float()
    out, _, base = run(layer, x)
    for start in Start:
        again, _, _ = run(replace(layer, start=start), x, base)
        assert torch.equal(again, out)


def test_float32_sums_are_in_the_order_of_masked_linear() -> None:
    needs(FLOAT32)
    shape = LayerShape(
        hidden=70, heads=9, kv_heads=3, head_dim=34, intermediate=64, eps=1e-5, attention_scale=0.2
    )
    parts = random_parts(shape, positions=30, fused=False, bias=False, norms=False)
    x = torch.randn(2, 30, 70)
    _, _, kept = run(packed(parts, FLOAT32), x)
    assert kept.attention is not None
    weight = parts.attention_out[1].weight
    everything = ops.pack_mask(torch.ones_like(weight, dtype=torch.bool))
    product = ops.masked_linear(kept.attention, weight, everything, backend="cpu")
    assert torch.equal(x + product, kept.mid)


@pytest.mark.parametrize("treatment", [dtm.Int8(), dtm.Prune(0.5)], ids=lambda each: each.key)
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3"])
@changes
def test_a_change_is_the_difference_of_two_float32_runs(
    change: Arithmetic, family: str, treatment: Treatment
) -> None:
    needs(FLOAT32, change)
    states, parts = recorded(family)
    (first, second), x = parts[:2], states[0]
    exact, layer = packed(first, FLOAT32), packed(first, change)
    next_exact, next_layer = packed(second, FLOAT32), packed(second, change)
    out, _, base = run(exact, x)
    next_out, _, next_base = run(next_exact, out)
    for index, (_, module) in enumerate(first.projections):
        weight = treatment.compress(module.weight)
        expected, _, _ = run(treated(exact, first, index, weight), x, base)
        found, _, _ = run(treated(layer, first, index, weight), None, base)
        assert (found - (expected - out)).norm() <= CHANGE_DEVIATION[change] * (expected - out).norm()
        # The next layer is handed what the first one is off by, too.
        next_expected, _, _ = run(next_exact, out + found)
        next_found, _, _ = run(next_layer, found, next_base)
        next_expected -= next_out
        assert (next_found - next_expected).norm() <= CHANGE_DEVIATION[change] * next_expected.norm()


@changes
def test_no_change_is_exactly_zero(change: Arithmetic) -> None:
    needs(FLOAT32, change)
    states, parts = recorded("qwen2")
    _, _, base = run(packed(parts[0], FLOAT32), states[0])
    for start in Start:
        found, _, _ = run(replace(packed(parts[0], change), start=start), None, base)
        assert not found.any()
    found, _, _ = run(packed(parts[0], change), torch.zeros_like(states[0]), base)
    assert not found.any()


@changes
def test_some_of_the_sequences_against_the_base_of_all(change: Arithmetic) -> None:
    needs(FLOAT32, change)
    states, parts = recorded("llama")
    _, _, base = run(packed(parts[0], FLOAT32), states[0])
    layer = treated(
        packed(parts[0], change), parts[0], 0, dtm.Prune(0.5).compress(parts[0].projections[0][1].weight)
    )
    difference = 0.1 * torch.randn(states[0].shape)
    for x in (None, difference):
        expected, expected_kv, _ = run(layer, x, base)
        out, kv, _ = room(layer.shape, 3, 40)
        some = None if x is None else x[[2, 0]]
        decoder_layer(layer, some, out[:2], kv, rows=[2, 0], kv_rows=[1, 2], base=base)
        assert torch.equal(out[:2], expected[[2, 0]])
        assert torch.equal(kv[1:], expected_kv[[2, 0]])
        assert bool(kv[0].isnan().all())


@settings(deadline=None, max_examples=40)
@given(
    shape=st.builds(
        lambda hidden, kv_heads, group, half, wide: LayerShape(
            hidden, kv_heads * group, kv_heads, 2 * half, 32 * wide, 1e-5, (2 * half) ** -0.5
        ),
        hidden=st.integers(1, 70),
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 3),
        half=st.integers(1, 24),
        wide=st.integers(1, 6),
    ),
    fused=st.booleans(),
    bias=st.booleans(),
    norms=st.booleans(),
    sequences=st.integers(1, 5),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
)
def test_any_shape_in_any_calls(
    shape: LayerShape,
    fused: bool,
    bias: bool,
    norms: bool,
    sequences: int,
    cuts: list[int],
    data: st.DataObject,
) -> None:
    """A row's bits depend neither on the other sequences, nor on cuts, threads, or what is kept."""
    needs(FLOAT32)
    arithmetic = data.draw(st.sampled_from(available()), "arithmetic")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    length, threads = sum(cuts), torch.get_num_threads()
    parts = random_parts(shape, positions=length, fused=fused, bias=bias, norms=norms)
    x = torch.randn(sequences, length, shape.hidden).bfloat16().float()
    layer, base = packed(parts, arithmetic), States()
    if arithmetic.is_change:
        _, _, base = run(packed(parts, FLOAT32), torch.randn(x.shape))
        index = data.draw(st.integers(0, len(layer.projections) - 1), "changed")
        weight = 1.125 * parts.projections[index][1].weight
        layer = replace(treated(layer, parts, index, weight), start=Start.ATTENTION)
    alone = [run(layer, each[None], of_sequence(base, row)) for row, each in enumerate(x)]
    if arithmetic == FLOAT32:
        expected, _ = twin(parts, x)
        error = torch.cat([out for out, _, _ in alone]) - expected
        # A row may be one number, and the terms of it cancel.
        assert error.norm() <= FLOAT32_DEVIATION * (x.norm() + expected.norm())

    kv_rows = data.draw(st.permutations(range(sequences)), "kv rows")
    first_output = data.draw(st.integers(0, length - 1), "first output")
    lengths = [data.draw(st.integers(1, cuts[-1]), "length of the last part") for _ in range(sequences)]
    out, kv, _ = room(shape, sequences, length)
    first = 0
    try:
        for number, count in enumerate(cuts):
            torch.set_num_threads(1 + number % 2)
            decoder_layer(
                layer,
                x[:, first : first + count],
                out[:, first : first + count],
                kv,
                first=first,
                first_output=first_output,
                lengths=lengths if number == len(cuts) - 1 else None,
                kv_rows=kv_rows,
                base=base,
            )
            first += count
    finally:
        torch.set_num_threads(threads)
    for row, (expected_out, expected_kv, _) in enumerate(alone):
        end = length - cuts[-1] + lengths[row]
        assert torch.equal(out[row, first_output:end], expected_out[0, first_output:end])
        assert torch.equal(kv[kv_rows[row], :end], expected_kv[0, :end])
        assert bool(out[row, end:].isnan().all())
        assert bool(kv[kv_rows[row], end:].isnan().all())


def of_sequence(states: States, row: int) -> States:
    chosen = {
        each.name: getattr(states, each.name)[row, None]
        for each in fields(States)
        if getattr(states, each.name) is not None
    }
    return States(**chosen)


@pytest.mark.parametrize("arithmetic", Arithmetic)
def test_what_is_not_finite_shows_from_its_position_on(arithmetic: Arithmetic) -> None:
    needs(arithmetic)
    states, parts = recorded("llama", torch.bfloat16)
    x, base = states[0].float(), States()
    if arithmetic.is_change:
        _, _, base = run(packed(parts[0], FLOAT32), x)
    layer = packed(parts[0], arithmetic)
    clean, _, _ = run(layer, x, base)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = x.clone()
        spoiled[1, 17, 3] = bad
        out, _, _ = run(layer, spoiled, base)
        assert torch.equal(out[[0, 2]], clean[[0, 2]])
        assert torch.equal(out[1, :17], clean[1, :17])
        assert bool(out[1, 17:].isnan().all())


def test_nothing_to_do_writes_nothing() -> None:
    needs(FLOAT32)
    states, parts = recorded("llama")
    layer, (out, kv, _) = packed(parts[0], FLOAT32), room(parts[0].shape, 3, 40)
    decoder_layer(layer, states[0][:, :0], out[:, :0], kv, first=5)
    decoder_layer(layer, states[0][:0], out[:0], kv)
    assert bool(out.isnan().all() and kv.isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_matrix_of_any_dtype_is_packed_as_its_float32(dtype: torch.dtype) -> None:
    needs(FLOAT32)
    matrix = torch.randn(70, 37).to(dtype)
    for arithmetic in available():
        wide = PackedMatrix.pack(matrix.float(), arithmetic)
        for each in (matrix, matrix.T.contiguous().T):
            found = PackedMatrix.pack(each, arithmetic)
            assert (found.N, found.K) == (70, 37)
            assert torch.equal(found.panels.view(torch.int32), wide.panels.view(torch.int32))


def test_which_instruction_set_has_which_arithmetic(isas: tuple[str, ...]) -> None:
    float32_alone, pairs, all_of_them = {FLOAT32}, {FLOAT32, CHANGE, BFLOAT16}, set(Arithmetic)
    known = {"avx512": float32_alone, "avx512_vnni": float32_alone, "avx512_bf16": pairs, "amx": all_of_them}
    for isa in ("reference", *isas):
        with native.use_cpu_isa(isa):
            assert set(available()) == known.get(isa, set())
            for missing in set(Arithmetic) - set(available()):
                with pytest.raises(ValueError, match="instruction set"):
                    PackedMatrix.pack(torch.ones(2, 2), missing)


@pytest.mark.parametrize("positions", [3, 500])  # more than 32 MiB: on large pages
def test_new_states_are_room_for_all_but_the_input(positions: int) -> None:
    needs(FLOAT32)
    shape = LayerShape(576, 9, 3, 64, 1536, 1e-5, 0.125)
    states = new_states(shape, 4, positions)
    assert states.input is None
    for name, width in shape.widths.items():
        if name != "input":
            state = getattr(states, name)
            assert tuple(state.shape) == (4, positions, width)
            assert state.is_contiguous()
            state.fill_(width)
    assert all(bool((getattr(states, n) == w).all()) for n, w in shape.widths.items() if n != "input")
