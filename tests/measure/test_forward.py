import math

import pytest
import tiny
import torch

from dtm_fast.errors import MeasurementError
from dtm_fast.measure.forward import choice, kl_divergence, lead, logits_before, negative_log_likelihood

pytestmark = pytest.mark.once

DRAW = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(2, 5, 11, generator=DRAW)
OTHER = 3 * torch.randn(2, 5, 11, generator=DRAW)
REFERENCE = torch.randint(0, 11, (2, 5), generator=DRAW)


def each_position():
    return [(i, j) for i in range(2) for j in range(5)]


def softmax(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


@pytest.mark.parametrize("first", [1, 5, 9])
def test_logits_are_those_that_predict_the_tokens_from_the_first_on(family, first):
    model = tiny.model_of(family)
    tokens = torch.randint(3, 99, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits[:, first - 1 : -1]
    torch.testing.assert_close(logits_before(model, tokens, first), expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_gives_all_logits_whatever_is_asked_is_understood(llama, monkeypatch):
    tokens = torch.randint(3, 99, (2, 10), generator=torch.Generator().manual_seed(0))
    expected, plain = logits_before(llama, tokens, 6), llama.forward
    monkeypatch.setattr(llama, "forward", lambda logits_to_keep=0, **arguments: plain(**arguments))
    torch.testing.assert_close(logits_before(llama, tokens, 6), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_end_the_measurement(llama, value):
    llama.lm_head.weight.data[5, 3] = value
    with pytest.raises(MeasurementError, match="the model's logits are not finite"):
        logits_before(llama, torch.arange(3, 9)[None], 1)


def test_minus_infinity_is_a_logit(llama, monkeypatch):
    plain = llama.forward

    def never_token_5(**arguments):
        output = plain(**arguments)
        output.logits[..., 5] = -torch.inf
        return output

    monkeypatch.setattr(llama, "forward", never_token_5)
    assert bool((logits_before(llama, torch.arange(3, 9)[None], 1)[..., 5] == -torch.inf).all())


def test_the_choice_is_the_largest():
    rows = LOGITS.tolist()
    assert choice(LOGITS).tolist() == [[row.index(max(row)) for row in rows[i]] for i in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 17, 101, 49152])
def test_of_equal_logits_the_lowest_id_is_chosen(dtype, size):
    logits = torch.zeros(1, 3, size, dtype=dtype)
    logits[0, 1, size // 2 :] = 1
    logits[0, 2, 1:] = torch.inf
    assert choice(logits).tolist() == [[0, size // 2, 1]]


def test_the_lead_is_over_the_largest_other():
    for i, j in each_position():
        row, r = LOGITS[i, j].tolist(), int(REFERENCE[i, j])
        expected = row[r] - max(row[:r] + row[r + 1 :])
        assert float(lead(LOGITS, REFERENCE)[i, j]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reference", [0, 1, 2])
def test_the_lead_of_a_tie_is_zero_for_either(reference):
    logits = torch.tensor([[[2.0, 2.0, 2.0, 1.0]]])
    assert lead(logits, torch.tensor([[reference]])).item() == 0


def test_the_lead_is_positive_exactly_where_the_reference_is_the_only_choice():
    chosen = choice(LOGITS)
    assert torch.equal(lead(LOGITS, REFERENCE) > 0, chosen == REFERENCE)
    assert bool((lead(LOGITS, chosen) > 0).all())


def test_negative_log_likelihood_against_the_formula():
    found = negative_log_likelihood(LOGITS, REFERENCE)
    for i, j in each_position():
        expected = -math.log(softmax(LOGITS[i, j].tolist())[int(REFERENCE[i, j])])
        assert float(found[i, j]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_negative_log_likelihood_survives_large_logits():
    logits = torch.tensor([[[1000.0, 0.0]]], dtype=torch.bfloat16)
    assert negative_log_likelihood(logits, torch.tensor([[1]])).item() == 1000


def test_kl_divergence_against_the_formula():
    found = kl_divergence(LOGITS, OTHER)
    for i, j in each_position():
        p, q = softmax(LOGITS[i, j].tolist()), softmax(OTHER[i, j].tolist())
        expected = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert float(found[i, j]) == pytest.approx(expected, rel=1e-4)


def test_kl_divergence_of_a_model_from_itself_is_zero():
    assert not kl_divergence(LOGITS, LOGITS).any()
    never = LOGITS.clone()
    never[..., 4], never[0, 2, 7] = -torch.inf, -torch.inf
    assert not kl_divergence(never, never).any()


def test_kl_divergence_of_tokens_that_are_never_chosen():
    base, other, unmasked = LOGITS.clone(), OTHER.clone(), OTHER.clone()
    base[..., 4] = other[..., 4] = -torch.inf
    found = kl_divergence(base, other)
    rest = [token for token in range(11) if token != 4]
    torch.testing.assert_close(found, kl_divergence(LOGITS[..., rest], OTHER[..., rest]))
    # The other gives the token some of its mass, or it alone never chooses a token.
    for i, j in each_position():
        p, q = softmax(LOGITS[i, j, rest].tolist()), softmax(unmasked[i, j].tolist())
        expected = math.fsum(a * math.log(a / q[token]) for a, token in zip(p, rest, strict=True))
        assert float(kl_divergence(base, unmasked)[i, j]) == pytest.approx(expected, rel=1e-4)
    assert bool((kl_divergence(LOGITS, other) == torch.inf).all())
