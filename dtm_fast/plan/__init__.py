"""Searches: which components to compress, in which order, how far."""

from dtm_fast.plan.in_order import Stop, check_every, metrics_for, plan_in_order, sweep
from dtm_fast.plan.plan import Plan, Point
from dtm_fast.plan.ranking import RANKINGS, rank
from dtm_fast.plan.recorded import Evaluator, RecordedEvaluator

__all__ = [
    "RANKINGS",
    "Evaluator",
    "Plan",
    "Point",
    "RecordedEvaluator",
    "Stop",
    "check_every",
    "metrics_for",
    "plan_in_order",
    "rank",
    "sweep",
]
