"""The gradients of masked_linear against those that torch derives from its twin, and against float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast import ops

# What float32 sums of some hundred terms near 1 differ by when their order differs.
ANOTHER_ORDER = 1e-4

# (M, N, K)
SHAPES = [(507, 123, 513), (5, 7, 31), (12, 32, 256), (1, 1, 1), (0, 5, 8), (5, 0, 8), (5, 8, 0)]
DTYPES = [torch.float32, torch.bfloat16]
Gradients = tuple[torch.Tensor, ...]


class Case:
    """Arguments of masked_linear that need gradients, and a gradient of its result."""

    def __init__(
        self,
        rows: int,
        columns: int,
        depth: int,
        dtype: torch.dtype = torch.float32,
        variants: int | None = None,
    ) -> None:
        leading = () if variants is None else (variants,)
        self.kept = torch.rand(*leading, columns, depth) < 0.5
        self.packed = ops.pack_mask(self.kept)
        self.x = torch.randn(rows, depth).to(dtype).requires_grad_()
        self.weight = torch.randn(columns, depth).to(dtype).requires_grad_()
        self.bias = torch.randn(columns).to(dtype).requires_grad_()
        self.dy = torch.randn(*leading, rows, columns).to(dtype)

    def gradients(self, backend: str | None = None) -> Gradients:
        """dx, dw, db."""
        y = ops.masked_linear(self.x, self.weight, self.packed, self.bias, backend=backend)
        return torch.autograd.grad(y, (self.x, self.weight, self.bias), self.dy)

    def exact(self) -> tuple[Gradients, Gradients]:
        """The gradients in float64, and the sums of the magnitudes of the products in them."""
        factors = self.dy.double(), self.weight.detach().double(), self.x.detach().double()
        return self._in_float64(*factors), self._in_float64(*(each.abs() for each in factors))

    def _in_float64(self, dy: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> Gradients:
        kept, dy = (each if each.dim() == 3 else each[None] for each in (self.kept, dy))
        dx = torch.einsum("vmn,vnk->mk", dy, kept * weight)
        dw = (torch.einsum("vmn,mk->vnk", dy, x) * kept).sum(0)
        return dx, dw, dy.sum((0, 1))


def assert_no_worse_than_torch(case: Case, found: Gradients) -> None:
    """The policy: error <= that of torch's derivation in this dtype + epsilon of the products' magnitudes.

    Epsilon is 2^-22; with several masks in bfloat16, where torch rounds each partial sum and we each product,
    it is bfloat16's own 2^-8.
    """
    epsilon = 2**-8 if case.kept.dim() == 3 and case.x.dtype == torch.bfloat16 else 2**-22
    torchs = case.gradients("reference")
    for ours, twin, truth, magnitude in zip(found, torchs, *case.exact(), strict=True):
        assert ours.shape == twin.shape
        assert ours.dtype == twin.dtype
        torch_error = (twin.double() - truth).abs()
        assert bool(((ours.double() - truth).abs() <= torch_error + epsilon * magnitude).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variants", [None, 1, 3])
def test_no_worse_than_torch(shape: tuple[int, int, int], dtype: torch.dtype, variants: int | None) -> None:
    case = Case(*shape, dtype, variants)
    assert_no_worse_than_torch(case, case.gradients())


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_masks_at_all_give_zeros(dtype: torch.dtype) -> None:
    case = Case(5, 7, 31, dtype, 0)
    for argument, gradient in zip((case.x, case.weight, case.bias), case.gradients(), strict=True):
        assert gradient.dtype == dtype
        assert torch.equal(gradient, torch.zeros_like(argument))


def test_on_every_isa(isa: str) -> None:
    case = Case(19, 23, 77, torch.bfloat16, 2)
    assert_no_worse_than_torch(case, case.gradients("cpu"))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 20),
    depth=st.integers(0, 100),
    variants=st.sampled_from([None, 1, 2]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(
    rows: int, columns: int, depth: int, variants: int | None, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    case = Case(rows, columns, depth, dtype, variants)
    assert_no_worse_than_torch(case, case.gradients())


@pytest.mark.parametrize("variants", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_masked_out_neither_gives_nor_gets(dtype: torch.dtype, variants: int | None) -> None:
    case = Case(6, 10, 70, dtype, variants)
    clean, kept = case.gradients(), case.kept if variants is None else case.kept.any(0)
    with torch.no_grad():
        case.weight.copy_(torch.where(kept, case.weight, torch.nan))
    assert all(torch.equal(*pair) for pair in zip(case.gradients(), clean, strict=True))
    case.dy.fill_(torch.nan)
    _, dw, _ = case.gradients()
    assert bool((dw[~kept] == 0).all())
    assert bool(dw[kept].isnan().all())


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("variants", [None, 2])
def test_leading_dimensions(leading: tuple[int, ...], variants: int | None) -> None:
    case = Case(1, 10, 50, variants=variants)
    found = []
    for backend in (None, "reference"):
        torch.manual_seed(1)
        x = torch.randn(*leading, 50, requires_grad=True)
        y = ops.masked_linear(x, case.weight, case.packed, case.bias, backend=backend)
        found.append(torch.autograd.grad(y, (x, case.weight, case.bias), torch.randn(y.shape)))
    for ours, twins in zip(*found, strict=True):
        assert ours.shape == twins.shape
        assert torch.allclose(ours, twins, rtol=0, atol=ANOTHER_ORDER)


def test_strides() -> None:
    case = Case(24, 10, 50)
    expected = case.gradients()
    x = case.x.detach().T.contiguous().T.requires_grad_()
    weight = case.weight.detach().T.contiguous().T.requires_grad_()
    y = ops.masked_linear(x, weight, case.packed.T.contiguous().T, case.bias)
    found = torch.autograd.grad(y, (x, weight, case.bias), case.dy.T.contiguous().T)
    assert all(
        torch.allclose(*pair, rtol=0, atol=ANOTHER_ORDER) for pair in zip(found, expected, strict=True)
    )
    y = ops.masked_linear(case.x, case.weight, case.packed, case.bias)
    (dx,) = torch.autograd.grad(y.sum(), case.x)  # a gradient of strides 0
    expected_dx = (case.weight * case.kept).sum(0).expand(24, 50)
    assert torch.allclose(dx, expected_dx, rtol=0, atol=ANOTHER_ORDER)


def saved_for_backward(run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        run()
    return saved


def test_only_what_is_needed_is_kept_and_computed() -> None:
    case = Case(6, 10, 70)
    constant = [each.detach() for each in (case.x, case.weight, case.bias)]

    def run(index: int) -> torch.Tensor:
        x, weight, bias = [*constant[:index], (case.x, case.weight, case.bias)[index], *constant[index + 1 :]]
        return ops.masked_linear(x, weight, case.packed, bias)

    expected = case.gradients()
    for index, needed in enumerate([[case.weight, case.packed], [case.x, case.packed], [case.packed]]):
        kept = saved_for_backward(lambda index=index: run(index))
        assert [each.data_ptr() for each in kept] == [each.data_ptr() for each in needed]
        argument = (case.x, case.weight, case.bias)[index]
        assert torch.equal(torch.autograd.grad(run(index), argument, case.dy)[0], expected[index])


def test_an_argument_that_changes_before_the_backward_is_noticed() -> None:
    case = Case(6, 10, 70)
    for changed in (case.weight, case.x, case.packed):
        y = ops.masked_linear(case.x, case.weight, case.packed)
        with torch.no_grad():
            changed.mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("variants", [None, 2])
def test_double_backward(variants: int | None) -> None:
    """Against float64, where the error may be twice that of torch's derivation from the twin."""
    case = Case(6, 10, 40, variants=variants)

    def gradients(y: torch.Tensor, *arguments: torch.Tensor) -> Gradients:
        first = torch.autograd.grad((y * case.dy).tanh().sum(), arguments[:2], create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), arguments)

    arguments = case.x, case.weight, case.bias
    ours, twins = (
        gradients(ops.masked_linear(case.x, case.weight, case.packed, case.bias, backend=backend), *arguments)
        for backend in (None, "reference")
    )
    x, weight, bias = exact = tuple(each.detach().double().requires_grad_() for each in arguments)
    truth = gradients(torch.einsum("mk,...nk->...mn", x, case.kept * weight) + bias, *exact)
    for our, twin, true in zip(ours, twins, truth, strict=True):
        assert (our - true).norm() <= 2 * (twin - true).norm() + 2**-22 * true.norm()


def test_functional_gradients() -> None:
    case = Case(6, 10, 40)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return (ops.masked_linear(case.x.detach(), weight, case.packed) * case.dy).sum()

    assert torch.equal(torch.func.grad(loss)(case.weight.detach()), case.gradients()[1])


@pytest.mark.parametrize("variants", [None, 2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("needs", ["x", "weight", "both"])
def test_opcheck(variants: int | None, with_bias: bool, needs: str) -> None:
    case = Case(5, 11, 37, variants=variants)
    values = (
        case.x if needs != "weight" else case.x.detach(),
        case.weight if needs != "x" else case.weight.detach(),
        case.packed,
        *((case.bias,) if with_bias else ()),
    )
    torch.library.opcheck(torch.ops.dtm_fast.masked_linear.default, values)


@pytest.mark.once
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("variants", [None, 2])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_compiled_training_step(dynamic: bool, variants: int | None, backend: str | None) -> None:
    torch.compiler.reset()

    def loss(case: Case) -> torch.Tensor:
        y = ops.masked_linear(case.x, case.weight, case.packed, case.bias, backend=backend)
        return F.gelu(y).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 9):
        case = Case(rows, 11, 37, variants=variants)
        parameters = case.x, case.weight, case.bias
        expected = torch.autograd.grad(loss(case), parameters)
        found = torch.autograd.grad(compiled(case), parameters)
        for ours, eager in zip(found, expected, strict=True):
            assert float((ours - eager).norm() / eager.norm()) < 2**-20
