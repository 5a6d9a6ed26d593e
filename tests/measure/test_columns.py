"""What is read off logits, on a vocabulary of three tokens, worked out by hand."""

import math

import pytest
import torch

from dtm_fast.measure.columns import columns_of, first_predicted, joined, perplexity_of

pytestmark = pytest.mark.once

LN2, LN3 = math.log(2), math.log(3)
PREFIX = 3
TOKENS = torch.tensor([[0, 1, 2, 0, 1], [2, 0, 0, 2, 2]])
# Logits are ln 2 or 0: a token's share is 1/3 where all are equal, else 2/4 or 1/4, or 2/5, 2/5 and 1/5.
HALF_0, HALF_1, HALF_2 = [LN2, 0, 0], [0, LN2, 0], [0, 0, LN2]
EQUAL, TWO = [0.0, 0, 0], [0, LN2, LN2]
LOGITS = torch.tensor(
    [
        # predicts 1      2       0       1
        [HALF_1, HALF_0, HALF_0, HALF_2],  # agrees, differs | agrees, diverges
        # predicts 0      0       2       2
        [EQUAL, TWO, TWO, HALF_2],  # agrees, differs | diverges by a tie, agrees
    ]
)
CHOICES = torch.tensor([[1, 2], [0, 0]])


def never():
    raise AssertionError("the base's logits are needed for kl alone")


def columns(*metrics, logits=LOGITS, base_logits=never):
    first = first_predicted(set(metrics), PREFIX)
    return columns_of(logits[:, first - 1 :], TOKENS, PREFIX, set(metrics), base_logits, CHOICES)


@pytest.mark.parametrize(
    ("metrics", "first"),
    [
        ([], 3),
        (["sdt", "dppl", "kl"], 3),
        (["perplexity"], 1),
        (["agreement"], 1),
        (["kl", "agreement"], 1),
    ],
)
def test_logits_of_the_prefix_are_needed_for_metrics_of_the_prefix_alone(metrics, first):
    assert first_predicted(set(metrics), PREFIX) == first


@pytest.mark.parametrize("metrics", [[], ["sdt"], ["perplexity"], ["agreement", "dppl"]])
def test_mismatches_are_those_of_the_completion(metrics):
    found = columns(*metrics)
    assert found["mismatch"].tolist() == [[False, True], [True, False]]
    assert found["mismatch"].dtype == torch.bool


@pytest.mark.parametrize("metrics", [[], ["perplexity"]])
def test_the_first_lead_is_that_of_the_first_mismatch(metrics):
    assert columns(*metrics)["first_lead"].tolist() == pytest.approx([-LN2, 0.0])


def test_without_a_mismatch_there_is_a_lead_of_no_meaning():
    found = columns(logits=torch.tensor([HALF_1, HALF_2, HALF_0, HALF_1]).expand(2, -1, -1))
    assert found["mismatch"].tolist() == [[False, False], [True, True]]
    assert found["first_lead"].shape == (2,)


def test_only_what_was_asked_for_is_there():
    assert set(columns()) == set(columns("sdt")) == {"mismatch", "first_lead"}
    assert set(columns("dppl", "agreement")) == {"mismatch", "first_lead", "dppl", "agreement"}


def test_dppl_is_the_perplexity_of_the_completion():
    # Shares of the completion's tokens: 1/2 and 1/4; 2/5 and 1/2.
    found = columns("dppl")["dppl"]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([8**0.5, 5**0.5], rel=1e-6)


def test_perplexity_is_that_of_the_prefix_after_its_first_token():
    # Shares of tokens 1 and 2: 1/2 and 1/4; 1/3 and 1/5.
    found = columns("perplexity")["perplexity"]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([8**0.5, 15**0.5], rel=1e-6)


def test_agreement_is_with_what_the_base_prefers_on_the_prefix():
    found = columns("agreement")["agreement"]
    assert found.dtype == torch.float64
    assert found.tolist() == [0.5, 0.5]


def test_kl_is_the_mean_divergence_from_the_base_over_the_completion():
    base = torch.tensor([[HALF_0, EQUAL], [TWO, HALF_1]])
    # Of (1/2, 1/4, 1/4) from itself: 0. Of thirds from (1/4, 1/4, 1/2): ln(4/3) - ln(2)/3. Of (1/4, 1/2, 1/4) from
    # (1/4, 1/4, 1/2): ln(2)/4.
    found = columns("kl", base_logits=lambda: base)["kl"]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([(math.log(4 / 3) - LN2 / 3) / 2, LN2 / 8], rel=1e-5)


def test_the_perplexity_of_equal_shares_is_their_number():
    assert perplexity_of(torch.full((2, 7), LN3)).tolist() == pytest.approx([3, 3], rel=1e-6)


def test_large_likelihoods_are_averaged_in_float64():
    nll = torch.tensor([[300.0, 300.0]])
    assert perplexity_of(nll).item() == pytest.approx(math.exp(300))


def test_batches_are_joined_in_order():
    parts = [
        {"a": torch.tensor([1, 2]), "b": torch.ones(2, 3)},
        {"a": torch.tensor([3]), "b": torch.zeros(1, 3)},
    ]
    found = joined(parts)
    assert found["a"].tolist() == [1, 2, 3]
    assert found["b"].sum(1).tolist() == [3, 3, 0]
    assert set(joined(parts[:1])) == {"a", "b"}
