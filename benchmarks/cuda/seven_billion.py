"""The evaluator beside the strong loop on a model of Llama-2-7B's shape: python -m benchmarks.cuda.seven_billion.

Its weights are random, for no others can be had here. The *peaked* model, measured first and whole, has a head that is
partly a permutation of its embedding, so that its margins are like a trained model's: SmolLM2's have a median of 2.5
logits, and 1.2% are below 1/16. One int8 component makes few of its probes diverge, and early exit saves next to
nothing. The *plain* model has the same layers and the head as it was made. The largest of 32,000 random logits are
close together, one in twenty within a step or two of bfloat16: rounding alone makes most probes diverge within some
tens of tokens, early exit saves much, and writing the probes takes a minute, for each tie that the cached decoder
breaks otherwise than the whole pass has the rest written anew.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import dtm_fast as dtm
from benchmarks.cuda.evaluation import Memory
from benchmarks.evaluator.strong_loop import strong_loop
from benchmarks.evaluator.ties import Difference, judged
from dtm_fast.compression import Configuration, name_of
from dtm_fast.measure.racing import By, fdt75

INT8 = dtm.Int8()
BEST = 10  # of a beam search's step
EVERY = 16  # components that the loop measures: one of so many, over all depths and kinds
SECONDS = 120.0  # no stage begins that is not expected to end by then
# The paper's beam search over 150 of 224 components, width 10, 1,000 probes of 100 + 100 tokens (papers.md, 1.8).
EVALUATIONS, PAPER_PROBES = 224_250, 1000
IN_PARTS = (0.25, 1.0)
OTHERS, MARGINS = 4.1, 5.0  # of the peaked model
GOALS = {"sweep": 5.0, "race": 15.0}

Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Size:
    """Of the model and its probes."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    probes: int = 64
    length: int = 100
    dtype: str = "bfloat16"

    @property
    def engine(self) -> Literal["torch", "differences"]:
        """The evaluator's layers: in float32 FDT comes from differences to the base."""
        return "differences" if self.dtype == "float32" else "torch"

    def model(self, device: torch.device) -> PreTrainedModel:
        """Random weights of a spread of 0.02, made on the device."""
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=4096,
            initializer_range=0.02,
        )
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))
        return model.eval().requires_grad_(False)


# Half of the layers, so that what the base has within them fits the device beside the weights in float32.
FLOAT32 = Size(layers=16, dtype="float32")
SMALL = Size(layers=4, hidden=256, intermediate=512, heads=4, vocabulary=1000, probes=8, length=24)


class Bench:
    """One model with its probes and evaluator."""

    def __init__(self, model: PreTrainedModel, size: Size, device: torch.device, end: float) -> None:
        self.size, self.device, self.end = size, device, end
        self.skipped: list[str] = []
        draw = torch.Generator().manual_seed(1)
        prefixes = torch.randint(3, size.vocabulary, (size.probes, size.length), generator=draw)
        started = self._now()
        # All in one batch, as the loop reads them: then both have the base's text of the same products.
        self.probes = dtm.Probes._complete(model, prefixes, size.length, size.probes)
        self.probe_seconds = self._now() - started
        memory, started = Memory(device), self._now()
        self.evaluator = dtm.Evaluator(model, self.probes, layers=size.engine)
        self.build_seconds, self.base_mib = self._now() - started, memory.held()
        print(f"probes in {self.probe_seconds:.1f} s, evaluator in {self.build_seconds:.1f} s", flush=True)
        self.decoder = self.evaluator.decoder
        self.paths = list(self.decoder.components)
        self.sample = [{path: INT8} for path in self.paths[::EVERY]]
        for _ in range(2):  # the first runs are slower
            _, (self.loop_seconds,) = self.loop(self.sample[:1])
            started = self._now()
            self.evaluator.measure(self.sample[:1], ())
            first = self._now() - started
        # All components, unless that would take too long: then one of several, over all depths and kinds. One of the
        # first layer costs twice the mean.
        left = self.end - time.perf_counter()
        step = next((each for each in (1, 2, 3, 5) if first / 2 * len(self.paths) / each < left / 3), 5)
        self.swept = [path for at, path in enumerate(self.paths) if at % step == 0 or at % EVERY == 0]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def loop(self, configurations: list[Configuration]) -> tuple[list[torch.Tensor], list[float]]:
        """FDT by the strong loop, and the seconds of each: all probes in one batch, and one product of the head."""
        found = [strong_loop(self.decoder, self.probes, each, len(self.probes)) for each in configurations]
        return [fdt for fdt, _ in found], [seconds for _, seconds in found]

    def compared(self, everything: bool) -> dict[str, Any]:
        """The sweep, of all components or those of the sample, between the two halves of the loop."""
        half = len(self.sample) // 2
        fdts, before = self.loop(self.sample[:half])
        configurations = [{path: INT8} for path in self.swept] if everything else self.sample
        memory, started = Memory(self.device), self._now()
        found = self.evaluator.measure(configurations, ())
        seconds, peak = (self._now() - started) / len(found), memory.peak()
        more, after = self.loop(self.sample[half:])
        fdts += more
        ours = {name_of(each.configuration): each.fdt for each in found}
        pairs = list(zip(self.sample, fdts, strict=True))
        differ = [
            Difference(configuration, ours[name_of(configuration)], fdt)
            for configuration, fdt in pairs
            if not torch.equal(ours[name_of(configuration)], fdt)
        ]
        ties, beyond = judged(self.evaluator, differ)
        by_layer: dict[int, list[float]] = {}
        for each in found:
            (path,) = each.configuration
            by_layer.setdefault(self.decoder.component(path).layer, []).append(each.seconds)
        loop = statistics.mean(before + after)
        self.every = found
        return {
            "configurations": len(found),
            "seconds": seconds,
            "loop_configurations": len(fdts),
            "loop_seconds": loop,
            "loop_halves": [statistics.mean(part or [loop]) for part in (before, after)],
            "ratio": loop / seconds,
            "seconds_by_layer": {layer: statistics.mean(each) for layer, each in by_layer.items()},
            "peak_mib": peak,
            "compared_probes": sum(len(fdt) for fdt in fdts),
            "different_probes": sum(int((each.ours != each.loops).sum()) for each in differ),
            "ties_within_floor": ties,
            "beyond_floor": beyond,
            "mean_fdt": statistics.mean(float(each.fdt.double().mean()) for each in found),
            "mean_fdt75": statistics.mean(fdt75(each.fdt) for each in found),
            "loop_mean_fdt": statistics.mean(float(fdt.double().mean()) for fdt in fdts),
        }

    def in_one_part(self) -> dict[str, Any]:
        """The sample in one part and in two, to tell what leaving early saves."""
        layers: Any = self.evaluator._layers
        own, seconds = layers._shares, {}
        try:
            for name, shares in (("parts", IN_PARTS), ("one_part", (1.0,))):
                layers._shares = shares
                started = self._now()
                self.evaluator.measure(self.sample, ())
                seconds[name] = (self._now() - started) / len(self.sample)
        finally:
            layers._shares = own
        return {"shares": IN_PARTS, "seconds": seconds, "saves": seconds["one_part"] / seconds["parts"]}

    def race(self, loop: float, error: float, by: By) -> dict[str, Any]:
        """The best ten of all, and how many of them are those of the sweep."""
        candidates: list[Configuration] = [{path: INT8} for path in self.swept]
        started = self._now()
        race = self.evaluator.best(candidates, BEST, error=error, by=by)
        seconds = (self._now() - started) / len(candidates)
        best = {name_of(each.configuration) for each in race.best}

        def place(each: dtm.Measurement) -> Any:
            mean = -float(each.fdt.double().mean()) if by == "fdt75+mean" else 0.0
            return -fdt75(each.fdt), mean, name_of(each.configuration)

        ranked = sorted(self.every, key=place)[:BEST]
        return {
            "by": by,
            "error": error,
            "seconds": seconds,
            "ratio": loop / seconds,
            "as_in_the_sweep": sum(name_of(each.configuration) in best for each in ranked),
            "best_fdt75": [fdt75(each.fdt) for each in race.best],
            "unread": sum(int(each.seen.sum()) == 0 for each in race.dropped),
            "read_share": statistics.mean(
                [float((each.seen > 0).double().mean()) for each in race.dropped] or [1.0]
            ),
        }

    def staged(self, name: str, seconds: float, stage: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What a stage gives, or None where it would take too long."""
        if time.perf_counter() + seconds > self.end:
            self.skipped.append(name)
            return None
        return stage()

    def results(self, everything: bool, keep: Keep) -> None:
        """All stages, the most important first; what is there is kept after each."""
        sweep = self.compared(everything)
        floor = self.evaluator.floor
        found: dict[str, Any] = {
            "engine": self.evaluator.engine,
            "probe_seconds": self.probe_seconds,
            "build_seconds": self.build_seconds,
            "base_mib": self.base_mib,
            "corrected": self.probes.corrected,
            "median_margin": float(self.probes.margins.median()),
            "margins_below_a_sixteenth": float((self.probes.margins < 1 / 16).double().mean()),
            "floor": {"margin": floor.margin, "divergent": floor.divergent, "positions": floor.positions},
            "sweep": sweep,
            "races": [],
            "early_exit": None,
            "skipped": self.skipped,
        }
        keep(found)
        loop, each = sweep["loop_seconds"], sweep["seconds"]
        races: tuple[tuple[float, By], ...] = ((0.0, "fdt75+mean"), (0.0, "fdt75"), (0.05, "fdt75"))
        for error, by in races if everything else ():
            # A race that drops nothing costs what the sweep does, and a little more.
            expected = 1.2 * each * len(self.swept)
            name = f"race by {by}, error {error}"
            race = self.staged(name, expected, lambda error=error, by=by: self.race(loop, error, by))
            found["races"] += [] if race is None else [race]
            keep(found)
        found["early_exit"] = self.staged("early exit", 4 * each * len(self.sample), self.in_one_part)
        keep(found)


@torch.no_grad()
def peak(model: PreTrainedModel, size: Size) -> float:
    """Makes a random model's next token depend on its last: the head's rows become partly those of the embedding.

    The embedding is made large enough to be a fifth of what leaves the layers (of 4096 columns). The head's row of each
    token leans towards the embedding of the one that it follows, by as much as lifts its logit above the largest of the
    others, 4.1 times their spread for 32,000, by between 0 and 5 logits. SmolLM2's margins are so: 5% of them below
    0.25, a quarter below 1.1, half below 2.5, three quarters below 3.9 (its own text of 64 + 64 tokens, in bfloat16).

    Returns:
        How much of what leaves the layers points towards the embedding of its token.
    """
    embedding: torch.Tensor = model.get_input_embeddings().weight
    head: torch.Tensor = model.get_output_embeddings().weight
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, size.vocabulary, (min(8, size.probes), size.length), generator=draw)
    tokens = tokens.to(embedding.device)
    leaves = model.base_model(tokens, output_hidden_states=True, use_cache=False).hidden_states[-2]
    wanted = min(0.9, 12.8 / size.hidden**0.5)
    embedding.mul_(wanted / (1 - wanted**2) ** 0.5 * leaves.float().std() / embedding.float().std())
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state.float()
    towards = torch.nn.functional.normalize(embedding[tokens].float(), dim=-1)
    share = float((hidden * towards).sum(-1).mean() / hidden.norm(dim=-1).mean())
    length = float(head.float().norm(dim=1).mean())
    follows = torch.randperm(size.vocabulary, generator=draw).to(embedding.device)
    margins = (MARGINS * torch.rand(size.vocabulary, 1, generator=draw)).to(embedding.device)
    leans = ((OTHERS + margins / length) / (share * size.hidden**0.5)).clamp(
        0.05, 0.95
    )  # logits spread by length
    for some in torch.arange(size.vocabulary, device=embedding.device).split(4096):
        unit = torch.nn.functional.normalize(embedding[follows[some]].float(), dim=-1)
        lean = leans[some]
        head[some] = (lean * length * unit + (1 - lean**2).sqrt() * head[some].float()).to(head.dtype)
    return share


def run(
    device: torch.device, size: Size = Size(), seconds: float = SECONDS, keep: Keep = lambda found: None
) -> dict[str, Any]:
    """Both models; keep is called with what is there after each stage."""
    began = time.perf_counter()
    model = size.model(device)
    plain_rows = [each().weight.clone() for each in (model.get_input_embeddings, model.get_output_embeddings)]
    found: dict[str, Any] = {"size": vars(size), "model_seconds": time.perf_counter() - began}
    print(f"model in {found['model_seconds']:.1f} s", flush=True)

    def kept(kind: str, result: dict[str, Any]) -> None:
        found[kind] = result
        found["beam"] = beam(size, found["peaked"])
        found["seconds"] = time.perf_counter() - began
        keep(found)

    share = peak(model, size)
    bench = Bench(model, size, device, began + seconds)
    bench.results(True, lambda result: kept("peaked", result | {"share": share}))
    needed = bench.build_seconds + 8 * bench.probe_seconds + 3 * bench.loop_seconds * len(bench.sample)
    if time.perf_counter() + needed < began + seconds:
        del bench  # its states
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(plain_rows[0])
            model.get_output_embeddings().weight.copy_(plain_rows[1])
        Bench(model, size, device, began + seconds).results(False, partial(kept, "plain"))
    return found


def beam(size: Size, measured: dict[str, Any]) -> dict[str, float]:
    """GPU-days of the paper's whole beam search at the seconds of a configuration that were measured.

    A candidate extends a parent by one component, anywhere: from the parent's states it costs what a single component
    costs from the model's.
    """
    whole = EVALUATIONS * PAPER_PROBES / size.probes / 86_400
    seconds = {"loop": measured["sweep"]["loop_seconds"], "sweep": measured["sweep"]["seconds"]}
    seconds |= {f"race by {each['by']}, error {each['error']}": each["seconds"] for each in measured["races"]}
    return {name: each * whole for name, each in seconds.items()}


def lines(result: dict[str, Any]) -> list[str]:
    """The tables, as text."""
    size = result["size"]
    text = [
        f"{size['layers']} layers of {size['hidden']}, random weights in {size['dtype']}, {size['probes']} probes of "
        f"{size['length']} + {size['length']} tokens, int8; {result['seconds']:.0f} s in all, the model made in "
        f"{result['model_seconds']:.1f} s"
    ]
    for kind in ("peaked", "plain"):
        if kind in result:
            text += [f"  {kind}: {line}" for line in _lines(result[kind])]
    days = ", ".join(f"{name} {each:.1f}" for name, each in result["beam"].items())
    text.append(
        f"  the paper's beam search, {EVALUATIONS:,} evaluations of {PAPER_PROBES} probes, in GPU-days: {days}"
    )
    return text


def wrong(result: dict[str, Any]) -> list[list[str]]:
    """Differences beyond the floor, where they are more than the largest of 6,400 moves leaves unseen."""
    sweeps = [result[kind]["sweep"] for kind in ("peaked", "plain") if kind in result]
    allowed = 0.01
    return [
        each["beyond_floor"]
        for each in sweeps
        if len(each["beyond_floor"]) > allowed * each["compared_probes"]
    ]


def _lines(found: dict[str, Any]) -> list[str]:
    sweep, floor, exits = found["sweep"], found["floor"], found["early_exit"]
    before, after = map(_ms, sweep["loop_halves"])
    (first, at_first), *_, (last, at_last) = sweep["seconds_by_layer"].items()
    text = [
        f"{found['engine']}; probes made in {found['probe_seconds']:.1f} s ({found['corrected']} corrected), ready in "
        f"{found['build_seconds']:.1f} s",
        f"{found['base_mib']:.0f} MiB of the base's states and {sweep['peak_mib']:.0f} while measuring",
        f"the loop {_ms(sweep['loop_seconds'])} a configuration, the mean of {sweep['loop_configurations']}; before "
        f"the sweep {before}, after it {after}",
        f"sweep of {sweep['configurations']}: {_ms(sweep['seconds'])}, {sweep['ratio']:.2f} x the loop (goal "
        f"{GOALS['sweep']}); in layer {first} {_ms(at_first)}, in layer {last} {_ms(at_last)}",
        f"mean FDT {sweep['mean_fdt']:.1f} (the loop's {sweep['loop_mean_fdt']:.1f}), FDT_75 {sweep['mean_fdt75']:.1f}",
        f"another FDT than the loop's on {sweep['different_probes']} of {sweep['compared_probes']} probes: "
        f"{sweep['ties_within_floor']} ties within the floor of {floor['margin']:.3g} logits, "
        f"{len(sweep['beyond_floor'])} beyond it {sweep['beyond_floor'][:2]}",
        f"the base itself diverges at {floor['divergent']} of {floor['positions']} positions; median margin "
        f"{found['median_margin']:.3g}, {found['margins_below_a_sixteenth']:.1%} below 1/16",
    ]
    for race in found.get("races", []):
        text.append(
            f"best {BEST} by {race['by']}, error {race['error']}: {_ms(race['seconds'])}, {race['ratio']:.2f} x the "
            f"loop (goal {GOALS['race']}); {race['as_in_the_sweep']} of them as in the sweep; {race['unread']} never "
            f"read, {race['read_share']:.0%} of the dropped ones' probes"
        )
    if exits:
        parts, one_part = _ms(exits["seconds"]["parts"]), _ms(exits["seconds"]["one_part"])
        text.append(
            f"early exit in parts {exits['shares']}: {parts} instead of {one_part}, {exits['saves']:.2f} x"
        )
    return text + ([f"left out for want of time: {', '.join(found['skipped'])}"] if found["skipped"] else [])


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.seven_billion", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a trial: no figure means anything")
    parser.add_argument("--json", action="store_true", help="print all figures")
    for name, value in vars(Size()).items():
        parser.add_argument(f"--{name}", type=type(value), help=f"default {value}")
    options = parser.parse_args()
    given = {name: value for name in vars(Size()) if (value := getattr(options, name)) is not None}
    result = run(torch.device(options.device), Size(**(vars(SMALL if options.small else Size()) | given)))
    print(json.dumps(result, indent=1) if options.json else "\n".join(lines(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
