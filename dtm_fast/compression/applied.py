"""Puts a configuration into a model and takes it out again, bit for bit."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from dtm_fast.compression.configuration import Configuration, check_configuration
from dtm_fast.compression.kept_weights import compressed_weight
from dtm_fast.compression.treatment import Treatment
from dtm_fast.model import Component, Decoder


class Change:
    """The weights of one configuration, compressed once; ``with change:`` puts them in and takes them out.

    The original weights are not copied: each parameter points to the compressed tensor inside the ``with``
    block and to its own storage again after it, so undoing restores every bit.
    """

    def __init__(self, decoder: Decoder, configuration: Configuration) -> None:
        """Compresses the weights; the model itself is not changed yet.

        Raises:
            ComponentError, TreatmentError: if the configuration does not fit the model.
        """
        check_configuration(decoder, configuration)
        self._parts = [
            (component, treatment, _stored(component, treatment))
            for component, treatment in (
                (decoder.component(path), treatment) for path, treatment in configuration.items()
            )
        ]
        self._undo: ExitStack | None = None

    def __enter__(self) -> "Change":
        """Puts the compressed weights in."""
        if self._undo is not None:
            raise RuntimeError("this change is already in the model")
        with ExitStack() as undo:
            for component, treatment, compressed in self._parts:
                undo.enter_context(_in_place(component, treatment, compressed))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Takes them out, in reverse order."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()


def _stored(component: Component, treatment: Treatment) -> Tensor:
    """The compressed weight in the layout in which the module stores it."""
    compressed = compressed_weight(component, treatment)
    return compressed.t().contiguous() if component.transposed else compressed


@contextmanager
def _in_place(component: Component, treatment: Treatment, compressed: Tensor) -> Iterator[None]:
    parameter = component.parameter
    original = parameter.data
    hook = None
    if treatment.treats_input:

        def compress_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (treatment.compress_input(inputs[0]), *inputs[1:])

        hook = component.module.register_forward_pre_hook(compress_input)
    try:
        parameter.data = compressed
        yield
    finally:
        parameter.data = original
        if hook is not None:
            hook.remove()
