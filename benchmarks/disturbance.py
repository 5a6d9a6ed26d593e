"""How much of the machine others used while we measured."""

import os
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_STAT = Path("/proc/stat")


def _busy_seconds() -> float:
    """CPU time that everyone used so far, and what the hypervisor took: proc(5), the line "cpu" of /proc/stat."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, _STAT.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS


class Disturbance:
    """Each call gives the share of all CPUs that other processes used since the call before; 0 where unknown."""

    def __init__(self) -> None:
        self._known = _STAT.exists()
        self._last = self._now()

    def __call__(self) -> float:
        before, self._last = self._last, self._now()
        wall, busy, own = (b - a for a, b in zip(before, self._last, strict=True))
        cpu_seconds = wall * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (busy - own) / cpu_seconds)) if cpu_seconds > 0 else 0.0

    def _now(self) -> tuple[float, float, float]:
        own = os.times()
        own_seconds = own.user + own.system
        return time.monotonic(), _busy_seconds() if self._known else own_seconds, own_seconds


def wait_until_quiet(at_most: float, enough: float = 0.05) -> None:
    """Wait until others have used at most `enough` of the CPUs for a second, or `at_most` seconds are over."""
    share = Disturbance()
    end = time.monotonic() + at_most
    while time.monotonic() < end:
        time.sleep(1)
        if share() <= enough:
            return
