"""What a search may do to units, and how large that is."""

from types import SimpleNamespace

import pytest

from dtm_fast import Int8, Prune
from dtm_fast.compression import configuration_bits, effective_bits
from dtm_fast.errors import InputError
from dtm_fast.plan.options import Options

SHAPES = {"a": (4, 8), "b": (2, 8), "c": (2, 16)}


def decoder(shapes=SHAPES):
    components = {path: SimpleNamespace(shape=(n, k), numel=n * k) for path, (n, k) in shapes.items()}
    return SimpleNamespace(components=components, component=components.__getitem__)


TREATMENTS = (Int8(), Prune(0.5))


def options(units=(("a", "b"), ("c",)), treatments=TREATMENTS) -> Options:
    return Options(decoder(), treatments, units)


def test_sizes_by_hand():
    """int8: 8 for a weight, 32 for a row's scale; half pruned: a bit for each weight and 16 for every second one."""
    assert configuration_bits(SHAPES, {}) == 16 * (32 + 16 + 32)
    assert configuration_bits(SHAPES, {"a": Int8()}) == (8 * 32 + 32 * 4) + 16 * 48
    assert configuration_bits(SHAPES, {"c": Prune(0.5)}) == 16 * 48 + (32 + 16 * 16)
    assert effective_bits(SHAPES, {}) == 16
    assert effective_bits(SHAPES, {"a": Prune(1.0), "b": Prune(1.0), "c": Prune(1.0)}) == 1
    assert configuration_bits(SHAPES, {"a": Prune(0.0)}) == configuration_bits(SHAPES, {}), (
        "no mask where none is needed"
    )


def test_a_units_size_is_that_of_its_components():
    found = options()
    assert found.bits(("a", "b"), None) == 16 * 48
    assert found.bits(("a", "b"), Int8()) == 8 * 48 + 32 * 6


def test_a_budget_leaves_what_stands_outside_of_the_units_as_it_is():
    found = options(units=(("a",),))
    assert found.limit(16) == 16 * 80 - 16 * 48
    with pytest.raises(InputError, match=r"budget: 10 effective bits cannot be reached; .* reach is 13\.2$"):
        found.limit(10)  # a at half: 32 + 256 bits, and 768 for the others: 1056 / 80
    assert found.limit(13.2) == 288


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), -1.0, 16.1, 1e305])
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(InputError, match="budget: 0 to 16 effective bits, those of the model as it is, not"):
        options().limit(budget)


def test_a_budget_that_cannot_be_reached_is_refused():
    with pytest.raises(InputError, match="cannot be reached; the smallest that these treatments reach is"):
        options().limit(0.0)


def test_the_named_smallest_budget_can_be_reached():
    found = options()
    with pytest.raises(InputError) as refused:
        found.limit(1.0)
    least = float(str(refused.value).rsplit(" ", 1)[1])
    chosen = found.least_harmful(found.limit(least), lambda unit, choice: 0.0 if choice is None else 1.0)
    assert set(chosen) == set(SHAPES)


def test_every_unit_alone_and_assembled():
    found = options()
    assert found.alone() == [
        {"a": Int8(), "b": Int8()},
        {"a": Prune(0.5), "b": Prune(0.5)},
        {"c": Int8()},
        {"c": Prune(0.5)},
    ]
    assert found.assembled([None, Int8()]) == {"c": Int8()}
    assert found.assembled([Prune(0.5), None]) == {"a": Prune(0.5), "b": Prune(0.5)}


def test_neighbours_are_the_next_smaller_and_larger():
    found = Options(decoder(), [Prune(0.3), Int8(), Prune(0.7)], [("c",)])
    assert found.neighbours(("c",), None) == [None, Prune(0.3)]
    assert found.neighbours(("c",), Int8()) == [Int8(), Prune(0.7), Prune(0.3)]
    assert found.neighbours(("c",), Prune(0.7)) == [Prune(0.7), Int8()]


def test_equal_treatments_count_once_and_none_is_refused():
    assert options(treatments=[Int8(), Int8()]).choices == [None, Int8()]
    with pytest.raises(InputError, match="treatments: at least one"):
        options(treatments=[])


@pytest.mark.parametrize("rows", range(3, 40, 4))
def test_the_named_smallest_budget_is_rounded_up(rows):
    found = Options(decoder({"a": (rows, 7), "b": (11, 13)}), [Int8()], [("a",)])
    with pytest.raises(InputError) as refused:
        found.limit(1.0)
    found.limit(float(str(refused.value).rsplit(" ", 1)[1]))
