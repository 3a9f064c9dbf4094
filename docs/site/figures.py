"""Draws the figures of the Concepts pages from runs on the bundled checkpoint: `python docs/site/figures.py`.

`python docs/site/figures.py layers` draws the picture of the layers alone, from the contract in pyproject.toml.
`figures.json` beside them holds the numbers that the pages quote; `tests/test_site.py` holds the pages to it.
"""

from __future__ import annotations

import json
import sys
import textwrap
import tomllib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import matplotlib.style
import numpy as np

from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.atomic import write_atomically
from entropy_probe.demo import checkpoint_path
from entropy_probe_checks.criteria import CRITERIA

PLACE = Path(__file__).parents[1] / "concepts"
ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "golden" / "demo"
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8f98"  # Okabe and Ito's
STYLE: dict[str, Any] = {
    "svg.hashsalt": "entropy-probe",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
FACTORS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Steps at which weights are shown, in learning rates."""


def measured(**sections: Any) -> ProbeReport:
    """On the stored responses and in float64, so that every machine draws the same figures."""
    given = {"budget": "smoke", "precision": {"dtype": "float64"}, **sections}
    config = ProbeConfig.from_mapping(given)
    return run_probe(checkpoint_path(), config, GOLDEN / "e.jsonl", GOLDEN / "u.jsonl", name="demo")


def arrays(report: ProbeReport) -> Any:
    assert report.evidence is not None
    return report.evidence.arrays


def saved(
    name: str, size: tuple[float, float], draw: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """Draw into a figure, write it, and give back the numbers that a page may quote."""
    image = BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        figure = plt.figure(figsize=size, layout="constrained")
        numbers = draw(figure)
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    lines = (line.rstrip() for line in image.getvalue().decode().splitlines())
    write_atomically(PLACE.parent / f"{name}.svg", ("\n".join(lines) + "\n").encode())
    return numbers


def entropy(report: ProbeReport) -> Callable[[Any], dict[str, Any]]:
    """One response: how open the policy is before each of its tokens."""
    tokenizer = load_checkpoint(checkpoint_path()).tokenizer
    of = arrays(report)
    lengths = of["e.gen_lens"].reshape(16, 8)
    sums = of["e.entropy"].sum(2)
    chosen = np.where((lengths >= 20) & (lengths <= 24), sums, -1.0)  # short enough to read
    prompt, response = np.unravel_index(chosen.argmax(), chosen.shape)
    row, length = prompt * 8 + response, int(lengths[prompt, response])
    start = int(of["e.prompt_lens"][row])
    ids = of["e.ids"][row, start : start + length]
    entropies = of["e.entropy"][prompt, response, :length]

    def draw(figure: Any) -> dict[str, Any]:
        axes = figure.subplots()
        axes.bar(range(length), entropies, color=BLUE, width=0.8)
        words = [str(tokenizer.decode([one])).replace(" ", "␣").replace("\n", "⏎") for one in ids]
        axes.set_xticks(range(length), words, family="monospace", fontsize=8, rotation=90)
        axes.set_xlim(-0.7, length - 0.3)
        axes.set_ylabel("entropy before this token (nats)")
        total = float(entropies.sum())
        axes.set_title(
            f"one response of {length} tokens: {total:.2f} nats in all, {total / length:.3f} nats per token",
            loc="left",
        )
        certain = int((entropies < 0.01).sum())
        return {
            "tokens": length,
            "response": total,
            "per_token": total / length,
            "certain": certain,
        }

    return draw


def next_step(report: ProbeReport) -> Callable[[Any], dict[str, Any]]:
    """What slope and curvature predict, and what was realised, step by step."""
    update = report.update
    assert update is not None
    slope, curvature, lr = update.delta_h1_per_lr_rb, update.curvature or 0.0, update.lr
    rows = [row for row in report.entropy_change if row.delta_h_pd is not None]

    def draw(figure: Any) -> dict[str, Any]:
        axes = figure.subplots()
        reach = 5.5 * lr
        etas = np.linspace(0, reach, 60)
        axes.plot(etas / lr, slope * etas, color=GREY, linestyle="--", label="slope alone")
        axes.plot(
            etas / lr,
            slope * etas + curvature * etas**2 / 2,
            color=BLUE,
            label="predicted: slope and curvature",
        )
        seen = [row for row in rows if 0 <= row.eta <= reach]
        at = [row.eta / lr for row in seen]
        bars = [row.realised[1] for row in seen]
        axes.errorbar(
            at,
            [row.realised[0] for row in seen],
            bars,
            fmt="o",
            color=RED,
            capsize=3,
            label="realised ± SE",
        )
        axes.axhline(0, color="black", linewidth=0.6)
        axes.axvline(1, color=GREEN, linewidth=1)
        axes.annotate(
            "the optimizer's\nnext step",
            (1, axes.get_ylim()[1]),
            (1.1, axes.get_ylim()[1]),
            color=GREEN,
            va="top",
        )
        axes.set_xlabel("size of the step, in learning rates")
        axes.set_ylabel("change of the entropy\n(nats per response)")
        axes.legend(loc="lower left", frameon=False)
        step = report.next_step
        assert step is not None
        return {
            "predicted": step.predicted,
            "realised": step.realised[0],
            "se": step.realised[1],
            "slope": slope,
        }

    return draw


def u_statistic(report: ProbeReport) -> Callable[[Any], dict[str, Any]]:
    """X_nᵀPY_m for every pair of prompts."""
    of = arrays(report)
    products = of["u.gram.k"].sum(0)

    def draw(figure: Any) -> dict[str, Any]:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.1])
        units = len(products)
        shown = np.sign(products) * np.log10(1 + np.abs(products))
        most = float(np.abs(shown).max())
        image = left.imshow(shown, cmap="RdBu_r", vmin=-most, vmax=most)
        left.set_xlabel("gradient of the objective, prompt m")
        left.set_ylabel("gradient of the entropy, prompt n")
        left.set_title("products of prompt n with prompt m", loc="left")
        bar = figure.colorbar(image, ax=left, shrink=0.7)
        ticks = [-4, -2, 0, 2, 4]
        bar.set_ticks(ticks, labels=["−10⁴", "−10²", "0", "10²", "10⁴"])
        own = np.diag(products)
        others = products[~np.eye(units, dtype=bool)]
        everything, pairs = float(products.mean()), float(others.mean())
        assert report.first_order is not None
        se = report.first_order.se_plugin
        right.errorbar(
            [everything, pairs], [1, 0], xerr=[[0, se], [0, se]], fmt="o", color=RED, capsize=3
        )
        right.set_yticks([1, 0], ["with the\ndiagonal", "pairs of different\nprompts: U"])
        right.set_ylim(-0.6, 1.6)
        right.axvline(0, color="black", linewidth=0.6)
        right.set_title("their mean", loc="left")
        right.set_xlabel("nats per response and learning rate")
        return {
            "with_diagonal": everything,
            "u_cross": pairs,
            "se": se,
            "diagonal": float(own.mean()),
            "units": units,
        }

    return draw


def importance(report: ProbeReport) -> Callable[[Any], dict[str, Any]]:
    """The weights of the same responses at larger and larger steps."""
    of = arrays(report)
    assert report.update is not None
    lr = report.update.lr
    etas = [row.eta for row in report.entropy_change]
    lengths = of["e.gen_lens"].reshape(16, 8)
    inside = np.arange(of["e.logp"].shape[2]) < lengths[:, :, None]
    before = (of["e.logq"] * inside).sum(2).ravel()
    fractions = {row.eta / lr: row.unclipped_ess_fraction for row in report.entropy_change}

    def draw(figure: Any) -> dict[str, Any]:
        left, right = figure.subplots(1, 2)
        for factor, color in ((1.0, GREEN), (10.0, BLUE), (30.0, RED)):
            (place,) = (i for i, eta in enumerate(etas) if np.isclose(eta, factor * lr))
            after = (of[f"after.{place}.logp"] * inside).sum(2).ravel()
            weights = np.exp(after - before - (after - before).max())
            shares = np.sort(weights / weights.sum())[::-1]
            left.plot(np.cumsum(shares), color=color, label=f"{factor:g} × lr")
        left.set_xlabel("responses, the heaviest first")
        left.set_ylabel("share of all weight")
        left.set_title("how few responses carry the weight", loc="left")
        left.legend(frameon=False, loc="lower right")
        at = sorted(factor for factor in fractions if factor > 0)
        right.semilogx(at, [fractions[factor] for factor in at], "o-", color=BLUE)
        right.axhline(0.5, color=GREY, linestyle="--")
        right.annotate("limit of ess: 0.5", (at[0], 0.52), color=GREY)
        right.set_xlabel("size of the step, in learning rates")
        right.set_ylabel("ESS/N")
        right.set_ylim(0, 1.05)
        right.set_title("the effective share of the sample", loc="left")
        found = {f"ess_{factor:g}": fractions[factor] for factor in at}
        return found | {"responses": float(len(before))}

    return draw


def verdict(
    healthy: ProbeReport, large: ProbeReport, other: ProbeReport
) -> Callable[[Any], dict[str, Any]]:
    """The same criteria of a healthy run, of one whose step the sample cannot judge, and of one with a fault."""
    names = ("ess", "pareto_k", "on_policy", "param_scaling", "se_agreement", "padding_invariance")
    panels_of = {
        "healthy": (healthy, "healthy"),
        "large": (large, "a step 60 times as large"),
        "other": (other, "another temperature"),
    }
    colors = {"pass": GREEN, "fail": RED, "inconclusive": "#E69F00", "not_applicable": GREY}

    def draw(figure: Any) -> dict[str, Any]:
        panels = figure.subplots(1, len(panels_of), sharey=True)
        numbers: dict[str, Any] = {}
        for axes, (key, (report, title)) in zip(panels, panels_of.items(), strict=True):
            for place, name in enumerate(reversed(names)):
                found = CRITERIA[name](report)
                color, value, limit = colors[found.status], found.value, found.limit
                if (
                    isinstance(value, float)
                    and isinstance(limit, float)
                    and found.status != "not_applicable"
                ):
                    used = limit / value if name == "ess" else value / limit
                    axes.barh(
                        place, np.log10(max(used, 1e-4) / 1e-4), left=-4, color=color, height=0.6
                    )
                said = found.status.replace("_", " ")
                axes.text(-3.95, place + 0.42, said, fontsize=7.5, color=color, va="center")
                numbers[f"{name}_{key}"] = found.status
            axes.axvline(0, color="black", linewidth=1)
            axes.set_yticks(range(len(names)), reversed(names), family="monospace")
            axes.set_xticks([-4, -2, 0], ["10⁻⁴", "10⁻²", "limit"])
            axes.set_xlim(-4, 1.5)
            axes.set_title(title, loc="left")
        return numbers

    return draw


def layers(figure: Any) -> dict[str, Any]:
    """The packages, and the layers of the library as import-linter holds them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    of_library = next(
        one["layers"] for one in contracts if "entropy_probe.run" in str(one.get("layers"))
    )
    axes = figure.subplots()
    axes.axis("off")
    axes.set_xlim(0, 100)
    axes.set_ylim(-1.5, len(of_library) + 2.2)

    def box(x: float, y: float, width: float, height: float, text: str, color: str) -> None:
        axes.add_patch(
            plt.Rectangle((x, y), width, height, facecolor=color, alpha=0.16, edgecolor=color)
        )
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)

    def arrow(start: tuple[float, float], end: tuple[float, float], text: str) -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "black"})
        axes.text(
            (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.35, text, ha="center", fontsize=8
        )

    top = len(of_library)
    axes.text(
        33, top + 0.35, "entropy_probe, the library: a layer imports those below it", ha="center"
    )
    for place, names in enumerate(reversed(of_library)):
        short = " · ".join(name.strip().removeprefix("entropy_probe.") for name in names.split("|"))
        box(2, place + 0.08, 62, 0.84, textwrap.fill(short, 72), BLUE)
    box(76, top - 3, 22, 2.6, "pytest_entropy_probe\nthe plugin connects", RED)
    box(76, 5, 22, 2.6, "entropy_probe_checks\nthe checks judge", GREEN)
    box(76, 0.4, 22, 2.6, "entropy_probe_checks.audit\nshares no code", GREEN)
    arrow((76, top - 1.5), (64.5, top - 1.5), "runs")
    arrow((64.5, 6.3), (76, 6.3), "report")
    arrow((64.5, 1.7), (76, 1.7), "evidence")
    arrow((87, top - 3.1), (87, 7.7), "")
    axes.text(88, (top + 4.6) / 2, "asks", fontsize=8)
    arrow((87, 4.9), (87, 3.1), "")
    return {}


def main(chosen: list[str]) -> None:
    saved("contributing/layers", (8.6, 5.6), layers)
    if chosen == ["layers"]:
        return
    lr = 1e-3
    etas = [factor * lr for factor in FACTORS] + [0.3 * lr, 2 * lr, 4 * lr, 5 * lr]
    report = measured(true_delta_h={"etas": sorted(etas)})
    large = measured(first_order={"lr": 60 * lr})
    other = measured(generation={"temperature": 0.7})
    numbers = {
        "entropy": saved("concepts/entropy", (7.4, 3.0), entropy(report)),
        "next-step": saved("concepts/next-step", (6.2, 3.4), next_step(report)),
        "u-statistic": saved("concepts/u-statistic", (7.6, 3.2), u_statistic(report)),
        "importance": saved("concepts/importance", (7.4, 2.9), importance(report)),
        "verdict": saved("concepts/verdict", (8.6, 3.0), verdict(report, large, other)),
    }
    numbers["demo"] = {
        "per_token": report.entropy.per_token.value,
        "per_token_se": report.entropy.per_token.se,
    }
    text = json.dumps(numbers, indent=1, default=float) + "\n"
    write_atomically(PLACE / "figures.json", text.encode())


if __name__ == "__main__":
    main(sys.argv[1:])
