"""Whether two modules have the same state."""

import torch


def assert_same_state(layer: torch.nn.Module, other: torch.nn.Module) -> None:
    state, others = layer.state_dict(), other.state_dict()
    assert list(state) == list(others)
    for name, value in state.items():
        assert value.dtype == others[name].dtype
        assert torch.equal(value, others[name])
