"""The kernels as layers: what stands in a model in place of a torch.nn.Linear.

None of them is a subclass of it: code that takes a Linear for one multiplies by its `weight` as it is, which is
not what these layers compute.
"""

from dtm_fast.nn.int8_linear import Int8Linear
from dtm_fast.nn.masked_linear import MaskedLinear
from dtm_fast.nn.sparse_linear import SparseLinear

__all__ = ["Int8Linear", "MaskedLinear", "SparseLinear"]
