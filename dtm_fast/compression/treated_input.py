"""A layer that treats its input, for treatments that no kernel computes."""

from torch import Tensor, nn

from dtm_fast.compression.treatment import Treatment


class TreatedInput(nn.Module):
    """``linear(treatment.compress_input(x))``: what the treatment is measured with, and not faster.

    ``computes_with`` is what ``model_identity`` knows of it beside its weights.

    Args:
        linear: multiplies by the compressed weight.
        treatment: of the input.
    """

    def __init__(self, linear: nn.Module, treatment: Treatment) -> None:
        """See the class."""
        super().__init__()
        self.linear = linear
        self.treatment = treatment
        self.computes_with = treatment.key

    def extra_repr(self) -> str:
        """The treatment's key."""
        return self.treatment.key

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        output: Tensor = self.linear(self.treatment.compress_input(x))
        return output
