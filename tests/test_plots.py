"""The figure and the table of prediction against realisation, on a report and on poisoned ones."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import models
from entropy_probe import ProbeConfig, ProbeError, ProbeReport, run_probe
from entropy_probe.__main__ import main
from entropy_probe.plots import _figure, save_figure, save_steps, text_table

COMPARED = ("predicted", "predicted_se", "difference", "difference_se")
OF_TOKENS = ("predicted_per_token", "predicted_per_token_se", "difference_per_token", "difference_per_token_se")
UNPREDICTED = dict.fromkeys((*COMPARED, *OF_TOKENS, "ratio", "in_range"))
NAN = {name: math.nan for name in (*COMPARED, *OF_TOKENS, "delta_h_pd_se", "delta_h_per_token_pd_se")}
NAN |= {"predicted_se": math.inf, "predicted_per_token_se": math.inf}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ProbeReport:
    folder = tmp_path_factory.mktemp("plots")
    path = models.adapter_checkpoint(folder / "ckpt", "llama", adamw={"lr": 1e-5})
    e = models.random_rollouts(folder / "e.jsonl", prompts=5, responses=3, seed=1)
    u = models.random_rollouts(folder / "u.jsonl", prompts=6, responses=3, seed=2)
    return run_probe(path, ProbeConfig(), e, u)


def with_rows(report: ProbeReport, **changes: Any) -> ProbeReport:
    rows = [row.model_copy(update=changes) for row in report.entropy_change]
    return report.model_copy(update={"entropy_change": rows})


def with_eta_star(report: ProbeReport, eta_star: float) -> ProbeReport:
    return report.model_copy(update={"update": report.update.model_copy(update={"eta_star": eta_star})})


def named(report: ProbeReport, name: str) -> ProbeReport:
    return report.model_copy(update={"checkpoint": report.checkpoint.model_copy(update={"name": name})})


def entries(report: ProbeReport) -> set[str]:
    """What the legend of the figure lists."""
    (legend,) = _figure(report).legends
    return {text.get_text() for text in legend.get_texts()}


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PNG"])
def test_the_same_report_gives_the_same_bytes(report: ProbeReport, tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / "deep" / f"one{suffix}", tmp_path / "deep" / f"two{suffix}"
    save_figure(report, first)
    save_figure(report, second)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in first.parent.iterdir()) == [first.name, second.name]
    if suffix == ".svg":
        assert ElementTree.parse(first).getroot().tag.endswith("svg")
    else:
        assert first.read_bytes().startswith(b"\x89PNG")


def test_the_legend_says_what_is_there(report: ProbeReport) -> None:
    lr = f"lr = {report.first_order.lr:.3g}"
    assert entries(report) == {"predicted ± SE", "realised", "in range", lr}
    assert "η* = 3e-05" in entries(with_eta_star(report, 3e-5))
    far = with_rows(report, unclipped_ess_fraction=0.3, reliable=False, in_range=False)
    assert entries(far) == {"predicted ± SE", "realised, not reliable: ESS/N or k̂", lr}
    assert entries(with_rows(far, method="resample", reliable=True)) == {"predicted ± SE", "realised", lr}
    restricted = with_rows(report, restricted=True, **UNPREDICTED)
    assert entries(restricted) == {"realised", lr}
    title = _figure(restricted).get_suptitle()
    assert title.endswith("\ntop_p < 1: the change within the nucleus, about which nothing is predicted")
    one = report.model_copy(update={"batch": report.batch.model_copy(update={"same_batch": True})})
    warning = "one batch: what is realised holds the noise that the update fitted"
    assert _figure(one).get_suptitle().endswith(f"\n{warning}")
    assert text_table(one).endswith(f"\n{warning}")


def test_in_range_is_shaded_around_zero_only(report: ProbeReport) -> None:
    """An η in range beyond one that is not does not stretch the shade over that one."""
    etas = sorted(row.eta for row in report.entropy_change if row.eta > 0)
    rows = [row.model_copy(update={"in_range": row.eta != etas[1]}) for row in report.entropy_change]
    for axes in _figure(report.model_copy(update={"entropy_change": rows})).axes:
        (shade,) = axes.patches
        assert shade.get_extents().transformed(axes.transData.inverted()).x1 == pytest.approx(etas[0])


def test_a_distant_eta_star_stretches_the_decades_only(report: ProbeReport) -> None:
    near = _figure(report).axes[0].get_xlim()
    axes = _figure(with_eta_star(report, 1e3)).axes
    for change, slope in zip(axes[::2], axes[1::2], strict=True):
        assert change.get_xlim() == near
        assert slope.get_xlim()[1] > 1e3


@pytest.mark.parametrize("unit", ["nats/token", "nats/response"])
def test_points_and_line_are_the_numbers_of_the_report(report: ProbeReport, unit: str) -> None:
    """Per token above, per response below; its predictions and differences are fields of their own."""
    token = "_per_token" if unit == "nats/token" else ""
    rows = [row.model_dump() for row in report.entropy_change if row.eta != 0]
    change, slope = _figure(report).axes[0 if token else 2 :][:2]
    assert change.get_ylabel() == f"ΔH ({unit})"
    for axes, power in ((change, 0), (slope, 1)):
        (points,) = axes.containers
        bars = [(high - low) / 2 for (_, low), (_, high) in points[2][0].get_segments()]
        of_bars = f"difference{token}_se" if power else f"delta_h{token}_pd_se"
        assert bars == pytest.approx([row[of_bars] / abs(row["eta"]) ** power for row in rows])
        assert points[0].get_xdata() == pytest.approx([row["eta"] for row in rows])
        realised = [row[f"delta_h{token}_pd"] / row["eta"] ** power for row in rows]
        assert points[0].get_ydata() == pytest.approx(realised)
        line = next(line for line in axes.lines if line.get_label() == "predicted ± SE")
        drawn = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for row in rows:
            assert drawn[row["eta"]] == pytest.approx(row[f"predicted{token}"] / row["eta"] ** power)


@pytest.mark.parametrize(
    "poison",
    [
        lambda r: with_rows(r, restricted=True, **UNPREDICTED),
        lambda r: with_rows(r, in_range=False, unclipped_ess_fraction=math.nan),
        lambda r: with_rows(r, **NAN),
        lambda r: with_rows(r, delta_h_pd=math.nan, delta_h_per_token_pd=math.nan),
        lambda r: with_rows(r, eta=0.0),
        lambda r: with_rows(r, eta=math.inf),
        lambda r: r.model_copy(update={"entropy_change": []}),
        lambda r: r.model_copy(update={"entropy_change": r.entropy_change[:1]}),
        lambda r: with_eta_star(r, math.inf),
        lambda r: with_eta_star(r, 1e3),
        lambda r: named(r, "x" * 200 + r"$\frac{a$"),
    ],
    ids=["restricted", "far", "nan", "unmeasured", "zero", "inf", "none", "one", "star-inf", "star-far", "name"],
)
def test_poisoned_reports_are_drawn(report: ProbeReport, tmp_path: Path, poison: Any) -> None:
    poisoned = poison(report)
    save_figure(poisoned, tmp_path / "figure.png")
    assert max(map(len, text_table(poisoned).splitlines())) <= 80
    assert text_table(poisoned, plain=True).isascii()


def test_steps_of_any_run_are_drawn(report: ProbeReport, tmp_path: Path) -> None:
    """The name of a run is no formula, and a step that is not known has its place."""
    save_steps([(r"runs/$\y$", 1, report), ("runs/b", None, report)], tmp_path / "by_step.png")
    assert (tmp_path / "by_step.png").read_bytes().startswith(b"\x89PNG")


def test_settings_of_the_user_are_neither_used_nor_changed(report: ProbeReport, tmp_path: Path) -> None:
    import matplotlib as mpl

    save_figure(report, tmp_path / "one.svg")
    with mpl.rc_context({"lines.linewidth": 9.0, "svg.hashsalt": "theirs"}):
        save_figure(report, tmp_path / "two.svg")
        assert mpl.rcParams["lines.linewidth"] == 9.0
        assert mpl.rcParams["svg.hashsalt"] == "theirs"
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_pyplot_is_never_imported(report: ProbeReport, tmp_path: Path) -> None:
    report.to_json(tmp_path / "report.json")
    code = (
        "import sys; from pathlib import Path; from entropy_probe import ProbeReport, plots; "
        "report = ProbeReport.from_json('report.json'); plots.text_table(report); "
        "assert 'matplotlib' not in sys.modules; plots.save_figure(report, Path('figure.png')); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_what_cannot_be_drawn_is_one_line(
    report: ProbeReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ProbeError, match=r"figure\.pdf: is not a kind .*; end its name in \.png or \.svg$"):
        save_figure(report, tmp_path / "figure.pdf")
    (tmp_path / "file").touch()
    with pytest.raises(ProbeError, match="cannot be written"):
        save_figure(report, tmp_path / "file" / "figure.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ProbeError, match="cannot be written"):
        save_figure(report, tmp_path / "folder.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
    assert main(["run", "nowhere", "--plot", "figure"]) == 4
    assert "figure: is not a kind" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ProbeError, match=r"; pip install pytest-entropy-probe\[plots\]$"):
        save_figure(report, tmp_path / "figure.png")


def test_the_table_has_one_line_per_eta(report: ProbeReport) -> None:
    rows = [row.model_dump() for row in report.entropy_change if row.eta != 0]
    tables = text_table(report).splitlines()
    for unit, token in (("nats/token", "_per_token"), ("nats/response", "")):
        (title, heading), lines, tables = tables[:2], tables[2 : 2 + len(rows)], tables[2 + len(rows) :]
        assert title == f"prediction against realisation ({unit})"
        assert " ".join(heading.split()) == "η predicted ± SE realised ± SE diff/SE ratio ESS/N in range"
        for line, row in zip(lines, rows, strict=True):
            cells = line.split()
            numbers = [float(cell) for cell in cells[:-1]]
            predicted, realised = row[f"predicted{token}"], row[f"delta_h{token}_pd"]
            ses = row[f"predicted{token}_se"], row[f"delta_h{token}_pd_se"]
            assert numbers[:5] == pytest.approx([row["eta"], predicted, ses[0], realised, ses[1]], rel=0.05)
            off = row[f"difference{token}"] / row[f"difference{token}_se"]
            assert numbers[5] == pytest.approx(off, rel=0.01, abs=0.006)
            assert numbers[6] == pytest.approx(realised / predicted, rel=0.01, abs=0.006)
            assert numbers[7] == pytest.approx(row["unclipped_ess_fraction"], abs=0.006)
            assert cells[-1] == ("yes" if row["in_range"] else "no")
    assert not tables
    assert text_table(with_eta_star(report, 3e-5), plain=True).endswith("\neta* = 3e-05")
    restricted = text_table(with_rows(report, restricted=True, **UNPREDICTED)).splitlines()
    assert restricted[2].split()[1:3] == ["-", "-"]
    assert restricted[-1].startswith("top_p < 1: ")
    per_token = {"true_delta_h": {**report.config["true_delta_h"], "normalize": "per_token"}}
    table = text_table(report.model_copy(update={"config": {**report.config, **per_token}}))
    assert "(nats/token)" in table
    assert "(nats/response)" not in table


def test_numbers_of_any_size_fit(report: ProbeReport) -> None:
    wide = {"delta_h_pd": -1.234e8, "difference": -9e9, "difference_se": 1.2e-15, "predicted": 1.111e-17}
    of_tokens = {name.replace("delta_h", "delta_h_per_token"): value for name, value in wide.items()}
    wide |= {name: value for name, value in of_tokens.items() if "delta_h" in name}
    wide |= {"difference_per_token": -9e9, "difference_per_token_se": 1.2e-15, "predicted_per_token": 1.111e-17}
    for eta in (-1.23e-15, 9.87e12):
        assert max(map(len, text_table(with_rows(report, **wide, eta=eta)).splitlines())) <= 80
