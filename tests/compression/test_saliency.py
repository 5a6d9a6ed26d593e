import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtm_fast.compression.saliency import keep_in_rows, keep_mask, magnitude, wanda
from dtm_fast.model import InputStatistics

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
SPARSITIES = st.floats(0, 1)


def saliency_with_ties(shape: tuple[int, int], seed: int) -> torch.Tensor:
    drawn = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed))
    return drawn.float()


@settings(max_examples=200, deadline=None)
@given(SHAPES, SPARSITIES, st.integers(0, 99))
def test_exactly_the_rounded_share_is_dropped(shape, sparsity, seed):
    keep = keep_mask(saliency_with_ties(shape, seed), sparsity)
    assert int((~keep).sum()) == round(sparsity * keep.numel())


@settings(max_examples=200, deadline=None)
@given(SHAPES, SPARSITIES, SPARSITIES, st.integers(0, 99))
def test_masks_of_rising_sparsity_are_nested(shape, one, other, seed):
    saliency = saliency_with_ties(shape, seed)
    low, high = sorted((one, other))
    assert not bool((keep_mask(saliency, high) & ~keep_mask(saliency, low)).any())


@settings(max_examples=200, deadline=None)
@given(SHAPES, SPARSITIES, st.integers(0, 99))
def test_the_least_salient_go_and_of_equals_the_first(shape, sparsity, seed):
    saliency = saliency_with_ties(shape, seed)
    flat = saliency.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (flat[i], i))
    dropped = set(order[: round(sparsity * len(flat))])
    assert keep_mask(saliency, sparsity).flatten().tolist() == [i not in dropped for i in range(len(flat))]


def test_the_mask_has_the_weights_shape():
    assert keep_mask(torch.ones(3, 5), 0.2).shape == (3, 5)


def test_magnitude_is_the_absolute_value_in_float32():
    weight = torch.tensor([[-1.5, 0.0, 3.0]], dtype=torch.bfloat16)
    found = magnitude(weight)
    assert found.dtype == torch.float32
    assert found.tolist() == [[1.5, 0.0, 3.0]]


def test_wanda_is_the_papers_product():
    weight, x = (
        torch.tensor([[-1.5, 2.0], [0.0, 4.0]], dtype=torch.bfloat16),
        torch.tensor([[3.0, 1.0], [4.0, 0.0]]),
    )
    found = wanda(weight, InputStatistics.of(x))
    assert found.dtype == torch.float32
    assert found.tolist() == [[7.5, 2.0], [0.0, 4.0]]


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(0, 12), st.integers(0, 99))
def test_of_each_row_the_least_salient_go(shape, dropped, seed):
    saliency, dropped = saliency_with_ties(shape, seed), min(dropped, shape[1])
    for row, keep in zip(saliency.tolist(), keep_in_rows(saliency, dropped).tolist(), strict=True):
        gone = sorted(range(len(row)), key=lambda place: (row[place], place))[:dropped]
        assert keep == [place not in gone for place in range(len(row))]
