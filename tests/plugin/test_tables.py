"""Rows and tables: what they show of names and numbers that need care."""

from __future__ import annotations

from rich.console import Console

from pytest_entropy_probe.shown import tables
from pytest_entropy_probe.shown.markdown import summary
from pytest_entropy_probe.shown.tables import Row, Step, criteria_table

NAME = "a[bold]_|`<b>"


def step(name: str, number: int | None) -> Step:
    return Step(name, "run", number, "1±0.1", "-", "-", "1.00", "passed", "nats/token")


def test_what_passes_within_noise_has_no_margin() -> None:
    """0.03 ± 0.01 passes `min: 0.05` and is not inside of it."""
    assert Row("c", "entropy", "pass", 0.03, 0.05, noisy=True).margin == "-"
    assert Row("c", "ess", "pass", 1.0, 0.5).margin == "2x"


def test_a_name_is_no_markup_of_the_terminal() -> None:
    console = Console(width=80)
    with console.capture() as shown:
        console.print(criteria_table(NAME, [Row(NAME, "entropy", "pass", 1.0, 0.5)], plain=True))
    assert NAME in shown.get()


def test_a_name_is_no_markup_of_the_summary() -> None:
    """Inside of HTML nothing is Markdown: a backslash would be shown."""
    text = summary("t", [step(NAME, 3)], {NAME: [Row(NAME, "entropy", "pass", 1.0, 0.5)]}, {}, {}, [])
    assert "<details><summary>a[bold]_|`&lt;b&gt;: all criteria (1)</summary>" in text
    assert r"| a\[bold\]\_\|\`\<b\> (3) |" in text


def test_the_step_stands_beside_a_name_that_ends_in_another() -> None:
    assert step("checkpoint-110", 10).cells[0] == "checkpoint-110 (10)"
    assert step("checkpoint-10", 10).cells[0] == "checkpoint-10"
    assert step("last", None).cells[0] == "last"


def test_steps_stand_in_their_order_run_after_run() -> None:
    given = [("b", 3), ("a", 100), ("a", None), ("b", 1), ("a", 9)]
    steps = [tables.Step(f"{run}-{step}", run, step, *"-----") for run, step in given]
    assert [(s.run, s.step) for s in tables.by_step(steps)] == [("a", 9), ("a", 100), ("a", None), ("b", 1), ("b", 3)]
