"""The memory that one token_divergence needs beyond its arguments.

python -m benchmarks.peak_memory T D V dtype threads

Linux keeps the highest resident size of a process (VmHWM) and forgets it on request, so nothing is sampled and
native buffers count. The process is fresh, so no earlier call has left memory that this one could use unseen.
"""

import json
import sys
from pathlib import Path

import torch

from dtm_fast import ops


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def main() -> None:
    tokens, depth, vocabulary = map(int, sys.argv[1:4])
    dtype = getattr(torch, sys.argv[4])
    torch.set_num_threads(int(sys.argv[5]))
    hidden = torch.empty(1, tokens, depth, dtype=dtype).normal_()
    head = torch.empty(vocabulary, depth, dtype=dtype).normal_()
    reference = torch.randint(vocabulary, (1, tokens))
    # The threads and torch's own lazy set-up are not what the operation needs for this shape.
    ops.token_divergence(hidden[:, :2], head[:64], reference[:, :2] % 64)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak to the current size
    before = status("VmRSS")
    ops.token_divergence(hidden, head, reference)
    extra = max(0, status("VmHWM") - before)
    print(json.dumps({"peak_extra_mib": extra / 2**20}))


if __name__ == "__main__":
    main()
