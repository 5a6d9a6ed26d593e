"""The fast evaluator against the reference on SmolLM2; `make test-evaluator` does it for 2,000 configurations."""

import itertools
import os
import random
from collections.abc import Callable

import pytest
import torch

import dtm_fast as dtm
from dtm_fast.compression import Configuration

CONFIGURATIONS = int(os.environ.get("DTM_FAST_CONFIGURATIONS", "100"))
TREATMENTS = (dtm.Int8(), dtm.Prune(0.25), dtm.Prune(0.5))

pytestmark = [pytest.mark.model, pytest.mark.timeout(60 + 10 * CONFIGURATIONS)]


@pytest.fixture
def compress_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight is compressed once and not for every configuration: half of the test's time."""
    for kind in (dtm.Int8, dtm.Prune):
        known: dict[tuple[int, str], torch.Tensor] = {}

        def compress(
            self, weight, inputs=None, plain: Callable = kind.compress, known: dict = known
        ) -> torch.Tensor:
            key = (weight.data_ptr(), self.key)
            if key not in known:
                known[key] = plain(self, weight)
            return known[key]

        monkeypatch.setattr(kind, "compress", compress)


def drawn(paths: list[str], count: int, most: int, seed: int) -> list[Configuration]:
    draw = random.Random(seed)
    return [
        {path: draw.choice(TREATMENTS) for path in draw.sample(paths, draw.randint(1, most))}
        for _ in range(count)
    ]


@pytest.mark.long
def test_random_configurations_measure_as_by_the_reference(smollm2, compress_once, capsys):
    model, tokenizer = smollm2
    probes = dtm.Probes.from_text(model, tokenizer, dtm.read_documents(), 12, 24, 3)
    paths = dtm.components(model)
    large = CONFIGURATIONS * 3 // 10
    configurations = drawn(paths, large, 150, 1) + drawn(paths, CONFIGURATIONS - large, 8, 2)
    evaluator, reference = dtm.Evaluator(model, probes), dtm.ReferenceEvaluator(model, probes)
    first = evaluator.measure(configurations[::2], ())  # up to the first divergence
    complete = evaluator.measure(configurations[1::2])  # to the end, with SDT
    fasts = [each for pair in itertools.zip_longest(first, complete) for each in pair if each is not None]
    floor = evaluator.floor.margin
    ties, beyond, met = 0, [], set()
    expected = reference.iterate(configurations, ())
    for number, (fast, plain) in enumerate(zip(fasts, expected, strict=True)):
        differs = fast.fdt != plain.fdt
        earliest = torch.minimum(fast.fdt, plain.fdt)
        for probe in differs.nonzero()[:, 0].tolist():
            margins = [float(m.first_margin[probe]) for m in (fast, plain) if m.fdt[probe] == earliest[probe]]
            ties += min(margins) <= floor
            if min(margins) > floor:
                beyond.append((number, probe, fast.fdt[probe], plain.fdt[probe], margins))
        # A tie within SDT shows as one token more or less where the FDT is the same.
        if fast.sdt is not None and not torch.equal(fast.sdt, plain.sdt) and not bool(differs.any()):
            beyond.append((number, "SDT", fast.sdt.tolist(), plain.sdt.tolist()))
        met |= set(plain.fdt.tolist())
    with capsys.disabled():
        print(
            f"\n{len(configurations)} configurations of {len(probes)} probes, {evaluator.engine}: "
            f"{ties} ties within the floor of {floor:.2g} logits, {len(beyond)} differences beyond it"
        )
    assert not beyond
    assert len(met) > 20


def test_the_best_of_a_sweep_by_racing(smollm2):
    model, tokenizer = smollm2
    probes = dtm.Probes.from_text(model, tokenizer, dtm.read_documents(), 16, 16, 8)
    evaluator = dtm.Evaluator(model, probes)
    if evaluator.engine.startswith("transformers"):
        pytest.skip(f"a race needs fused layers; here run {evaluator.engine}")
    candidates = [{path: dtm.Prune(0.5)} for path in dtm.components(model)[::6]]
    measured = {tuple(m.configuration): m.summary("fdt").p75 for m in evaluator.measure(candidates, ())}
    ranked = sorted(measured, key=lambda path: (-measured[path], path))
    race = evaluator.best(candidates, 5)
    assert [tuple(m.configuration) for m in race.best] == ranked[:5]


def test_in_256_mib_the_answers_are_the_same(smollm2):
    model, tokenizer = smollm2
    probes = dtm.Probes.from_text(model, tokenizer, dtm.read_documents(), 48, 32, 8)
    tight, free = (dtm.Evaluator(model, probes, memory=memory) for memory in (256 * 2**20, None))
    if tight.engine.startswith("transformers"):
        pytest.skip(f"only fused layers keep states within the layers; here run {tight.engine}")
    assert 0 < len(tight._layers._inner) < tight._layers.depth  # what is kept within the layers
    configurations = drawn(dtm.components(model), 2, 100, 3) + drawn(dtm.components(model), 4, 2, 4)
    for ours, other in zip(tight.measure(configurations, ()), free.measure(configurations, ()), strict=True):
        assert ours.fdt.tolist() == other.fdt.tolist()
