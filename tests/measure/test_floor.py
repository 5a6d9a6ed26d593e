import pytest
import tiny
import torch

from dtm_fast.measure import self_divergence
from dtm_fast.measure.floor import Floor

pytestmark = pytest.mark.once


def test_a_tiny_float32_model_never_leaves_its_own_text(family, make_probes):
    model = tiny.model_of(family)
    floor = self_divergence(model, make_probes(model))
    assert (floor.divergent, floor.positions, floor.corrected, floor.fdt) == (0, 4 * 12, 0, 12.0)
    assert floor.margin < 1e-4


@pytest.mark.parametrize(
    ("batch_size", "count", "usual", "other"), [(8, 4, 4, 1), (2, 4, 2, 1), (1, 4, 1, 2), (8, 1, 1, 2)]
)
def test_the_other_batch_shape_is_another(llama, make_probes, batch_size, count, usual, other):
    floor = self_divergence(llama, make_probes(llama, count, batch_size=batch_size))
    assert (floor.batch_size, floor.other_batch_size, floor.positions) == (usual, other, count * 12)


def noisy_when(model, monkeypatch, noisy) -> None:
    """Gives the model another choice wherever the batch size is ``noisy``."""
    plain = model.forward

    def forward(input_ids, **arguments):
        output = plain(input_ids=input_ids, **arguments)
        if noisy(input_ids.shape[0]):
            output.logits = -output.logits
        return output

    monkeypatch.setattr(model, "forward", forward)


@pytest.mark.parametrize("at", [1, 4])
def test_a_base_that_reads_otherwise_at_a_batch_size_has_a_floor(llama, make_probes, monkeypatch, at):
    probes = make_probes(llama)
    noisy_when(llama, monkeypatch, lambda rows: rows == at)
    floor = self_divergence(llama, probes)
    assert floor.divergent == floor.positions
    assert floor.fdt == 0
    assert floor.margin > 1


def test_its_fdt_is_that_of_the_base_at_the_other_batch_size(llama, make_probes, monkeypatch):
    probes, plain = make_probes(llama), llama.forward
    first = probes.tokens[:, 0]

    def forward(input_ids, **arguments):
        output = plain(input_ids=input_ids, **arguments)
        if input_ids.shape[0] == 1 and input_ids[0, 0] == first[2]:
            output.logits[:, 5:] *= -1  # of those asked for: the sixth token of the completion
        return output

    monkeypatch.setattr(llama, "forward", forward)
    alike = int((first == first[2]).sum())
    floor = self_divergence(llama, probes)
    assert floor.fdt == (12 * (4 - alike) + 5 * alike) / 4


def test_a_position_that_diverges_at_both_batch_sizes_counts_once(llama, make_probes, monkeypatch):
    probes = make_probes(llama)
    noisy_when(llama, monkeypatch, lambda rows: True)
    floor = self_divergence(llama, probes)
    assert floor.divergent == floor.positions
    assert floor.margin < 1e-4  # both batch sizes agree with each other


def test_a_margin_that_moves_without_a_divergence_is_seen(llama, make_probes, monkeypatch):
    probes, plain = make_probes(llama), llama.forward

    def forward(input_ids, **arguments):
        output = plain(input_ids=input_ids, **arguments)
        if input_ids.shape[0] == 1:
            output.logits = output.logits * 1.5  # every lead is larger by half, no choice is another
        return output

    monkeypatch.setattr(llama, "forward", forward)
    floor = self_divergence(llama, probes)
    assert floor.divergent == 0
    assert floor.margin == pytest.approx(float(probes.margins.max()) / 2, rel=1e-4)


def test_corrections_are_handed_on(llama, make_probes):
    probes = make_probes(llama)
    object.__setattr__(probes, "corrected", 3)
    assert self_divergence(llama, probes) == Floor(0, 48, pytest.approx(0, abs=1e-4), 4, 1, 3, 12.0)


def test_the_weights_stay_as_they_are(llama, make_probes):
    before = [p.clone() for p in llama.parameters()]
    self_divergence(llama, make_probes(llama))
    assert all(torch.equal(a, b) for a, b in zip(before, llama.parameters(), strict=True))
