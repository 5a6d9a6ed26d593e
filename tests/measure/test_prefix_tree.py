"""The walk over the tree computes what configurations share once, and nothing of the base."""

import math
import random
import weakref
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtm_fast.measure.prefix_tree import Node, layers_of, tree_of, walk

pytestmark = pytest.mark.once

State = tuple[str, ...]
"""What each layer that has run was made of, in words."""


@dataclass(frozen=True)
class Named:
    """As much of a treatment as the tree looks at."""

    key: str


def decoder_of(depth: int) -> SimpleNamespace:
    """Components are called layer.name."""
    return SimpleNamespace(
        layers=tuple(range(depth)),
        component=lambda path: SimpleNamespace(layer=int(path.partition(".")[0])),
    )


def word(treatments) -> str:
    return " ".join(f"{path}={treatment.key}" for path, treatment in sorted(treatments.items()))


def states_of(configuration, depth: int) -> list[State]:
    """The states before each layer and after the last, a layer at a time."""
    found: list[State] = [()]
    for layer in range(depth):
        here = {p: t for p, t in configuration.items() if int(p.partition(".")[0]) == layer}
        found.append((*found[-1], word(here)))
    return found


def is_base(state: State) -> bool:
    return not any(state)


def advance_in_words(node: Node, state: State | None) -> State:
    before = ("",) * (node.layer - 1) if state is None else state
    assert len(before) == node.layer - 1
    return (*before, word(node.treatments))


def walked(depth, configurations, **options):
    """The nodes and states that the walk hands over, and each state that it computed."""
    computed = []

    def advance(node: Node, state: State | None) -> State:
        computed.append(advance_in_words(node, state))
        return computed[-1]

    return list(walk(tree_of(decoder_of(depth), configurations), None, advance, **options)), computed


@st.composite
def cases(draw):
    depth = draw(st.integers(1, 6))
    paths = st.tuples(st.integers(0, depth - 1), st.sampled_from("qvo")).map(
        lambda each: f"{each[0]}.{each[1]}"
    )
    configuration = st.dictionaries(paths, st.sampled_from("ab").map(Named), max_size=4)
    return depth, draw(st.lists(configuration, max_size=12))


def as_one(configuration) -> frozenset:
    return frozenset(configuration.items())


@given(cases())
def test_every_leaf_is_visited_once_with_the_state_of_its_layers_run_one_by_one(case):
    depth, configurations = case
    found, _ = walked(depth, configurations)
    assert sorted(i for leaf, _ in found for i in leaf.ends) == list(range(len(configurations)))
    for leaf, state in found:
        assert (leaf.layer, leaf.children, leaf.size) == (depth, {}, 1)
        assert len({as_one(configurations[i]) for i in leaf.ends}) == 1
        expected = states_of(configurations[leaf.ends[0]], depth)[-1]
        assert (state is None) == leaf.is_base == is_base(expected)
        assert state is None or state == expected


@given(cases())
def test_equal_configurations_end_in_one_leaf(case):
    depth, configurations = case
    found, _ = walked(depth, configurations)
    assert len(found) == len({as_one(each) for each in configurations})
    assert tree_of(decoder_of(depth), configurations).size == max(len(found), 1)


@given(cases())
def test_each_edge_that_is_not_the_bases_is_computed_exactly_once(case):
    depth, configurations = case
    _, computed = walked(depth, configurations)
    edges = {state for each in configurations for state in states_of(each, depth)[1:] if not is_base(state)}
    assert Counter(computed) == dict.fromkeys(edges, 1)
    assert len(list(tree_of(decoder_of(depth), configurations).computed())) == len(edges)


@given(cases())
def test_chains_are_handed_over_as_soon_as_no_other_configuration_takes_part(case):
    depth, configurations = case
    found, computed = walked(depth, configurations, stop_at_chains=True)
    different = {as_one(each): states_of(each, depth) for each in configurations}.values()
    sharing = Counter(state for states in different for state in states)
    for node, state in found:
        chain = node.chain()
        assert [each.layer for each in chain] == list(range(node.layer, depth + 1))
        expected = states_of(configurations[chain[-1].ends[0]], depth)
        before = expected[node.layer - 1]
        assert (state is None) == is_base(before)
        assert state is None or state == before
        assert sharing[expected[node.layer]] == 1
        assert node.layer == 1 or sharing[before] > 1
        for each in chain:
            state = None if each.is_base else advance_in_words(each, state)
        assert state is None or state == expected[-1]
    # Computed is what several share.
    edges = {s for states in different for s in states[1:] if not is_base(s) and sharing[s] > 1}
    assert Counter(computed) == dict.fromkeys(edges, 1)


@given(cases())
def test_every_configuration_is_handed_over_in_either_way(case):
    depth, configurations = case
    found, _ = walked(depth, configurations, stop_at_chains=True)
    ends = [i for node, _ in found for i in node.chain()[-1].ends]
    assert sorted(ends) == list(range(len(configurations)))


@pytest.mark.parametrize("stop_at_chains", [False, True])
def test_no_configurations_give_nothing(stop_at_chains):
    assert walked(3, [], stop_at_chains=stop_at_chains) == ([], [])


def test_the_base_is_a_leaf_of_which_nothing_is_computed():
    ((leaf, state),), computed = walked(3, [{}, {}])
    assert (leaf.ends, leaf.is_base, state, computed) == ([0, 1], True, None, [])


def test_a_single_configuration_is_handed_over_whole():
    ((node, state),), computed = walked(4, [{"2.q": Named("a")}], stop_at_chains=True)
    assert (node.layer, state, computed) == (1, None, [])
    assert [each.is_base for each in node.chain()] == [True, True, False, False]


def test_the_order_in_which_a_configuration_names_its_components_does_not_matter():
    a, b = Named("a"), Named("b")
    found, _ = walked(3, [{"1.q": a, "1.v": b, "2.q": b}, {"2.q": b, "1.v": b, "1.q": Named("a")}])
    assert [leaf.ends for leaf, _ in found] == [[0, 1]]


def test_a_node_knows_what_is_done_in_the_layer_that_leads_to_it():
    configuration = {"1.q": Named("a"), "1.v": Named("b"), "3.q": Named("a")}
    root = tree_of(decoder_of(4), [configuration])
    assert (root.treatments, root.layer, root.is_base) == ({}, 0, True)
    assert [each.treatments for each in root.chain()[1:]] == [
        {},
        {"1.q": Named("a"), "1.v": Named("b")},
        {},
        {"3.q": Named("a")},
    ]
    assert layers_of(decoder_of(4), configuration) == {
        1: {"1.q": Named("a"), "1.v": Named("b")},
        3: {"3.q": Named("a")},
    }


class Counted:
    """A state that is counted while it lives."""


def most_alive(depth: int, configurations, **options) -> int:
    alive: weakref.WeakSet[Counted] = weakref.WeakSet()
    most = 0

    def advance(node: Node, state: Counted | None) -> Counted:
        nonlocal most
        new = Counted()
        alive.add(new)
        most = max(most, len(alive))
        return new

    for _ in walk(tree_of(decoder_of(depth), configurations), None, advance, **options):
        pass
    return most


@pytest.mark.parametrize("stop_at_chains", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_on_a_caterpillar_no_more_than_four_states_are_alive(stop_at_chains, backwards):
    depth = 60
    spine = [{f"{layer}.q": Named("a") for layer in range(length)} for length in range(1, depth)]
    legs = [each | {f"{len(each)}.q": Named("b")} for each in spine]
    configurations = legs[::-1] if backwards else legs
    # Where the leg leaves, before and after the layer that runs, and the one that the caller was handed last.
    assert most_alive(depth, configurations, stop_at_chains=stop_at_chains) <= 4


@given(cases())
def test_the_states_alive_grow_with_the_logarithm_of_the_leaves(case):
    depth, configurations = case
    leaves = max(1, len({as_one(each) for each in configurations}))
    assert most_alive(depth, configurations) <= math.floor(math.log2(leaves)) + 3


@pytest.mark.parametrize("stop_at_chains", [False, True])
def test_a_model_may_have_more_layers_than_python_has_levels(stop_at_chains):
    depth, draw = 2000, random.Random(0)
    configurations = [
        {f"{draw.randrange(depth)}.q": Named(draw.choice("ab")) for _ in range(3)} for _ in range(8)
    ]
    configurations.append({f"{layer}.q": Named("a") for layer in range(depth)})
    configurations.append(configurations[-1] | {"1999.q": Named("b")})

    def advance(node: Node, state: int | None) -> int:
        return 1 if state is None else state + 1

    root = tree_of(decoder_of(depth), configurations)
    seen = []
    for node, state in walk(root, None, advance, stop_at_chains=stop_at_chains):
        chain = node.chain()
        (index,) = chain[-1].ends
        for each in chain if stop_at_chains else []:
            state = None if each.is_base else advance(each, state)
        seen.append(index)
        # From its first treated layer on, each layer has run once.
        assert state == depth - min(int(path.partition(".")[0]) for path in configurations[index])
    assert sorted(seen) == list(range(10))
    assert root.size == 10
