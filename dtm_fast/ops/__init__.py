"""The operations: each checks its arguments, ships its reference twin, and chooses a backend."""

from dtm_fast.ops.apply_mask import apply_mask
from dtm_fast.ops.backend_info import backend_info
from dtm_fast.ops.bitmap_linear import bitmap_linear
from dtm_fast.ops.bitmap_weight import BitmapWeight
from dtm_fast.ops.certificate import Certificate
from dtm_fast.ops.int8_linear import int8_linear
from dtm_fast.ops.mask_bits import pack_mask, unpack_mask
from dtm_fast.ops.masked_linear import masked_linear
from dtm_fast.ops.quantize_int8 import quantize_int8
from dtm_fast.ops.sparse_linear import sparse_linear
from dtm_fast.ops.sparse_weight import SparseWeight
from dtm_fast.ops.token_divergence import CertifiedDivergence, Divergence, token_divergence

__all__ = [
    "BitmapWeight",
    "Certificate",
    "CertifiedDivergence",
    "Divergence",
    "SparseWeight",
    "apply_mask",
    "backend_info",
    "bitmap_linear",
    "int8_linear",
    "masked_linear",
    "pack_mask",
    "quantize_int8",
    "sparse_linear",
    "token_divergence",
    "unpack_mask",
]
