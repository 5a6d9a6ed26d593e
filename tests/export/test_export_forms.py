"""Packing and configs beside those of compressed-tensors itself."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from dtm_fast.export.forms import pack, unpack

pytestmark = pytest.mark.once


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 7), (11, 123), (4, 128)])
def test_packing_is_that_of_compressed_tensors(shape):
    quantized = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    quantized[0, 0], quantized[-1, -1] = -128, 127
    packed = pack(quantized)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, pack_to_int32(quantized, 8))
    assert torch.equal(unpack(packed, shape[1]), quantized)
    assert torch.equal(unpack_from_int32(packed, 8, torch.Size(shape)), quantized)


def test_a_row_by_hand():
    # + 128: 129, 0, 128, 255 and 126 with three zeros beyond it; the first in the lowest byte.
    packed = pack(torch.tensor([[1, -128, 0, 127, -2]], dtype=torch.int8))
    first = 129 + (0 << 8) + (128 << 16) + (255 << 24) - 2**32
    assert packed.tolist() == [[first, 126]]
