"""Recovery trainings: the loss over the steps, with the mask and without."""

import plotly.graph_objects as go

from dtm_fast.report.content import Content
from dtm_fast.report.elements import folded, small_figure, table
from dtm_fast.report.layout import FEW, LINES, curve_layout, whole_ticks
from dtm_fast.report.losses import Training
from dtm_fast.report.wording import counted, markup, number


def recovery_section(content: Content) -> str:
    """The section of the trainings, a figure for each; empty where there are none."""
    if not content.trainings:
        return ""
    figures = "".join(
        small_figure(
            _figure(training),
            f"training-{place}",
            training.name,
            f"loss of {counted(len(training.losses), 'step')}, nats for each token",
            f"Loss over the steps of the training {training.name}",
        )
        for place, training in enumerate(content.trainings)
    )
    note = (
        "What is pruned is trained: at first with the mask, so that dropped weights stay 0, then without it. The loss "
        "is that of each step's batch before its update."
    )
    return f"""<section>
<h2>Recovery training</h2>
<p class="note">{markup(note)}</p>
<div class="curves">{figures}</div>
{folded("The trainings as a table", _table(content.trainings))}</section>
"""


def _figure(training: Training) -> go.Figure:
    figure = go.Figure()
    for name, first, losses, colour, dash in _parts(training):
        figure.add_scatter(
            x=list(range(first, first + len(losses))),
            y=losses,
            hovertemplate=f"step %{{x}}, {name}<br>loss %{{y:.4~g}}<extra></extra>",
            mode="lines+markers" if len(training.losses) <= FEW else "lines",
            name=name,
            line={"color": colour, "width": 2, "dash": dash},
            marker={"size": 5},
        )
    figure.update_layout(**curve_layout("step", **whole_ticks(len(training.losses))), showlegend=True)
    return figure


def _parts(training: Training) -> list[tuple[str, int, list[float], str, str]]:
    """Name, first step, losses, colour and dash of each part that has steps."""
    masked = training.masked
    parts = [
        ("with the mask", 1, training.losses[:masked], LINES[0], "solid"),
        ("without", masked + 1, training.losses[masked:], LINES[1], "dot"),
    ]
    return [part for part in parts if part[2]]


def _table(trainings: list[Training]) -> str:
    rows = [
        (
            training.name,
            name,
            f"{first} to {first + len(losses) - 1}",
            *map(number, (losses[0], losses[-1], min(losses))),
        )
        for training in trainings
        for name, first, losses, *_ in _parts(training)
    ]
    return table(("training", "part", "steps", "first loss", "last loss", "least"), rows, left=[0, 1])
