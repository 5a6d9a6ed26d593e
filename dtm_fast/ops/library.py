"""The operators of torch.ops.dtm_fast: what torch.compile and torch.jit.trace see instead of the Python functions."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("dtm_fast", "FRAGMENT")


def is_recorded() -> bool:
    """Whether torch.compile or torch.jit.trace records what runs, which sees operators and no native code."""
    if torch.compiler.is_compiling():
        return True
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing


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
