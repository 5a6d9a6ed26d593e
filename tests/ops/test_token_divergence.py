import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast import ops
from dtm_fast.ops import native

# (B, T, V, D)
SHAPES = [
    (3, 181, 1100, 330),
    (3, 169, 513, 123),
    (2, 5, 300, 64),
    (1, 1, 1, 1),
    (1, 3, 16, 257),
    (4, 121, 700, 17),
    (2, 3, 5, 0),
]
DTYPES = [torch.float32, torch.bfloat16]


def integer_case(
    batch: int, length: int, vocabulary: int, depth: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small integers: every sum is exact in float32, so the logits, ties included, are the same for everyone."""
    hidden = torch.randint(-3, 4, (batch, length, depth)).to(dtype)
    lm_head = torch.randint(-3, 4, (vocabulary, depth)).to(dtype)
    reference = exact_logits(hidden, lm_head).argmax(-1)
    changed = torch.rand(batch, length) < 0.2
    return hidden, lm_head, torch.where(changed, torch.randint(0, vocabulary, (batch, length)), reference)


def exact_logits(hidden: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
    """The logits as the model sees them: float64 products, rounded to the dtype, as float64."""
    return (hidden.double() @ lm_head.double().T).float().to(hidden.dtype).double()


def assert_is_right(
    result: ops.Divergence, hidden: torch.Tensor, lm_head: torch.Tensor, reference: torch.Tensor
) -> None:
    """Against a float64 oracle: mismatch, first and count exactly, nll within 2^-21 of the largest term."""
    logits = exact_logits(hidden, lm_head)
    mismatch = logits.argmax(-1) != reference
    length = reference.shape[1]
    first = [row.index(True) if True in row else length for row in mismatch.tolist()]
    assert torch.equal(result.mismatch, mismatch)
    assert result.first.tolist() == first
    assert result.first.dtype == result.count.dtype == torch.int64
    assert torch.equal(result.count, mismatch.sum(-1))
    nll = logits.logsumexp(-1) - logits.gather(-1, reference[..., None])[..., 0]
    assert result.nll.dtype == torch.float32
    assert bool(((result.nll.double() - nll).abs() <= 2**-21 * (1 + logits.abs().amax(-1) + nll)).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_isa_is_exact_on_integers(
    isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    case = integer_case(*shape, dtype)
    assert_is_right(ops.token_divergence(*case, backend="cpu"), *case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_is_exact_on_integers(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        case = integer_case(*shape, dtype)
        assert_is_right(ops.token_divergence(*case, backend="reference"), *case)


def test_random_logits_away_from_ties(backend: str) -> None:
    hidden, lm_head = torch.randn(4, 100, 200), torch.randn(1000, 200)
    logits = hidden.double() @ lm_head.double().T
    top = logits.topk(2)
    clear = top.values[..., 0] - top.values[..., 1] > 1e-3
    assert clear.float().mean() > 0.99
    reference = top.indices[..., 0]
    result = ops.token_divergence(hidden, lm_head, reference, backend=backend)
    assert not bool(result.mismatch[clear].any())
    second = ops.token_divergence(hidden, lm_head, top.indices[..., 1], backend=backend)
    assert bool(second.mismatch[clear].all())
    nll = logits.logsumexp(-1) - logits.gather(-1, reference[..., None])[..., 0]
    torch_logits = torch.nn.functional.linear(hidden, lm_head)
    torch_nll = torch_logits.logsumexp(-1) - torch_logits.gather(-1, reference[..., None])[..., 0]
    torch_error = (torch_nll.double() - nll).abs().max()
    assert (result.nll.double() - nll).abs().max() <= torch_error + 2**-20 * logits.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [(10, 11), (10, 300), (255, 256), (0, 999), (1023, 1024), (512, 2099)])
def test_ties_go_to_the_lowest_id(backend: str, dtype: torch.dtype, tokens: tuple[int, int]) -> None:
    hidden, lm_head, _ = integer_case(2, 130, 2100, 32, dtype)
    hidden[..., 0] = 3
    winner = torch.full((32,), 0.0)
    winner[0] = 1000.0
    lm_head[list(tokens)] = winner.to(dtype)
    low, high = (torch.full((2, 130), token) for token in tokens)
    assert ops.token_divergence(hidden, lm_head, low, backend=backend).first.tolist() == [130, 130]
    assert ops.token_divergence(hidden, lm_head, high, backend=backend).count.tolist() == [130, 130]


def test_bfloat16_logits_tie_after_rounding(backend: str) -> None:
    hidden = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    lm_head = torch.tensor([[256.0, 0.0], [256.0, 1.0]], dtype=torch.bfloat16)  # 257 rounds to 256
    result = ops.token_divergence(hidden, lm_head, torch.zeros(1, 1, dtype=torch.int64), backend=backend)
    assert result.mismatch.item() is False
    assert result.nll.item() == pytest.approx(0.6931472, abs=1e-5)  # float32 near 256


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_the_largest_logit_and_the_first_one_wins(backend: str, dtype: torch.dtype) -> None:
    for tokens in ((3, 700), (300,), (1999,), (0, 1), (1023, 1024)):
        hidden, lm_head, _ = integer_case(1, 20, 2000, 32, dtype)
        lm_head[list(tokens), 4] = torch.nan
        lm_head[5] = torch.finfo(dtype).max / 1e3
        reference = torch.full((1, 20), tokens[0])
        result = ops.token_divergence(hidden, lm_head, reference, backend=backend)
        assert result.count.item() == 0
        assert bool(result.nll.isnan().all())


def test_one_bad_token_spoils_no_other(backend: str) -> None:
    hidden, lm_head, reference = integer_case(2, 30, 300, 32, torch.float32)
    clean = ops.token_divergence(hidden, lm_head, reference, backend=backend)
    hidden[1, 7, 3] = torch.nan
    result = ops.token_divergence(hidden, lm_head, reference, backend=backend)
    assert bool(result.nll[1, 7].isnan())
    assert int(result.nll.isnan().sum()) == 1
    result.nll[1, 7] = clean.nll[1, 7]
    assert torch.equal(result.nll, clean.nll)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [[2], [2, 290], list(range(300))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_logits_are_as_in_torch(
    backend: str, dtype: torch.dtype, value: float, rows: list[int]
) -> None:
    hidden, lm_head, reference = integer_case(1, 10, 300, 8, dtype)
    hidden = hidden.abs() + 1
    lm_head[rows] = value
    reference[0, :3] = torch.tensor([2, 290, 0])
    logits = torch.nn.functional.linear(hidden, lm_head).float()
    result = ops.token_divergence(hidden, lm_head, reference, backend=backend)
    assert torch.equal(result.mismatch, logits.argmax(-1) != reference)
    nll = logits.logsumexp(-1) - logits.gather(-1, reference[..., None])[..., 0]
    torch.testing.assert_close(result.nll, nll, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_all_instruction_sets_give_the_same_bits(isas: tuple[str, ...]) -> None:
    """But for AMX, and bfloat16 on AVX512-BF16, which sum in orders of their own."""
    for dtype in DTYPES:
        hidden, lm_head = torch.randn(3, 90, 300).to(dtype), torch.randn(777, 300).to(dtype)
        reference = torch.randint(0, 777, (3, 90))
        results = []
        own = ("amx",) if dtype == torch.float32 else ("avx512_bf16", "amx")
        for each in (each for each in isas if each not in own):
            with native.use_cpu_isa(each):
                results.append(ops.token_divergence(hidden, lm_head, reference, backend="cpu"))
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_batch_or_the_threads(
    isa: str, dtype: torch.dtype, threads: None
) -> None:
    hidden, lm_head = torch.randn(5, 210, 300).to(dtype), torch.randn(777, 300).to(dtype)
    reference = torch.nn.functional.linear(hidden, lm_head).argmax(-1)
    torch.set_num_threads(2)
    batch = ops.token_divergence(hidden, lm_head, reference, backend="cpu")
    torch.set_num_threads(1)
    alone = ops.token_divergence(hidden, lm_head, reference, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(alone, batch, strict=True))
    for row, first, last in ((0, 0, 1), (4, 209, 210), (1, 25, 40), (4, 100, 140)):
        part = slice(first, last)
        one = ops.token_divergence(
            hidden[row, None, part], lm_head, reference[row, None, part], backend="cpu"
        )
        assert torch.equal(one.mismatch[0], batch.mismatch[row, part])
        assert torch.equal(one.nll[0], batch.nll[row, part])


def test_strides_and_empty_sizes(backend: str) -> None:
    hidden, lm_head, reference = integer_case(3, 7, 50, 20, torch.float32)
    expected = ops.token_divergence(hidden, lm_head, reference, backend=backend)
    wide = torch.randn(3, 14, 40)
    wide[:, ::2, 3:23] = hidden
    views = (
        (wide[:, ::2, 3:23], lm_head.T.contiguous().T, reference.T.contiguous().T),
        (
            hidden.transpose(0, 1).contiguous().transpose(0, 1),
            torch.cat([lm_head, lm_head], 1)[:, :20],
            reference,
        ),
    )
    for view in views:
        assert_is_right(ops.token_divergence(*view, backend=backend), hidden, lm_head, reference)
        assert torch.equal(ops.token_divergence(*view, backend=backend).mismatch, expected.mismatch)
    for batch, length in ((0, 7), (3, 0), (0, 0)):
        empty = ops.token_divergence(
            hidden[:batch, :length], lm_head, reference[:batch, :length], backend=backend
        )
        assert [list(each.shape) for each in empty] == [[batch, length], [batch], [batch], [batch, length]]
        assert empty.first.tolist() == [length] * batch
    no_vocabulary = ops.token_divergence(hidden[:0], lm_head[:0], reference[:0], backend=backend)
    assert no_vocabulary.mismatch.shape == (0, 7)


def test_nll_has_a_gradient_on_the_twin_only(backend: str) -> None:
    hidden, lm_head, reference = integer_case(1, 4, 30, 8, torch.float32)
    hidden.requires_grad_()
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"token_divergence has no backward"):
            ops.token_divergence(hidden, lm_head, reference, backend="cpu")
    else:
        ops.token_divergence(hidden, lm_head, reference, backend="reference").nll.sum().backward()
        assert hidden.grad is not None
        assert bool((hidden.grad != 0).any())


def test_wrong_arguments(backend: str) -> None:
    hidden, lm_head, reference = integer_case(2, 3, 10, 8, torch.float32)

    def run(**changes: object) -> None:
        arguments = {"hidden": hidden, "lm_head": lm_head, "reference": reference, "backend": backend}
        ops.token_divergence(**(arguments | changes))  # type: ignore[arg-type]

    with pytest.raises(
        TypeError, match=r"hidden: expected dtype torch.float32 or torch.bfloat16, got torch.float16"
    ):
        run(hidden=hidden.half())
    with pytest.raises(ValueError, match=r"hidden: expected shape \[B, T, D\], got \[3, 8\]"):
        run(hidden=hidden[0])
    with pytest.raises(TypeError, match=r"lm_head: expected dtype torch.float32, got torch.bfloat16"):
        run(lm_head=lm_head.bfloat16())
    with pytest.raises(ValueError, match=r"lm_head: expected size 8 in dimension 1 \(D of hidden\)"):
        run(lm_head=lm_head[:, :7])
    with pytest.raises(TypeError, match=r"reference: expected dtype torch.int64, got torch.int32"):
        run(reference=reference.int())
    with pytest.raises(ValueError, match=r"reference: expected size 3 in dimension 1 \(T of hidden\)"):
        run(reference=reference[:, :2])
    for bad in (-1, 10):
        wrong = reference.clone()
        wrong[1, 2] = bad
        with pytest.raises(ValueError, match=r"reference: expected token ids in \[0, 10\), got ids from"):
            run(reference=wrong)
    with pytest.raises(ValueError, match=r"lm_head: expected device cpu, that of hidden, got meta"):
        run(lm_head=lm_head.to("meta"))


def test_rows_further_apart_than_2_to_the_31(isas: tuple[str, ...]) -> None:
    stride, depth = 2**30 + 5, 33
    hidden, lm_head, reference = integer_case(1, 3, 3, depth, torch.bfloat16)
    storage = torch.empty(
        2 * stride + depth, dtype=torch.bfloat16
    )  # pages that nobody touches take no memory
    for each in isas:
        with native.use_cpu_isa(each):
            far_head = storage.as_strided((3, depth), (stride, 1)).copy_(lm_head)
            assert_is_right(ops.token_divergence(hidden, far_head, reference), hidden, lm_head, reference)
            far_hidden = storage.as_strided((1, 3, depth), (1, stride, 1)).copy_(hidden)
            assert_is_right(ops.token_divergence(far_hidden, lm_head, reference), hidden, lm_head, reference)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 600), st.integers(0, 40)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(
    isas: tuple[str, ...], shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    case = integer_case(*shape, dtype)
    for each in isas:
        with native.use_cpu_isa(each):
            assert_is_right(ops.token_divergence(*case, backend="cpu"), *case)
