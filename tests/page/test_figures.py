"""What is drawn is what the report says: points, bands and bars are read back from matplotlib's own objects."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure

from entropy_probe import ProbeReport
from entropy_probe.page import figures
from entropy_probe.page.contents import Checkpoint
from entropy_probe.page.drawing import MOMENTUM, PREDICTED, inline_svg


def axes_of(drawn: Any) -> Axes:
    assert drawn is not None
    axes = Figure().subplots()
    drawn[2](axes)
    return axes


def rows_of(report: ProbeReport) -> list[Any]:
    return [row for row in report.entropy_change if row.eta != 0]


def report_of(checkpoint: Checkpoint) -> ProbeReport:
    assert checkpoint.report is not None
    return checkpoint.report


@pytest.mark.parametrize("power", [0, 1])
def test_the_change_is_that_of_the_report(three: list[Checkpoint], power: int) -> None:
    for checkpoint in three:
        report = report_of(checkpoint)
        rows = rows_of(report)
        axes = axes_of(figures._change(report, rows, power))
        found: dict[float, tuple[float, float, str]] = {}
        for points in axes.containers:
            assert isinstance(points, ErrorbarContainer)
            label = points.get_label()
            (low_high,) = points[2]
            for x, y, ((_, low), (_, high)) in zip(*points[0].get_data(), low_high.get_segments(), strict=True):
                found[float(x)] = float(y), (high - low) / 2, label
        assert sorted(found) == sorted(row.eta for row in rows)
        line = next(line for line in axes.lines if line.get_label() == "predicted ± SE")
        told = dict(zip(*map(np.ndarray.tolist, map(np.asarray, line.get_data())), strict=True))
        for row in rows:
            y, se, label = found[row.eta]
            assert y == pytest.approx(row.realised_per_token[0] / row.eta**power)
            assert se == pytest.approx(row.realised_per_token[1] / abs(row.eta) ** power, rel=1e-6)
            assert ("not reliable" in label) == (not row.reliable)
        ends = {min(told), max(told)}
        for row in rows:
            if row.eta in ends:
                assert told[row.eta] == pytest.approx(row.predicted_per_token / row.eta**power)
        assert ends <= {row.eta for row in rows}


def test_weights_and_ess(three: list[Checkpoint]) -> None:
    report = report_of(three[1])
    axes = axes_of(figures._weights(rows_of(report)))
    beside = axes.figure.axes[1]
    rows = sorted(rows_of(report), key=lambda row: row.eta)
    median = next(line for line in axes.lines if line.get_label() == "median")
    assert list(median.get_ydata()) == [row.log_weight_median for row in rows]
    assert list(beside.lines[0].get_ydata()) == [row.unclipped_ess_fraction for row in rows]
    (band,) = axes.collections
    drawn = band.get_paths()[0].vertices
    assert drawn[:, 1].min() == min(row.log_weight_min for row in rows)
    assert drawn[:, 1].max() == max(row.log_weight_max for row in rows)


def bars_of(axes: Axes) -> dict[str, tuple[float, Any]]:
    (bars,) = (of for of in axes.containers if isinstance(of, BarContainer))
    names = [label.get_text() for label in axes.get_yticklabels()]
    return {name: (bar.get_width(), bar.get_facecolor()) for name, bar in zip(names, bars, strict=True)}


@pytest.mark.parametrize("of", ["layer", "module"])
def test_parts_of_the_first_order_change(three: list[Checkpoint], of: str) -> None:
    report = report_of(three[0])
    assert report.two_batch is not None
    parts = getattr(report.two_batch.delta_h1_parts, of)
    found = bars_of(axes_of(figures._parts(report, of)))
    assert {name: width for name, (width, _) in found.items()} == {n: part.value for n, part in parts.items()}
    assert math.fsum(width for width, _ in found.values()) == pytest.approx(report.two_batch.delta_h1)


def test_momentum_and_the_new_gradient(three: list[Checkpoint]) -> None:
    from matplotlib.colors import to_rgba

    report = report_of(three[0])
    update = report.update
    assert update is not None
    found = bars_of(axes_of(figures._sources(report)))
    lr = update.lr
    assert found.pop("momentum, decay") == (lr * update.slope_of_v0, to_rgba(MOMENTUM))
    whole, colour = found.pop("new gradient")
    assert (whole, colour) == (pytest.approx(lr * sum(update.slope_by_unit)), to_rgba(PREDICTED))
    assert {name: width for name, (width, _) in found.items()} == {
        f"… prompt {u}": lr * slope for u, slope in enumerate(update.slope_by_unit)
    }


def test_tokens_and_positions(three: list[Checkpoint]) -> None:
    details = three[0].details
    assert details is not None
    axes = axes_of(figures._spread(details["tokens"]))
    (bars,) = axes.containers
    assert [bar.get_height() for bar in bars] == details["tokens"]["shares"]
    assert [bar.get_x() for bar in bars] == details["tokens"]["edges"][:-1]
    axes = axes_of(figures._places(details["positions"]))
    assert list(axes.lines[0].get_ydata()) == details["positions"]["mean"]
    assert list(axes.lines[0].get_xdata()) == details["positions"]["at"]


def test_checkpoints_by_step(three: list[Checkpoint]) -> None:
    """In the order of their steps, run by run; what is out of range stands apart."""
    other = replace(three[2], run="another run", step=None)
    shown = [*three, other]
    axes = axes_of(figures._entropy_by_step(shown))
    first, second = (points[0] for points in axes.containers)
    assert list(first.get_xdata()) == [1, 2, 3]
    assert list(first.get_ydata()) == [report_of(c).entropy.per_token.value for c in three]
    assert list(second.get_xdata()) == [0]
    axes = axes_of(figures._change_by_step(three))
    found = {points.get_label(): points[0].get_ydata().tolist() for points in axes.containers}
    steps = [report_of(c).next_step for c in three]
    assert found["realised ± SE"] == [step.realised_per_token[0] for step in steps if step is not None]
    assert [step.in_range for step in steps if step is not None] == [True, False, True]
    told = [step.predicted_per_token for step in steps if step is not None]
    assert found["predicted ± SE"] == [told[0], told[2]]
    assert found["predicted, out of range"] == [told[1]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eta", math.inf),
        ("delta_h_per_token_pd", math.nan),
        ("delta_h_per_token_pd_se", math.inf),
        ("predicted_per_token", math.nan),
        ("log_weight_max", math.inf),
    ],
)
def test_nan_and_infinities_are_left_out(three: list[Checkpoint], field: str, value: float) -> None:
    """Of one row: nothing is raised, and the figures are there."""
    report = report_of(three[0])
    rows = [row.model_copy(update={field: value} if k == 1 else {}) for k, row in enumerate(rows_of(report))]
    kept = [row for row in rows if math.isfinite(row.eta)]
    for drawn in (figures._change(report, kept, 0), figures._change(report, kept, 1), figures._weights(kept)):
        axes = axes_of(drawn)
        axes.figure.draw_without_rendering()
        assert axes.lines


def test_numbers_in_the_text_of_a_figure_are_whole() -> None:
    """Coordinates lose digits, labels do not; ids are of this figure; a text is escaped."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 0.123456])
        axes.set_title("0.00012345 of 1")

    svg = inline_svg("k", "<b>title", "a & b", draw)
    assert ">0.00012345 of 1</text>" in svg
    assert '<title id="k-title">&lt;b&gt;title</title><desc id="k-description">a &amp; b</desc>' in svg
    assert "xmlns" not in svg
    assert "DejaVu" not in svg
