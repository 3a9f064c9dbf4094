"""Predictors against the changes of a run: the table below that of its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from entropy_probe.predictor_skill import RunSkill


def skill_table(run: RunSkill, *, plain: bool) -> Table:
    """One line a predictor, within 80 columns."""
    from rich import box
    from rich.table import Table

    from entropy_probe.predictor_skill import HEADINGS

    table = Table(
        box=box.ASCII2 if plain else box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "predictor" else "right")
    for row in run.rows():
        table.add_row(*row)
    return table
