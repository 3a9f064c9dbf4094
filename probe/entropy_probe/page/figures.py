"""What is drawn, each figure with a title and a description that says in words what it shows. Per token, in nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from entropy_probe.page.contents import Checkpoint
from entropy_probe.page.drawing import (
    ENTROPY,
    FAINT,
    INK,
    MOMENTUM,
    PREDICTED,
    REALISED,
    WIDTH,
    inline_svg,
)
from entropy_probe.page.shown import number, percent, with_se
from entropy_probe.report import EntropyChangeRow, Part, ProbeReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_BARS, _MOST_PROMPTS = 16, 8


@dataclass(frozen=True)
class Figure:
    title: str
    description: str
    svg: str


def figures_of(key: str, checkpoint: Checkpoint) -> list[Figure]:
    """Those of one checkpoint that can be drawn; `key` begins the ids of their elements."""
    report, details = checkpoint.report, checkpoint.details
    if report is None:
        return []
    rows = [row for row in report.entropy_change if row.eta != 0 and _finite(row.eta)]
    drawn = [_change(report, rows, 0), _change(report, rows, 1), _weights(rows)]
    if details is not None:
        drawn += [_spread(details["tokens"]), _places(details["positions"])]
    drawn += [_sources(report), _parts(report, "layer"), _parts(report, "module")]
    mark = f" These are {report.not_chosen}." if report.not_chosen else ""
    return [
        Figure(title, said + mark, inline_svg(f"{key}-{place}", title, said + mark, draw, height))
        for place, (title, said, draw, height) in enumerate(filter(None, drawn))
    ]


def figures_by_step(key: str, checkpoints: Sequence[Checkpoint]) -> list[Figure]:
    """Entropy over the steps of each run, and the change by the next step."""
    measured = [c for c in checkpoints if c.report is not None]
    if len(measured) < 2:
        return []
    drawn = (_entropy_by_step(measured), _change_by_step(measured))
    marks = {c.report.not_chosen for c in measured if c.report is not None} - {""}
    mark = "".join(f" Some are {of}." for of in sorted(marks))
    return [
        Figure(title, said + mark, inline_svg(f"{key}-{place}", title, said + mark, draw, height))
        for place, (title, said, draw, height) in enumerate(drawn)
    ]


_Drawn = tuple[str, str, Callable[["Axes"], None], float]


def _finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _array(values: Iterable[float | None]) -> np.ndarray:
    """What is missing or not finite is NaN, which is not drawn."""
    array = np.array([math.nan if value is None else value for value in values], dtype=float)
    return np.where(np.isfinite(array), array, math.nan)


def _change(report: ProbeReport, rows: Sequence[EntropyChangeRow], power: int) -> _Drawn | None:
    """ΔH over η, or ΔH/η, whose prediction is slope + ½η·curvature."""
    if not rows or report.update is None:
        return None
    lr = report.update.lr
    rows = [row for row in rows if _finite(row.realised_per_token[0])]
    told = [row for row in rows if _finite(row.predicted_per_token, row.predicted_per_token_se)]
    unit = "nats per token" + (" per unit of η" if power else "")
    title = "ΔH/η over η: the slope" if power else "ΔH over η: the change of the entropy"

    def draw(axes: Axes) -> None:
        axes.axhline(0.0, color=FAINT, linewidth=0.8, zorder=1)
        axes.axvline(lr, color=FAINT, linewidth=1.0, linestyle=":", label=f"lr = {number(lr)}")
        if power and rows:
            _in_decades(axes, rows)
        if told:
            _band(axes, told, power)
        _points(axes, rows, power)
        axes.set(xlabel="η", ylabel=f"ΔH{'/η' if power else ''}, {unit}")
        axes.legend(loc="best")

    step = report.next_step
    said = f"Realised and predicted change of the entropy in {unit}, for {len(rows)} step sizes η."
    if power:
        said += " As far as first order holds, it does not depend on η."
    elif step is not None:
        said += f" At η = lr = {number(lr)} the change is {with_se(*step.realised_per_token)} nats per token"
        predicted = with_se(step.predicted_per_token, step.predicted_per_token_se)
        said += ("" if step.predicted_per_token is None else f", predicted {predicted}") + "."
    return title, said, draw, 2.9


def _in_decades(axes: Axes, rows: Sequence[EntropyChangeRow]) -> None:
    """η on both sides of 0, a decade as wide as the next; the first and the last decade are named."""
    sizes = [abs(row.eta) for row in rows]
    low, high = (math.floor(math.log10(of)) for of in (min(sizes), max(sizes)))
    axes.set_xscale("symlog", linthresh=10.0**low, linscale=0.6)
    signs = {math.copysign(1.0, row.eta) for row in rows}
    ends = {10.0**power for power in (low, high)}
    ticks = sorted({0.0} | {sign * end for sign in signs for end in ends})
    axes.set_xticks(ticks, [number(tick) for tick in ticks])
    axes.minorticks_off()


def _band(axes: Axes, rows: Sequence[EntropyChangeRow], power: int) -> None:
    """predicted/η is linear in η, so that between two η it may be interpolated; its SE nearly so."""
    at = _array(row.eta for row in rows)
    size = np.abs(at)
    decades = np.geomspace(size.min(), size.max(), 40)
    eta = np.unique(np.concatenate([np.linspace(at.min(), at.max(), 41), -decades, decades]))
    eta = eta[(eta >= at.min()) & (eta <= at.max()) & (eta != 0)]
    over = np.abs(eta) ** (1 - power)
    sign = np.sign(eta) ** (1 - power)
    value = np.interp(eta, at, _array(row.predicted_per_token for row in rows) / at) * over * sign
    se = np.interp(eta, at, _array(row.predicted_per_token_se for row in rows) / size) * over
    axes.plot(eta, value, color=PREDICTED, linewidth=1.4, label="predicted ± SE")
    axes.fill_between(eta, value - se, value + se, color=PREDICTED, alpha=0.2, linewidth=0)


def _points(axes: Axes, rows: Sequence[EntropyChangeRow], power: int) -> None:
    for reliable, label in ((True, "realised ± SE"), (False, "realised, not reliable")):
        shown = [row for row in rows if row.reliable == reliable]
        if not shown:
            continue
        eta = _array(row.eta for row in shown)
        axes.errorbar(
            eta,
            _array(row.realised_per_token[0] for row in shown) / eta**power,
            _array(row.realised_per_token[1] for row in shown) / np.abs(eta) ** power,
            fmt="o",
            markersize=4.5,
            capsize=2,
            elinewidth=1,
            color=REALISED,
            markerfacecolor=REALISED if reliable else "none",
            label=label,
        )


def _weights(rows: Sequence[EntropyChangeRow]) -> _Drawn | None:
    rows = [row for row in rows if _finite(row.log_weight_min, row.log_weight_max)]
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: row.eta)

    def draw(axes: Axes) -> None:
        at = _array(row.eta for row in rows)
        _in_decades(axes, rows)
        low, middle, high = (
            _array(getattr(row, f"log_weight_{which}") for row in rows)
            for which in ("min", "median", "max")
        )
        axes.fill_between(at, low, high, color=REALISED, alpha=0.2, linewidth=0, label="min to max")
        axes.plot(at, middle, "o-", color=REALISED, markersize=3.5, linewidth=1, label="median")
        axes.axhline(0.0, color=FAINT, linewidth=0.8, zorder=1)
        axes.set(xlabel="η", ylabel="log-weight of a response, nats")
        axes.figure.subplots_adjust(right=0.86)  # pyright: ignore[reportAttributeAccessIssue]
        beside = axes.twinx()
        beside.spines["right"].set_visible(True)
        ess = _array(row.unclipped_ess_fraction for row in rows)
        beside.plot(at, ess, "s--", color=PREDICTED, markersize=3.5, linewidth=1, label="ESS/N")
        beside.set(ylabel="ESS/N", ylim=(0, 1.05))
        lines = [*axes.get_legend_handles_labels()[0], *beside.get_legend_handles_labels()[0]]
        beside.legend(handles=lines, loc="lower center")

    worst = min(row.unclipped_ess_fraction for row in rows)
    widest = max(max(abs(row.log_weight_min), abs(row.log_weight_max)) for row in rows)
    said = (
        "Log importance weights of the responses and their effective sample size over η. The largest log-weight is "
        f"{number(widest)} nats, the smallest ESS/N {worst:.2f}; 1 means that every response counts fully."
    )
    return "Importance weights and ESS", said, draw, 2.9


def _parts(report: ProbeReport, of: str) -> _Drawn | None:
    """δH₁ by layer or by kind of module."""
    section = report.two_batch or report.first_order
    if section is None:
        return None
    parts: Mapping[str, Part] = getattr(section.delta_h1_parts, of)
    shown = {n: p for n, p in parts.items() if _finite(p.value)}
    if not shown:
        return None
    left_out = len(shown) - _MOST_BARS
    names = list(shown)
    if left_out > 0:
        largest = sorted(names, key=lambda n: -abs(shown[n].value))[:_MOST_BARS]
        names = [name for name in names if name in largest]
    most = max(names, key=lambda n: abs(shown[n].value))
    largest_part = with_se(shown[most].value, shown[most].se, signed=True)

    def draw(axes: Axes) -> None:
        _bars(
            axes,
            names,
            [shown[n].value for n in names],
            [shown[n].se for n in names],
            [PREDICTED] * len(names),
        )
        axes.set(xlabel="δH₁ by a fresh gradient step, nats per response")

    kind = "kind of module" if of == "module" else of
    said = (
        f"First-order change δH₁ of the entropy by a fresh gradient step, as a sum over each {kind}, with standard "
        f"errors. The largest part is {most}: {largest_part} nats per response."
        + (f" The {left_out} smallest are left out." if left_out > 0 else "")
    )
    return f"δH₁ by {kind}", said, draw, _height(len(names))


def _height(bars: int) -> float:
    return max(1.9, 0.85 + 0.24 * bars)


def _bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    ses: Sequence[float | None],
    colours: Sequence[str],
) -> None:
    at = np.arange(len(names))[::-1]
    axes.barh(at, values, color=colours, height=0.68)
    if any(se is not None for se in ses):
        axes.errorbar(values, at, xerr=_array(ses), fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    axes.axvline(0.0, color=FAINT, linewidth=0.8)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    shown = [name if len(name) <= 22 else f"…{name[-21:]}" for name in names]
    axes.set_yticks(at, shown)
    room = (10 + 5.4 * max(map(len, shown))) / (72 * WIDTH)  # a character has some 5 points
    axes.figure.subplots_adjust(left=room)  # pyright: ignore[reportAttributeAccessIssue]
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _sources(report: ProbeReport) -> _Drawn | None:
    """lr·slope of momentum and decay, of the new gradient, and of the prompts with the largest parts in it."""
    update = report.update
    if update is None or not _finite(update.slope_of_v0, *update.slope_by_unit):
        return None
    lr, fresh = update.lr, update.slope_by_unit
    order = sorted(range(len(fresh)), key=lambda u: -abs(fresh[u]))[:_MOST_PROMPTS]
    blocks = report.first_order is not None and report.first_order.mode == "block"
    one = "block" if blocks else "prompt"
    names = ["momentum, decay", "new gradient", *(f"… {one} {u}" for u in order)]
    values = [lr * update.slope_of_v0, lr * math.fsum(fresh), *(lr * fresh[u] for u in order)]
    colours = [MOMENTUM, PREDICTED, *([PREDICTED] * len(order))]

    def draw(axes: Axes) -> None:
        _bars(axes, names, values, [None] * len(values), colours)
        axes.set(xlabel="lr·slope, nats per response")

    said = (
        "First-order change of the entropy by the next step, split into what momentum and decay do "
        f"({number(values[0], signed=True)} nats per response), what the new gradient does "
        f"({number(values[1], signed=True)}), and the {len(order)} {one}s of the update batch with the largest parts "
        f"in it. {percent(update.momentum_share)} of the step was decided before this batch."
    )
    return f"Momentum against new gradient, by {one}", said, draw, _height(len(names))


def _spread(tokens: Mapping[str, Any]) -> _Drawn | None:
    if not tokens["count"]:
        return None

    def draw(axes: Axes) -> None:
        edges = np.array(tokens["edges"])
        axes.bar(edges[:-1], tokens["shares"], np.diff(edges), align="edge", color=ENTROPY)
        axes.set_yscale("log")
        axes.set_ylim(top=1.0)
        axes.yaxis.set_major_formatter(lambda share, _: percent(share))
        axes.set(xlabel="entropy of the token, nats", ylabel="share of tokens")

    said = f"Share of the {tokens['count']} tokens by their entropy, on a logarithmic scale."
    if tokens["carried"] is not None:
        fifth, has = percent(tokens["carriers"]), percent(tokens["carried"])
        said += f" The {fifth} of tokens with the most entropy have {has} of it."
    return "Entropy over tokens", said, draw, 2.9


def _places(positions: Mapping[str, Any]) -> _Drawn | None:
    if not positions["at"]:
        return None

    def draw(axes: Axes) -> None:
        at = positions["at"]
        low, high = positions["low"], positions["high"]
        label = "10 % to 90 % of responses"
        axes.fill_between(at, low, high, color=ENTROPY, alpha=0.2, linewidth=0, label=label)
        axes.plot(at, positions["mean"], color=ENTROPY, linewidth=1.4, label="mean")
        axes.set(xlabel="position of the token in its response", ylabel="entropy, nats")
        axes.set_ylim(bottom=0.0)
        axes.legend(loc="best")

    top = int(np.argmax(positions["mean"]))
    highest, last = number(positions["mean"][top]), number(positions["mean"][-1])
    said = (
        f"Mean entropy at every position, over the responses that are so long. It is highest at position "
        f"{positions['at'][top]}, {highest} nats, and {last} at the last "
        f"({positions['count'][-1]} of {max(positions['count'])} responses are so long)."
    )
    return "Entropy over positions", said, draw, 2.9


def _by_run(checkpoints: Sequence[Checkpoint]) -> dict[str, list[tuple[float, Checkpoint]]]:
    """A checkpoint whose step is not known stands at its place in its run."""
    runs: dict[str, list[tuple[float, Checkpoint]]] = {}
    for checkpoint in checkpoints:
        own = runs.setdefault(checkpoint.run, [])
        own.append((len(own) if checkpoint.step is None else checkpoint.step, checkpoint))
    return runs


def _entropy_by_step(checkpoints: Sequence[Checkpoint]) -> _Drawn:
    def draw(axes: Axes) -> None:
        for place, own in enumerate(_by_run(checkpoints).values()):
            found = [c.report.entropy.per_token for _, c in own if c.report is not None]
            axes.errorbar(
                [at for at, _ in own],
                _array(e.value for e in found),
                _array(e.se for e in found),
                fmt="o-",
                markersize=4,
                capsize=2,
                linewidth=1.2,
                color=ENTROPY if place == 0 else f"C{place}",
            )
        axes.set(xlabel="step", ylabel="H, nats per token")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylim(bottom=0.0)

    first, last = checkpoints[0], checkpoints[-1]
    ends = []
    for checkpoint in (first, last):
        assert checkpoint.report is not None
        h = checkpoint.report.entropy.per_token
        ends.append(f"{with_se(h.value, h.se)} at {checkpoint.name}")
    said = (
        f"Entropy in nats per token of {len(checkpoints)} checkpoints by step: {', '.join(ends)}."
    )
    return "Entropy over steps", said, draw, 2.9


def _change_by_step(checkpoints: Sequence[Checkpoint]) -> _Drawn:
    """What is out of range does not set the scale: its errors can be of any size."""

    def draw(axes: Axes) -> None:
        ends, labels = [0.0], set()
        axes.axhline(0.0, color=FAINT, linewidth=0.8, zorder=1)
        for own in _by_run(checkpoints).values():
            rows = [(at, c.report.next_step) for at, c in own if c.report is not None]
            told = [(at, row) for at, row in rows if row is not None]
            for label, colour, filled, found in (
                ("predicted ± SE", PREDICTED, True, [(at, *_told(r, True)) for at, r in told]),
                ("predicted, out of range", PREDICTED, False, [(at, *_told(r, False)) for at, r in told]),
                ("realised ± SE", REALISED, True, [(at, *r.realised_per_token) for at, r in told]),
            ):  # fmt: skip
                shown = [
                    (at, v, se)
                    for at, v, se in found
                    if v is not None and se is not None and _finite(v, se)
                ]
                if not shown:
                    continue
                if "out" not in label:
                    ends += [v + sign * se for _, v, se in shown for sign in (-1, 1)]
                axes.errorbar(
                    *(_array(of) for of in zip(*shown, strict=True)),
                    fmt="o",
                    markersize=7.5 if colour == REALISED else 4,  # a ring around the prediction
                    capsize=2,
                    color=colour,
                    alpha=1.0 if filled else 0.35,
                    markerfacecolor=colour if filled and colour != REALISED else "none",
                    label=None if label in labels else label,
                )
                labels.add(label)
        margin = 0.1 * (max(ends) - min(ends)) or 1.0
        axes.set_ylim(min(ends) - margin, max(ends) + margin)
        axes.set(xlabel="step", ylabel="ΔH by the next step, nats per token")
        axes.locator_params(axis="x", integer=True)
        if labels:
            axes.legend(loc="best")

    said = "Change of the entropy by the next step of every checkpoint, predicted and realised, in nats per token."
    return "Change by the next step", said, draw, 2.9


def _told(row: EntropyChangeRow, inside: bool) -> tuple[float | None, float | None]:
    if bool(row.in_range) != inside:
        return None, None
    return row.predicted_per_token, row.predicted_per_token_se
