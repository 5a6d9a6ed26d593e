"""The operators of torch.ops.dtm_fast: what torch.compile and torch.jit.trace see instead of the Python functions."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("dtm_fast", "FRAGMENT")
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_DERIVATIVES = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)


def is_recorded(*tensors: object) -> bool:
    """Whether an operation on these must go through its operator, because native code would not be seen or has no data.

    That is so while torch.compile or torch.jit.trace records what runs, under what stands between operations and their
    kernels (fake tensors, make_fx, torch.func), and for tensors on the meta device or of subclasses.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    for each in tensors:  # noqa: SIM110 (a generator takes as long as all the rest)
        if isinstance(each, torch.Tensor) and (type(each) not in _PLAIN or each.is_meta):
            return True
    return False


def is_differentiated() -> bool:
    """Whether torch.func takes derivatives of what runs, which no backward of an operator serves."""
    if torch.compiler.is_compiling():
        return False
    transform = torch._C._functorch.peek_interpreter_stack()
    return transform is not None and transform.key() in _DERIVATIVES


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define torch.ops.dtm_fast.<name> by its schema, its implementation for every device, and its shapes.

    define/impl, not custom_op: half the time per call. `fake` gets tensors without data and returns such.
    `setup_context` and `backward` are those of torch.library.register_autograd, for an operator with gradients.
    """
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dtm_fast::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"dtm_fast::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
    return getattr(torch.ops.dtm_fast, name).default
