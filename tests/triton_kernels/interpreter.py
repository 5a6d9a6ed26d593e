"""A pytest plugin: Triton's interpreter in place of a GPU, for a process that was started with TRITON_INTERPRET=1."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

assert triton.knobs.runtime.interpret


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


def _as_float32(handle: interpreter.TensorHandle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _mend_bfloat16() -> None:
    """The interpreter (of Triton 3.6 to 3.8) keeps bfloat16 as the whole numbers that its bits are.

    It multiplies them as such, and rounds float32 to it by cutting bits off: hardware does neither.
    """
    builder = interpreter.InterpreterBuilder
    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def create_dot(self, a, b, d, *options):
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, d, *options)
        return interpreter.TensorHandle(_as_float32(a) @ _as_float32(b) + d.data, d.dtype.scalar)

    def rounded(source, to, otherwise):
        if source.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
            return interpreter.TensorHandle(_as_float32(source), tl.float32)
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            values = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(values, tl.bfloat16)
        return otherwise()

    builder.create_dot = create_dot
    builder.cast_impl = lambda self, x, to: rounded(x, to, lambda: cast(self, x, to))
    builder.create_fp_to_fp = lambda self, x, to, mode: rounded(x, to, lambda: convert(self, x, to, mode))


def _mend_bounds() -> None:
    """Triton 3.6 makes an int of an array of one element, which numpy 2.4 refuses: no range() would run."""
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


_mend_bfloat16()
_mend_bounds()
# Infinity minus infinity and the like are what some cases are about.
np.seterr(all="ignore")
