"""What the kernels that multiply matrices share: the order in which they go through the tiles of the result."""

import triton
import triton.language as tl


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """The tile of a program: bands of GROUP rows of tiles, column by column within a band.

    Programs that run at the same time then share rows and columns of the operands in the L2 cache.
    """
    band = program // (GROUP * tiles_n)
    within = program % (GROUP * tiles_n)
    first = band * GROUP
    height = min(tiles_m - first, GROUP)
    return first + within % height, within // height
