"""Pruning rounds with recovery training between them: each round on the model that the last one has trained."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from dtm_fast.compression import Recovery, recover
from dtm_fast.compression.recovery import check_training
from dtm_fast.model import model_identity
from dtm_fast.plan.plan import Plan, Point
from dtm_fast.plan.pruning_rounds import METRICS, PAPER_STEPS, SEARCH, Round, check_steps, probe_round
from dtm_fast.plan.recorded import RecordedEvaluator
from dtm_fast.runs import RunDirectory


def prune_and_recover(
    recorded: RecordedEvaluator,
    tokens: Tensor,
    folder: Path,
    settings: Recovery,
    steps: Sequence[float] = PAPER_STEPS,
) -> Plan:
    """Prunes the model in rounds and trains it, in place, after each; the paper's algorithm whole.

    Each round is a ``probe_round`` on the model as the last round left it, then ``recover``. The probes stay those of
    the model as it was at first, so FDT counts how far the trained model's text is from the original's. The last steps
    of a training are without mask and bring weights back, so the next round ranks all weights anew at the sparsities
    reached so far; what is measured after a round, and what is planned, is the trained model pruned again.

    Everything is kept in ``folder/round-1``, ``round-2`` …: a journal of the trained model, and ``recovery`` with its
    checkpoints, losses and model. The same call goes on where it was, if the model is again the one it was at first.

    Args:
        recorded: measures the model as it is at first; its evaluator cannot be used afterwards.
        tokens: int64 [S, length], what to train on (``blocks_of``).
        folder: of the rounds.
        settings: of the training; ``Recovery()`` is the paper's.
        steps: mean sparsity that each round adds.

    Returns:
        A plan for the trained model, ``folder/round-R/recovery/model``; its curve has each round after its training,
        ``how["untrained"]`` the same before it.

    Raises:
        InputError: steps or settings that cannot be meant; as ``recover``.
        TrainingError: a loss or a weight is not finite; what was reached before is kept.

    Source: Deiseroth et al. 2023 (papers.md §1.5).
    """
    check_steps(steps)
    check_training(recorded.decoder, {}, tokens, settings)
    model, probes = recorded.decoder.model, recorded.evaluator.probes
    current: dict[str, float] = {}
    rounds: list[Round] = []
    untrained: list[Point] = []
    curve: list[Point] = []
    here = recorded
    with ExitStack() as opened:
        for number, step in enumerate(steps, 1):
            rounds.append(probe_round(here, current, step, min(1.0, math.fsum(steps[:number]))))
            current, configuration = rounds[-1].sparsities, rounds[-1].configuration
            (before,) = here.measure([configuration], METRICS)
            untrained.append(Point.of(here.decoder, before))
            place = folder / f"round-{number}"
            recover(model, configuration, tokens, settings, place / "recovery")
            here = recorded  # lets go of the last round's states before there are the next
            opened.close()
            identity = {"model": model_identity(model), "probes": probes.identity}
            directory = opened.enter_context(RunDirectory.resume(place, identity))
            here = recorded.with_evaluator(recorded.evaluator.afresh(), directory.journal)
            (after,) = here.measure([configuration], METRICS)
            curve.append(Point.of(here.decoder, after))
        return Plan(
            configuration=dict(rounds[-1].configuration),
            search=SEARCH,
            how={
                "steps": list(steps),
                "rounds": [each.to_json() for each in rounds],
                "recovery": asdict(settings),
                "untrained": [asdict(point) for point in untrained],
            },
            model=here.model_identity,
            curve=curve,
            chosen=curve[-1],
        )
