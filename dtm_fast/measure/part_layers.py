"""What reading completions in parts needs of layers, whoever computes them, and of a head."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from dtm_fast.compression import Configuration
from dtm_fast.measure.head import Decisions
from dtm_fast.model import Decoder
from dtm_fast.ops.layer_weights import Arithmetic, LayerShape


class PartLayers(Protocol):
    """Layers that run on some of the probes and some of their positions, each part behind the one before.

    The base is the model as it is, or one of its configurations. A state is a tensor [R, T, hidden] for R of the
    probes; None is the base's own.
    """

    decoder: Decoder
    depth: int
    count: int
    """Of probes."""
    positions: int
    shape: LayerShape
    exact: Arithmetic
    treatments: Mapping[int, Configuration]
    """What the base has of them, by layer."""
    shares_parts: bool
    """Whether a row's bits depend on no other row and on no cut, so that configurations may share what they can."""

    @property
    def arithmetic(self) -> Arithmetic:
        """The fastest one."""
        ...

    @property
    def finer(self) -> tuple[Arithmetic, ...]:
        """What settles doubts that the fastest one leaves, one after the other; the last is exact."""
        ...

    def shares(self, has_referee: bool) -> Sequence[float]:
        """In which parts to read a completion: the end of each, as a share of it."""
        ...

    def base(self, layer: int, rows: Sequence[int], first: int = 0, end: int | None = None) -> Tensor:
        """The base's residual stream before ``layer``, [R, T, hidden]."""
        ...

    def can_run_in_parts(self, treatments: Configuration) -> bool:
        """Whether a layer with these treatments can be run on some of the positions."""
        ...

    def largest_change(self, by_layer: Mapping[int, Configuration]) -> float:
        """``max(‖W' - W‖ / ‖W‖)`` over the weights whose treatment is another than the base's; 0 if there is none."""
        ...

    def run(
        self,
        layer: int,
        treatments: Configuration,
        x: Tensor | None,
        arithmetic: Arithmetic,
        rows: Sequence[int],
        first: int = 0,
        end: int | None = None,
        first_output: int = 0,
        lengths: Sequence[int] | None = None,
        kv: Tensor | None = None,
    ) -> Tensor:
        """The state after a layer; arguments as ``FusedLayers.run``."""
        ...

    def head_input(
        self, state: Tensor | None, arithmetic: Arithmetic, rows: Sequence[int], first: int, end: int
    ) -> Tensor:
        """What the head multiplies: the final norm of a state of positions first .. end - 1."""
        ...

    def new_kv(self, rows: int) -> Tensor:
        """Room for the keys and values of so many rows, for layers that leave doubts."""
        ...

    def states_given_up(self) -> Sequence[Any]:
        """Its states within the layers, for others to write to; it cannot run any more."""
        ...


class PartHead(Protocol):
    """Decides what probes choose; methods as those of ``Head``."""

    @property
    def base_divergence(self) -> list[int]:
        """The first position of each completion where the base chooses another token; N where there is none."""
        ...

    def decide(
        self,
        hidden: Tensor,
        rows: Sequence[int],
        first: int,
        error: float = 0.0,
        until_mismatch: bool = False,
    ) -> Decisions:
        """What probes ``rows`` choose at positions ``first`` … of their completions."""
        ...

    def decide_at(
        self, hidden: Tensor, rows: Sequence[int], positions: Sequence[int], errors: Sequence[float]
    ) -> Decisions:
        """As ``decide``, with a probe, a position of its completion and an error for each hidden state."""
        ...
