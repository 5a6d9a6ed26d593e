"""The commands that measure: sweep, plan, prune, beam, joint and compare."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from dtm_fast import console
from dtm_fast.cli.options import AsJson, Fused, RankBy, TreatmentName, TreatmentNames
from dtm_fast.cli.setting import (
    Session,
    Setting,
    measuring,
    print_json,
    session,
    summaries,
    write_report_of,
)
from dtm_fast.compression import Recovery, Treatment, blocks_of, parse_treatment
from dtm_fast.compression.recovery import check_trainable
from dtm_fast.errors import InputError
from dtm_fast.measure import read_documents
from dtm_fast.model import Decoder
from dtm_fast.plan import (
    PAPER_STEPS,
    Options,
    Plan,
    Stop,
    beam_search,
    check_beam,
    check_budgets,
    check_every,
    check_harms,
    check_refinements,
    check_steps,
    compare,
    joint_measurements,
    joint_search,
    metrics_for,
    plan_in_order,
    prune_and_recover,
    prune_in_rounds,
    rank,
    sweep,
    units,
)
from dtm_fast.plan.harms import MEASURED, PREDICTED

Every = Annotated[int, typer.Option(help="Components between two joint measurements.")]
Budgets = Annotated[
    list[float],
    typer.Option("--budget", help="Effective bits of a weight, 16 at first; several make a front."),
]


@measuring
def sweep_command(
    setting: Setting, treatment: TreatmentName = "int8", rank_by: RankBy = "fdt75", as_json: AsJson = False
) -> None:
    """Measures every component alone under one treatment."""
    chosen, metrics = parse_treatment(treatment), metrics_for(rank_by, setting.prefix)

    def expected(decoder: Decoder) -> int:
        return len(decoder.components)

    with session(setting, [chosen], f"{chosen.key} alone", expected, quiet=as_json) as running:
        measured = sweep(running.recorded, chosen, metrics)
        ranked = rank(measured, rank_by)
    if as_json:
        print_json(
            {
                "run": str(setting.run),
                "treatment": chosen.key,
                "floor": asdict(running.floor),
                "ranked": [{"component": path, **summaries(measured[path])} for path in ranked],
            }
        )
        return
    console.out.print(console.sweep_table(ranked, measured))
    console.show_floor(running.floor)


@measuring
def plan_command(
    setting: Setting,
    treatment: TreatmentName = "int8",
    rank_by: RankBy = "fdt75",
    components: Annotated[int | None, typer.Option(help="Stop at so many components.")] = None,
    share: Annotated[
        float | None, typer.Option(help="Stop at this share of their parameters, 0 … 1.")
    ] = None,
    min_fdt: Annotated[float | None, typer.Option(help="Stop before FDT_75 falls below this.")] = None,
    every: Every = 10,
    as_json: AsJson = False,
) -> None:
    """Sweeps, then converts components in order of harm until a stop; writes plan.json and the report."""
    chosen, stop = parse_treatment(treatment), Stop(components, share, min_fdt)
    metrics_for(rank_by, setting.prefix)
    stop.check(setting.completion)
    check_every(every)

    def expected(decoder: Decoder) -> int:
        size = len(decoder.components)
        return size + -(-min(components or size, size) // every)

    with session(setting, [chosen], f"{chosen.key} plan", expected, quiet=as_json) as running:
        found = plan_in_order(running.recorded, chosen, rank_by, stop, every)
        _finish(running, setting, found, as_json)
    if not found.configuration:
        console.show_error("no component can be converted within the stop: the plan is empty")
        raise typer.Exit(1)


@measuring
def prune_command(
    setting: Setting,
    steps: Annotated[
        str, typer.Option(help="Mean sparsity that each round adds, in percent, with commas between.")
    ] = ",".join(f"{100 * step:g}" for step in PAPER_STEPS),
    recover: Annotated[
        str | None,
        typer.Option(
            help="Train after each round, on this text; as --text. The model in round-R, R the number of steps."
        ),
    ] = None,
    masked_steps: Annotated[int, typer.Option(help="Of --recover, with the mask.")] = Recovery.masked_steps,
    unmasked_steps: Annotated[
        int, typer.Option(help="Of --recover, after them and without it.")
    ] = Recovery.unmasked_steps,
    batch: Annotated[int, typer.Option(help="Sequences in a step of --recover.")] = Recovery.batch,
    length: Annotated[int, typer.Option(help="Tokens of a sequence of --recover.")] = Recovery.length,
    learning_rate: Annotated[float, typer.Option(help="Of --recover, the highest.")] = Recovery.learning_rate,
    as_json: AsJson = False,
) -> None:
    """Prunes in rounds, each component as far as its FDT allows; with --recover trains after each, as the paper."""
    rounds = _steps(steps)
    training = Recovery(
        masked_steps=masked_steps,
        unmasked_steps=unmasked_steps,
        batch=batch,
        length=length,
        learning_rate=learning_rate,
    )
    if recover is None and training != Recovery():
        raise InputError("options of a training (--masked-steps, --batch …) need --recover")
    documents = None if recover is None else read_documents(recover)
    if recover == setting.text:
        console.show_note(
            "--recover is the text of the probes: the model is trained on what it is measured on"
        )

    def expected(decoder: Decoder) -> int:
        return len(rounds) * (3 * len(decoder.components) + 3)

    def fits(decoder: Decoder) -> None:
        if documents is not None:
            check_trainable(decoder.model, training)

    with session(setting, [], "pruning rounds", expected, fits=fits, quiet=as_json) as running:
        if documents is None:
            found = prune_in_rounds(running.recorded, rounds, beside_uniform=True)
        else:
            wanted = batch * (masked_steps + unmasked_steps)
            tokens = blocks_of(running.tokenizer, documents, length, wanted)
            found = prune_and_recover(running.recorded, tokens, setting.run, training, rounds)
            for number in range(1, len(rounds) + 1):
                running.tokenizer.save_pretrained(setting.run / f"round-{number}" / "recovery" / "model")
        _finish(running, setting, found, as_json)


@measuring
def beam_command(
    setting: Setting,
    depth: Annotated[int, typer.Option(help="How many units to convert.")],
    treatment: TreatmentNames = ["int8"],  # noqa: B006
    width: Annotated[int, typer.Option(help="Configurations kept at each depth.")] = 10,
    by: Annotated[str, typer.Option(help="fdt75, dppl, perplexity or kl.")] = "fdt75",
    among: Annotated[
        int | None, typer.Option(help="Look at so many units at each depth, the least harmful alone first.")
    ] = None,
    fused: Fused = False,
    as_json: AsJson = False,
) -> None:
    """Converts one unit after the other, the ten best configurations at a time; the paper's beam search."""
    treatments = [parse_treatment(each) for each in treatment]
    metrics_for(by, setting.prefix)
    check_beam(depth, width, among)

    def fits(decoder: Decoder) -> None:
        check_beam(depth, width, among, len(units(decoder, fused)))

    def expected(decoder: Decoder) -> int | None:
        if by == "fdt75":
            return None  # races drop most of what there is to measure
        size = len(units(decoder, fused))
        extensions = min(among or size, size) * len(treatments)
        return size * len(treatments) + (1 + width * (depth - 1)) * extensions + depth

    with session(setting, treatments, "beam", expected, fits=fits, quiet=as_json) as running:
        found = beam_search(
            running.recorded,
            treatments,
            depth,
            width=width,
            by=by,
            units=units(running.evaluator.decoder, fused),
            among=among,
        )
        _finish(running, setting, found, as_json)


@measuring
def joint_command(
    setting: Setting,
    budget: Budgets,
    treatment: TreatmentNames = ["int8", "int4(64)", "prune(0.3)", "prune(0.5)", "prune(0.7)"],  # noqa: B006
    refinements: Annotated[int, typer.Option(help="How often each budget's best is improved.")] = 1,
    confirm: Annotated[
        int | None,
        typer.Option(
            help="Other probes, which decide between the best that were found; as many as --probes, 0 for none."
        ),
    ] = None,
    fused: Fused = False,
    as_json: AsJson = False,
) -> None:
    """Chooses for each component whether to prune, to quantize or to keep it, within a size; shows the front."""
    treatments = [parse_treatment(each) for each in treatment]
    check_budgets(budget)
    check_refinements(refinements)
    if confirm is not None and confirm < 0:
        raise InputError(f"confirm: a whole number of at least 0, not {confirm}")
    others = setting.probes if confirm is None else confirm

    def fits(decoder: Decoder) -> None:
        _check_reachable(decoder, treatments, fused, budget)

    def expected(decoder: Decoder) -> int:
        options = Options(decoder, treatments, units(decoder, fused))
        return joint_measurements(decoder, options, budget, refinements, confirmed=others > 0)

    with session(setting, treatments, "joint", expected, fits=fits, confirm=others, quiet=as_json) as running:
        chosen_units = units(running.evaluator.decoder, fused)
        found = joint_search(
            running.recorded,
            treatments,
            chosen_units,
            budget,
            refinements=refinements,
            confirming=running.confirming,
        )
        _finish(running, setting, found, as_json)


@measuring
def compare_command(
    setting: Setting,
    budget: Budgets,
    treatment: TreatmentNames = ["int8"],  # noqa: B006
    by: Annotated[list[str] | None, typer.Option(help=f"{', '.join((*MEASURED, *PREDICTED))}; all.")] = None,
    fused: Fused = False,
    as_json: AsJson = False,
) -> None:
    """What choosing by FDT buys: what other criteria choose within the same size, and what that does."""
    treatments = [parse_treatment(each) for each in treatment]
    check_budgets(budget)
    criteria = by or [each for each in (*MEASURED, *PREDICTED) if each != "perplexity" or setting.prefix > 1]
    check_harms(criteria)
    if "perplexity" in criteria:
        metrics_for("perplexity", setting.prefix)

    def fits(decoder: Decoder) -> None:
        _check_reachable(decoder, treatments, fused, budget)

    def expected(decoder: Decoder) -> int:
        alone = 1 + len(units(decoder, fused)) * len(treatments)
        measured = sum(each in MEASURED for each in criteria)  # each asks again for what is measured at first
        return alone * (measured + (measured > 0)) + len(budget) * len(criteria)

    calibrated = "layer error" in criteria
    with session(
        setting, treatments, "compare", expected, fits=fits, calibrated=calibrated, quiet=as_json
    ) as running:
        chosen_units = units(running.evaluator.decoder, fused)
        found = compare(running.recorded, treatments, chosen_units, budget, criteria)
        stored = [
            {"by": name, "budget": each, **measurement.to_json()}
            for name, measured in found.items()
            for each, measurement in zip(budget, measured, strict=True)
        ]
        running.directory.write_json("comparison.json", {"treatments": treatment, "rows": stored})
    if as_json:
        print_json({"run": str(setting.run), "rows": stored})
        return
    console.out.print(console.comparison_table(found, budget))
    console.show_floor(running.floor)


def add_to(app: typer.Typer) -> None:
    """Makes them commands of ``app``."""
    for name, command in (
        ("sweep", sweep_command),
        ("plan", plan_command),
        ("prune", prune_command),
        ("beam", beam_command),
        ("joint", joint_command),
        ("compare", compare_command),
    ):
        app.command(name=name)(command)


def _finish(running: Session, setting: Setting, found: Plan, as_json: bool) -> None:
    """Writes plan.json and the report, and says what was found."""
    running.directory.write_json("plan.json", found.to_json())
    if as_json:
        print_json({"run": str(setting.run), "floor": asdict(running.floor), "plan": found.to_json()})
    else:
        console.out.print(console.plan_table(found))
        console.show_floor(running.floor)
    written = [setting.run / "plan.json"]
    try:
        written += write_report_of(running.directory)
    except InputError as error:  # such as without the libraries of the report; the search has succeeded
        console.show_note(f"no report: {error}")
    for path in () if as_json else written:
        console.show_written(path)


def _check_reachable(
    decoder: Decoder, treatments: Sequence[Treatment], fused: bool, budgets: Sequence[float]
) -> None:
    options = Options(decoder, treatments, units(decoder, fused))
    for budget in budgets:
        options.limit(budget)


def _steps(text: str) -> list[float]:
    try:
        steps = [float(each) / 100 for each in text.split(",")]
    except ValueError:
        raise InputError(f"steps: numbers with commas between, such as 20,15,10; not {text!r}") from None
    check_steps(steps)
    return steps
