"""Searches: which components to compress, in which order, how far, and what that is compared with."""

from dtm_fast.plan.allocation import Allocation, Curve, allocate
from dtm_fast.plan.beam import beam_search, check_beam, kept_by
from dtm_fast.plan.comparison import chosen_by, compare
from dtm_fast.plan.front import front
from dtm_fast.plan.harms import check_harms
from dtm_fast.plan.in_order import Stop, check_every, metrics_for, plan_in_order, sweep
from dtm_fast.plan.joint import check_refinements, joint_measurements, joint_search, reached_by
from dtm_fast.plan.options import Options, check_budgets, check_shapes
from dtm_fast.plan.plan import Plan, Point
from dtm_fast.plan.pruning_rounds import (
    PAPER_STEPS,
    Round,
    check_steps,
    probe_round,
    prune_in_rounds,
    uniform,
)
from dtm_fast.plan.ranking import RANKINGS, rank
from dtm_fast.plan.recorded import Evaluator, RecordedEvaluator
from dtm_fast.plan.recovered_rounds import prune_and_recover
from dtm_fast.plan.units import Unit, units

__all__ = [
    "PAPER_STEPS",
    "RANKINGS",
    "Allocation",
    "Curve",
    "Evaluator",
    "Options",
    "Plan",
    "Point",
    "RecordedEvaluator",
    "Round",
    "Stop",
    "Unit",
    "allocate",
    "beam_search",
    "check_beam",
    "check_budgets",
    "check_every",
    "check_harms",
    "check_refinements",
    "check_shapes",
    "check_steps",
    "chosen_by",
    "compare",
    "front",
    "joint_measurements",
    "joint_search",
    "kept_by",
    "metrics_for",
    "plan_in_order",
    "probe_round",
    "prune_and_recover",
    "prune_in_rounds",
    "rank",
    "reached_by",
    "sweep",
    "uniform",
    "units",
]
