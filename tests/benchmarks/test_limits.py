import math

import pytest

from benchmarks import limits


def test_limits_are_positive_and_finite() -> None:
    module, reason = limits.load()
    if module is None:
        pytest.skip(reason)
    found = limits.Probe(read_bytes=2**24, seconds=0.002).again()
    derived = {limits.FP32_IN_BF16} if "bf16_amx" in found.best else set()
    assert set(found.best) | set(found.unavailable) == {*limits.NAMES, "read"} | derived
    assert {"fp32_fma", "read"} <= set(found.best)
    for name, value in found.best.items():
        assert math.isfinite(value), name
        assert value > 0, name


def test_an_unknown_limit_is_an_error() -> None:
    module, reason = limits.load()
    if module is None:
        pytest.skip(reason)
    with pytest.raises(ValueError, match="no_such: unknown limit"):
        module.peak("no_such", 1, 1)


def test_without_the_module_every_limit_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "load", lambda: (None, "not built: make bench-limits"))
    found = limits.Probe(read_bytes=2**20).again()
    assert found.best == {}
    assert set(found.unavailable.values()) == {"not built: make bench-limits"}
