"""Has a kernel become slower? Two revisions, built and timed in turn in one job: python -m benchmarks.gate."""
