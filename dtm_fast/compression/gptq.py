"""Weights to int4 by GPTQ."""

from dataclasses import dataclass

from torch import Tensor

from dtm_fast.compression.int4 import Grid, Int4
from dtm_fast.compression.optimal_brain_surgeon import Settle, check_damp, compensated
from dtm_fast.model import InputStatistics
from dtm_fast.ops import checks


@dataclass(frozen=True)
class GPTQ(Int4):
    """Weights to int4 on the grid of ``Int4``, column after column, the later ones making up for each one's error.

    A group's scale and zero point are of its weights as they are when it begins, changed by all columns before it.
    Columns are taken as they stand (no act-order).

    The inputs are the base model's, so that a component's weight depends on nothing else that is compressed. GPTQ's own
    script goes layer by layer, and takes the inputs that come out of the layers it has quantized before.

    Args:
        group: as of ``Int4``.
        damp: what is added to the diagonal of XᵀX, as a share of its mean.

    Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    section 3.3 and algorithm 1 (papers.md §1.7).
    """

    is_slow = True

    damp: float = 0.01

    def __post_init__(self) -> None:
        """Refuses a group or a damp that is none."""
        super().__post_init__()
        check_damp("GPTQ", self.damp)

    @property
    def key(self) -> str:
        """``gptq(128)``, or ``gptq(128,damp=0.1)`` where damp is not 0.01."""
        damp = "" if self.damp == 0.01 else f",damp={float(self.damp)!r}"
        return f"gptq({self._group_name}{damp})"

    @property
    def needs_inputs(self) -> bool:
        """True."""
        return True

    def compress(self, weight: Tensor, inputs: InputStatistics | None = None) -> Tensor:
        """The weight on the grids of its groups.

        Raises:
            TreatmentError: K is no multiple of the group, there are no inputs, or XᵀX has no Cholesky factor.
            ValueError: the weight holds a NaN or an infinity.
        """
        self.check_shape(*weight.shape)
        given = self.inputs_for(weight, inputs)
        checks.finite("weight", weight)

        def decide(first: int, columns: Tensor, diagonal: Tensor) -> Settle:
            grid = Grid.of(columns, dim=0)
            return lambda place, column: grid.nearest(column)[0]

        return compensated(weight, given, self.damp, self.group or weight.shape[1], decide)
