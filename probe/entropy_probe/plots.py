"""Prediction against realisation, η by η: a figure (matplotlib, the extra `plots`) and a table of 80 columns.

Both read the report alone. Left in the figure is ΔH; right is ΔH/η, on which decades of η can be compared: there the
prediction is slope + ½η·curvature, and the bars are the SE of realised − predicted, which share their prompts.
Of several checkpoints, a second kind of figure shows entropy, prediction and realisation step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from entropy_probe.atomic import write_atomically
from entropy_probe.errors import ConfigError
from entropy_probe.report import Compared, EntropyChangeRow, ProbeReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
# Okabe and Ito's palette, which stays apart for colour-blind readers and in grey.
_PREDICTED, _REALISED, _END = "#0072B2", "#D55E00", "#009E73"
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "entropy-probe",
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "savefig.dpi": 150,
}
_NO_DATE: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}
_RESTRICTED = "top_p < 1: the change within the nucleus, about which nothing is predicted"
_SAME_BATCH = "one batch: what is realised holds the noise that the update fitted"


def require_drawable(path: Path) -> None:
    """A `ConfigError` where no figure could be written to `path`: another suffix, or no matplotlib."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            path,
            "is not a kind of figure that can be written",
            f"end its name in {' or '.join(FORMATS)}",
        )
    if find_spec("matplotlib") is None:
        raise ConfigError(
            path, "figures need matplotlib", "pip install pytest-entropy-probe[plots]"
        )


def save_figure(report: ProbeReport, path: Path) -> None:
    """Draw into a .png or .svg file, atomically; the same report gives the same bytes.

    The user's own matplotlib settings are neither used nor changed.
    """
    _save(lambda: _figure(report), path)


def save_steps(checkpoints: Sequence[tuple[str, int | None, ProbeReport]], path: Path) -> None:
    """Draw (run, step, report) of several checkpoints, in order: entropy over steps, and below it the change by the
    next step, predicted and realised at η = lr. A checkpoint whose step is not known stands at its place in its run."""
    _save(lambda: _steps_figure(checkpoints), path)


def _save(draw: Callable[[], Figure], path: Path) -> None:
    require_drawable(path)
    import matplotlib.style

    image = BytesIO()
    kind = path.suffix.lower()
    with matplotlib.style.context(["default", _STYLE]):
        draw().savefig(image, format=kind[1:], metadata=_NO_DATE[kind])
    write_atomically(path, image.getvalue())


def text_table(report: ProbeReport, *, plain: bool = False) -> str:
    """One line per η, within 80 columns: predicted and realised with their SE, (realised − predicted)/SE of that
    difference, realised/predicted, ESS/N, and whether the two are to be compared; in ASCII where `plain`."""
    if report.update is None:
        return f"nothing about the next step: {report.no_second_moment}"
    eta, se = ("eta", "+/- SE") if plain else ("η", "± SE")
    heading = (eta, "predicted", se, "realised", se, "diff/SE", "ratio", "ESS/N", "in range")
    rows = [row for row in report.entropy_change if row.eta != 0]
    lines = []
    for k, of in enumerate(report.compared(rows[0]) if rows else []):
        lines.append(f"prediction against realisation ({of.unit}){_mark(report)}")
        cells = [heading, *(_cells(row, report.compared(row)[k]) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += [
            " ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in cells
        ]
    if not rows:
        lines.append("prediction against realisation: no step beside 0")
    star = report.update.eta_star
    notes = [] if star is None else [f"{eta}* = {star:.3g}"]
    return "\n".join([*lines, *notes, *_warnings(report)])


def _mark(report: ProbeReport) -> str:
    return f", {report.not_chosen}" if report.not_chosen else ""


def _cells(row: EntropyChangeRow, of: Compared) -> tuple[str, ...]:
    off, ratio = _over(of.difference, of.difference_se), of.ratio
    numbers = (
        (row.eta, ".2g"),
        (of.predicted, "+.3g"),
        (of.predicted_se, ".2g"),
        (of.realised, "+.3g"),
        (of.realised_se, ".2g"),
        (off, "+.2f" if off is None or abs(off) < 100 else "+.1e"),
        (ratio, ".2f" if ratio is None or abs(ratio) < 100 else ".0e"),
        (row.unclipped_ess_fraction, ".2f"),
    )
    shown = ("-" if value is None else format(value, digits) for value, digits in numbers)
    return (*shown, "-" if row.in_range is None else "yes" if row.in_range else "no")


def _over(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def _restricted(report: ProbeReport) -> bool:
    return any(row.restricted for row in report.entropy_change)


def _warnings(report: ProbeReport) -> list[str]:
    """What must be known before the numbers are read."""
    said = {_RESTRICTED: _restricted(report), _SAME_BATCH: report.batch.same_batch}
    found = [warning for warning, holds in said.items() if holds]
    return [*([report.not_chosen] if report.not_chosen else []), *found]


def _figure(report: ProbeReport) -> Figure:
    from matplotlib.figure import Figure

    rows = [row for row in report.entropy_change if row.eta != 0 and _finite(row.eta)]
    units = len(report.compared(rows[0])) if rows else 1
    figure = Figure(figsize=(10.0, 0.8 + 3.6 * units), layout="constrained")
    figure.suptitle(_title(report, rows), parse_math=False)
    panels = figure.subplots(units, 2, squeeze=False)
    for k, (change, slope) in enumerate(panels):
        points = [Point(row, report.compared(row)[k]) for row in rows]
        points = [point for point in points if _finite(point.change.realised)]
        _panels(report, points, change, slope)
    handles, labels = panels[0, 1].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


class Point(NamedTuple):
    """What is drawn at one η: the row, and its change in one unit."""

    row: EntropyChangeRow
    change: Compared

    @property
    def eta(self) -> float:
        return self.row.eta


def _panels(report: ProbeReport, points: Sequence[Point], change: Axes, slope: Axes) -> None:
    """The change in one unit, and the same over η."""
    unit = points[0].change.unit if points else report.unit_of_change
    change.set(xlabel="η", ylabel=f"ΔH ({unit})", title="the change; bars: SE of realised")
    change.locator_params(axis="x", nbins=5)
    against = "" if _restricted(report) else " − predicted"
    slope.set(
        xlabel="η",
        ylabel=f"ΔH/η ({unit} per unit η)",
        title=f"over η; bars: SE of realised{against}",
    )
    if points:
        decade = math.floor(math.log10(min(abs(point.eta) for point in points)))
        slope.set_xscale("symlog", linthresh=10.0**decade, linscale=0.7)
    for axes, power in ((change, 0), (slope, 1)):
        _predicted(axes, points, power)
        _realised(axes, points, power)
        _marks(axes, report, [point.row for point in points], power)


def _steps_figure(checkpoints: Sequence[tuple[str, int | None, ProbeReport]]) -> Figure:
    """Predictions that are out of range are pale, and do not set the scale: their errors can be of any size."""
    from matplotlib.figure import Figure

    units = min(
        (len(report.compared(row)) for _, _, report in checkpoints if (row := report.next_step)),
        default=1,
    )
    figure = Figure(figsize=(8.0, 2.8 * (1 + units)), layout="constrained")
    figure.suptitle("entropy over steps, and its change by the next step", parse_math=False)
    entropy, *changes = figure.subplots(1 + units, 1, sharex=True)
    not_chosen = {report.not_chosen for _, _, report in checkpoints} - {""}
    beside = "".join(f"\n{mark}" for mark in sorted(not_chosen))
    entropy.set(ylabel=f"H (nats/token){beside}")
    changes[-1].set(xlabel="step")
    runs = list(dict.fromkeys(run for run, _, _ in checkpoints))
    several = len(runs) > 1
    for number, run in enumerate(runs):
        mine = [(step, report) for name, step, report in checkpoints if name == run]
        at = _array(place if step is None else step for place, (step, _) in enumerate(mine))
        color = f"C{number}" if several else ""
        tokens = [report.entropy.per_token for _, report in mine]
        of = f", {Path(run).name}".replace("$", r"\$") if several else ""  # no formula
        values = [(e.value, e.se) for e in tokens]
        _bars(entropy, at, values, label=f"H ± SE{of}", color=color or _END, linestyle="-")
    for k, axes in enumerate(changes):
        _changes_by_step(axes, checkpoints, runs, k, beside)
    entropy.set_ylim(bottom=0.0)
    for axes in (entropy, *changes):
        axes.legend(frameon=False)
    return figure


def _changes_by_step(
    axes: Axes,
    checkpoints: Sequence[tuple[str, int | None, ProbeReport]],
    runs: Sequence[str],
    k: int,
    beside: str,
) -> None:
    """The change by the next step in the k-th unit, checkpoint by checkpoint."""
    axes.axhline(0.0, color="0.6", linewidth=0.8, zorder=1)
    ends, unit = [0.0], ("nats/token", "nats/response")[k]
    axes.set(ylabel=f"ΔH by the next step\n({unit}){beside}")
    for number, run in enumerate(runs):
        mine = [(step, report) for name, step, report in checkpoints if name == run]
        at = _array(place if step is None else step for place, (step, _) in enumerate(mine))
        realised, inside, outside = [], [], []
        for _, report in mine:
            row, nothing = report.next_step, (None, None)
            if row is None:
                found = nothing, nothing, nothing
            else:
                of = report.compared(row)[k]
                told = of.predicted, of.predicted_se
                pair = (told, nothing) if row.in_range else (nothing, told)
                found = (of.realised, of.realised_se), *pair
            for values, value in zip((realised, inside, outside), found, strict=True):
                values.append(value)
        ends += [
            value + se * sign
            for value, se in (*realised, *inside)
            if value is not None and se is not None
            for sign in (-1, 1)
        ]
        of_run = f"C{number}" if len(runs) > 1 else ""
        for label, color, style, values in (
            ("predicted ± SE", _PREDICTED, {}, inside),
            ("predicted, out of range", _PREDICTED, {"alpha": 0.25}, outside),
            ("realised ± SE", _REALISED, {"markerfacecolor": "white"}, realised),
        ):
            label = label if number == 0 else None
            _bars(axes, at, values, label=label, color=of_run or color, **style)
    low, high = min(filter(math.isfinite, ends)), max(filter(math.isfinite, ends))
    margin = 0.1 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _bars(
    axes: Axes, at: Any, values: Sequence[tuple[float | None, float | None]], **style: Any
) -> None:
    shape = {"marker": "o", "markersize": 4, "capsize": 2, "linestyle": "", **style}
    axes.errorbar(at, _array(v for v, _ in values), _array(se for _, se in values), **shape)


def _title(report: ProbeReport, rows: Sequence[EntropyChangeRow]) -> str:
    name = report.checkpoint.name
    title = f"{name if len(name) <= 50 else '…' + name[-49:]}: entropy along the next update, predicted and realised"
    return "\n".join(
        [
            title,
            *_warnings(report),
            *([] if rows else [report.no_second_moment or "nothing was measured"]),
        ]
    )


def _finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _array(values: Iterable[float | None]) -> Any:
    """As an array; what is missing or not finite is NaN, which is not drawn."""
    array = np.array([math.nan if value is None else value for value in values], dtype=float)
    return np.where(np.isfinite(array), array, math.nan)


def _predicted(axes: Axes, points: Sequence[Point], power: int) -> None:
    """predicted/η is linear in η, so that between two η of the report it may be interpolated; its SE nearly so."""
    points = [point for point in points if _finite(point.change.predicted)]
    if not points:
        return
    at = _array(point.eta for point in points)
    size = np.abs(at)
    decades = np.geomspace(size.min(), size.max(), 200)
    eta = np.unique(np.concatenate([np.linspace(at.min(), at.max(), 200), -decades, decades, at]))
    eta = eta[(eta >= at.min()) & (eta <= at.max())]
    value = np.interp(eta, at, _array(point.change.predicted for point in points) / at) * eta ** (
        1 - power
    )
    se = np.interp(eta, at, _array(point.change.predicted_se for point in points) / size) * np.abs(
        eta
    ) ** (1 - power)
    axes.plot(eta, value, color=_PREDICTED, label="predicted ± SE")
    axes.fill_between(eta, value - se, value + se, color=_PREDICTED, alpha=0.2, linewidth=0)


def _realised(axes: Axes, points: Sequence[Point], power: int) -> None:
    for hollow, label in ((False, "realised"), (True, "realised, not reliable: ESS/N or k̂")):
        shown = [point for point in points if point.row.reliable != hollow]
        if not shown:
            continue
        eta = _array(point.eta for point in shown)
        changes = [point.change for point in shown]
        se = _array(
            of.difference_se if power and of.predicted is not None else of.realised_se
            for of in changes
        )
        axes.errorbar(
            eta,
            _array(of.realised for of in changes) / eta**power,
            se / np.abs(eta) ** power,
            fmt="o",
            markersize=5,
            capsize=2,
            elinewidth=1,
            color=_REALISED,
            markerfacecolor="white" if hollow else _REALISED,
            label=label,
        )


def _marks(axes: Axes, report: ProbeReport, rows: Sequence[EntropyChangeRow], power: int) -> None:
    """Where the two are compared; the learning rate; η*, in the linear panel only where it comes near."""
    beyond = [row.eta for row in rows if not row.in_range]
    low, high = (
        max([e for e in beyond if e < 0], default=-math.inf),
        min([e for e in beyond if e > 0], default=math.inf),
    )
    compared = [0.0, *(row.eta for row in rows if row.in_range and low < row.eta < high)]
    if len(compared) > 1:
        axes.axvspan(min(compared), max(compared), color="0.95", zorder=0, label="in range")
    axes.axhline(0.0, color="0.6", linewidth=0.8, zorder=1)
    if report.update is None:
        return
    lr, star = report.update.lr, report.update.eta_star
    axes.axvline(lr, color="0.3", linewidth=1, linestyle=":", label=f"lr = {lr:.3g}")
    reach = max((abs(row.eta) for row in rows), default=lr)
    if star is not None and math.isfinite(star) and (power or star <= 2 * reach):
        axes.axvline(star, color=_END, linewidth=1.2, linestyle="--", label=f"η* = {star:.3g}")
