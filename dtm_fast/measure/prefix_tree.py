"""Configurations as a tree over the layers: what two of them share up to a layer is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from dtm_fast.compression import Configuration, Name, Treatment, name_of
from dtm_fast.errors import MeasurementError
from dtm_fast.model import Decoder

_State = TypeVar("_State")


@dataclass(eq=False)
class Node:
    """The state of the model between two layers, for all configurations that agree on the layers below.

    Attributes:
        layer: how many layers have run; 0 at the root, all of them at a leaf.
        treatments: what is done to the components of the layer that leads here, number ``layer - 1``.
        is_base: whether the layers below are treated as the base's: its state is the base's.
        children: the nodes one layer on.
        ends: indices of the configurations whose last state this is; only a leaf has any.
        size: the leaves below, itself included.
    """

    layer: int
    treatments: Configuration
    is_base: bool
    children: dict[Name, Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    size: int = 1

    def computed(self) -> Iterator[Node]:
        """Every node below whose state has to be computed: one layer evaluation each."""
        return (node for node in _top_down(self) if not node.is_base and node is not self)

    def chain(self) -> list[Node]:
        """A node that has a single leaf, and those below, down to it."""
        found = [self]
        node = self
        while node.children:
            (node,) = node.children.values()
            found.append(node)
        return found


def tree_of(
    decoder: Decoder, configurations: Sequence[Configuration], base: Mapping[int, Configuration] = {}
) -> Node:
    """The root of the tree of ``configurations``, which must fit the decoder; ``base``: as ``layers_of`` gives it."""
    depth = len(decoder.layers)
    root = Node(0, {}, True)
    for index, configuration in enumerate(configurations):
        by_layer = layers_of(decoder, configuration)
        node = root
        for layer in range(depth):
            treatments = by_layer.get(layer, {})
            key = name_of(treatments)
            if key not in node.children:
                is_base = node.is_base and key == name_of(base.get(layer, {}))
                node.children[key] = Node(layer + 1, treatments, is_base)
            node = node.children[key]
        node.ends.append(index)
    for node in reversed(list(_top_down(root))):
        node.size = sum(child.size for child in node.children.values()) or 1
    return root


def first_difference(a: Mapping[int, Configuration], b: Mapping[int, Configuration], depth: int) -> int:
    """The first layer that is treated differently, or ``depth``; both as ``layers_of`` gives them."""
    differing = (layer for layer in range(depth) if name_of(a.get(layer, {})) != name_of(b.get(layer, {})))
    return next(differing, depth)


def layers_of(decoder: Decoder, configuration: Configuration) -> dict[int, dict[str, Treatment]]:
    """The treatments of each layer that has any."""
    by_layer: dict[int, dict[str, Treatment]] = {}
    for path, treatment in configuration.items():
        by_layer.setdefault(decoder.component(path).layer, {})[path] = treatment
    return by_layer


def walk(
    node: Node,
    state: _State | MeasurementError | None,
    advance: Callable[[Node, _State | None], _State],
    *,
    stop_at_chains: bool = False,
) -> Iterator[tuple[Node, _State | MeasurementError | None]]:
    """Every leaf with its state, each computed once; few are held at a time.

    Where ``advance`` raises a MeasurementError, that is the state of all leaves below.

    Args:
        node: where to begin.
        state: there; None is the base's, which is never computed.
        advance: the state of a node from that of its parent.
        stop_at_chains: hand over the first node in which no other configuration takes part, with the state of its
            parent, instead of the leaf: what is left is a ``chain`` of its own.
    """
    if not node.children and not node.ends:
        return  # the tree of no configurations

    def next_of(child: Node) -> _State | MeasurementError | None:
        if isinstance(state, MeasurementError):
            return state
        try:
            return None if child.is_base else advance(child, state)
        except MeasurementError as failure:
            return failure.with_traceback(None)  # whose frames hold tensors

    while node.children:
        # The child with the most leaves comes last: its parent's state is not needed any more.
        *others, largest = sorted(node.children.values(), key=lambda child: child.size)
        for child in others:
            if stop_at_chains and child.size == 1:
                yield child, state
            else:
                # No name holds the child's state, so that it goes as soon as that of its own child is there.
                yield from walk(child, next_of(child), advance, stop_at_chains=stop_at_chains)
        if stop_at_chains and largest.size == 1:
            yield largest, state
            return
        state = next_of(largest)
        node = largest
    yield node, state


def _top_down(root: Node) -> Iterator[Node]:
    """Every node after its parent; without recursion, for a model may have more layers than Python has levels."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.children.values()
