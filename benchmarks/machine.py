"""Where and with what the figures were measured."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import dtm_fast
from dtm_fast.ops import backend_info, native

ROOT = Path(__file__).resolve().parent.parent


def git_sha() -> str:
    """The commit, with "+changes" where the working tree differs from it; "unknown" outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_generation() -> str:
    """Family and model as CPUID gives them: the name of a virtual machine's CPU leaves open which it is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return "generation unknown"
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"family {values.get('cpu family', 'unknown')}, model {values.get('model', 'unknown')}"


def describe() -> dict[str, Any]:
    """The machine and the software, as one flat dict for JSON."""
    load = os.getloadavg()
    return {
        "cpu_model": f"{backend_info()['cpu']['name']} ({_cpu_generation()})",
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "isa": native.cpu_isa(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": [round(each, 2) for each in load],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "torch": torch.__version__,
        "dtm_fast": dtm_fast.__version__,
        "git_sha": git_sha(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def slug(machine: dict[str, Any]) -> str:
    """The machine as a part of a file name."""
    words = "".join(each if each.isalnum() else " " for each in machine["cpu_model"]).lower().split()
    words = [each for each in words if each not in ("r", "tm", "cpu", "processor")]
    return "-".join([*words, f"{machine['threads']}threads"])
