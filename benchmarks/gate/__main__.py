"""python -m benchmarks.gate BASE HEAD: is anything slower at HEAD than at BASE?

Builds both revisions here and times their operations in turns, each run in a process of its own. A case fails only
if the head's fastest run is slower than 1.25 times the base's slowest, and still is after as many runs again: noise
can hide a regression by that rule, but hardly invent one. Revisions are named as git names them; "." or WORKTREE is
the working tree as it is.

Exit code 0: nothing is slower; 1: something is; 2: the revisions cannot be built or compared.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from benchmarks.gate import revision, timing_child, verdict
from benchmarks.gate.comparison import Comparison, Protocol, compare
from benchmarks.gate.revision import GateError, Revision

ROOT = Path(__file__).resolve().parents[2]
LEAST_RUNS = 3
OPERATIONS = list(dict.fromkeys(case.operation for case in timing_child.CASES))


def compared(revisions: Sequence[Revision], kept: Path | None, protocol: Protocol) -> Comparison:
    """Build and time them in a folder that is gone afterwards, however this ends."""
    with tempfile.TemporaryDirectory(prefix="dtm-fast-gate-") as name:
        temporary = Path(name)
        builds = {}
        for each in revisions:
            _say(f"building {each.role}: {each.text}")
            builds[each.role] = revision.built(ROOT, each, temporary, kept)
        return compare(builds, temporary / "results.pt", protocol, _say)


def _say(text: str) -> None:
    """To whoever waits; standard output is for the table."""
    print(text, file=sys.stderr, flush=True)


def print_report(revisions: Sequence[Revision], comparison: Comparison) -> None:
    for each in revisions:
        about = comparison.about[each.role]
        print(f"{each.role}: {each.text}, {about['isa']} kernels, {about['threads']} threads")
    print(
        f"{len(comparison.others)} rounds; in the least quiet, others used {max(comparison.others):.0%} of the CPUs"
    )
    print(f"\n{verdict.table(comparison.rows)}\n")
    untimed = sorted({name for about in comparison.about.values() for name in about["without_case"]})
    if untimed:
        print(f"not timed, for want of a case in benchmarks/gate/timing_child.py: {', '.join(untimed)}")
    print(verdict.conclusion(comparison.rows))


def as_json(revisions: Sequence[Revision], comparison: Comparison) -> dict[str, Any]:
    return {
        "factor": verdict.FACTOR,
        "revisions": {each.role: vars(each) | comparison.about[each.role] for each in revisions},
        "others": comparison.others,
        "cases": [
            {
                "name": row.name,
                "base_s": row.base,
                "head_s": row.head,
                "ratio": row.ratio,
                "remark": row.remark,
                "verdict": row.verdict,
            }
            for row in comparison.rows
        ],
    }


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {number}")
        return number

    parse.__name__ = "int"  # for argparse's message on "three"
    return parse


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("head", metavar="HEAD")
    parser.add_argument("--runs", type=_at_least(LEAST_RUNS), default=LEAST_RUNS, help="of each revision (3)")
    parser.add_argument("--seconds", type=float, default=0.4, help="per case and run (0.4)")
    parser.add_argument(
        "--only", action="append", choices=OPERATIONS, help="only this operation; may be repeated"
    )
    parser.add_argument("--threads", type=_at_least(1), help="as torch.set_num_threads (torch's default)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    parser.add_argument(
        "--builds", type=Path, metavar="FOLDER", help="keep built commits there, and use those that are there"
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    signal.signal(signal.SIGTERM, _end)
    try:
        revisions = [
            revision.resolve(ROOT, "base", options.base),
            revision.resolve(ROOT, "head", options.head),
        ]
        kept = None if options.builds is None else options.builds.resolve()
        protocol = Protocol(options.runs, options.seconds, options.threads, options.only or ())
        comparison = compared(revisions, kept, protocol)
    except GateError as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    print_report(revisions, comparison)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(as_json(revisions, comparison), indent=1) + "\n")
    return 1 if any(row.fails for row in comparison.rows) else 0


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM as an exception, so that everything on the way out is tidied up."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
