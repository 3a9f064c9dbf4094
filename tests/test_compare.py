"""Reports side by side: the figures are those of the reports, and the SE of a paired difference covers."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

import oracle
import small_run
from entropy_probe import ProbeReport
from entropy_probe.__main__ import main
from entropy_probe.compare import Side, SideBySide, side_by_side
from entropy_probe.differences import difference, entropy_per_token
from entropy_probe.report import Estimate


def made(*names: str, prompts: bool = True) -> SideBySide:
    """Of the small run's first reports; `prompts`: whether they have the same."""
    sides = []
    for name, report in zip(names, small_run.reports(), strict=False):
        if not prompts:
            batch = report.batch.model_copy(update={"prompts_fingerprint": name})
            report = report.model_copy(update={"batch": batch})
        sides.append(Side(name, report, report.verdicts))
    return side_by_side(sides)


def quantity(found: SideBySide, name: str) -> tuple[list, list]:
    of = next(one for one in found.quantities if one.name == name)
    return of.figures, of.differences


def test_by_hand() -> None:
    """3 − 1 ± √(0.3² + 0.4²); and of the pairs (0, 1), (1, 3), (2, 5): the differences 1, 2, 3 with sd 1."""
    one, two = Estimate(value=1.0, se=0.3), Estimate(value=3.0, se=0.4)
    assert difference(one, two) == (2.0, pytest.approx(0.5, rel=1e-15), False)
    assert difference(one, two, ([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])) == (2.0, pytest.approx(1 / math.sqrt(3)), True)
    assert difference(one, two, ([0.0], [1.0])).paired is False


def test_every_figure_is_the_reports(tmp_path: Path) -> None:
    found = made("a", "b", "c")
    plain = [json.loads(report.model_dump_json()) for report in small_run.reports()]
    steps = [next(r for r in one["entropy_change"] if r["eta"] == one["update"]["lr"]) for one in plain]
    expected = {
        "entropy per token": [
            (one["entropy"]["per_token"]["value"], one["entropy"]["per_token"]["se"]) for one in plain
        ],
        "entropy per response": [(one["entropy"]["rb"]["value"], one["entropy"]["rb"]["se"]) for one in plain],
        "predicted change per token": [(s["predicted_per_token"], s["predicted_per_token_se"]) for s in steps],
        "realised change per token": [(s["delta_h_per_token_pd"], s["delta_h_per_token_pd_se"]) for s in steps],
        "mean reward": [(one["batch"]["mean_reward"], one["batch"]["mean_reward_se"]) for one in plain],
        "momentum share of the step": [(one["update"]["momentum_share"], None) for one in plain],
        "learning rate": [(one["update"]["lr"], None) for one in plain],
        "ESS/N after the step": [(s["unclipped_ess_fraction"], None) for s in steps],
        "resolves, per token (2 SE)": [(one["resolution"]["per_token"], None) for one in plain],
    }
    assert {one.name: one.figures for one in found.quantities} == expected
    for name, figures in expected.items():
        _, less = quantity(found, name)
        assert less[0] is None
        for (value, se), one in zip(figures[1:], less[1:], strict=True):
            assert one.value == value - figures[0][0]
            if se is None:
                assert one.se is None
            elif not one.paired:
                assert one.se == pytest.approx(math.sqrt(se**2 + figures[0][1] ** 2), rel=1e-15)


def test_the_same_prompts_pair_and_others_do_not() -> None:
    one, two = (report.entropy for report in small_run.reports()[:2])
    for name, a, b in (
        ("entropy per token", one.per_token_by_prompt, two.per_token_by_prompt),
        ("entropy per response", one.rb_by_prompt, two.rb_by_prompt),
    ):
        _, (_, paired) = quantity(made("a", "b"), name)
        _, (_, apart) = quantity(made("a", "b", prompts=False), name)
        assert paired.paired
        assert not apart.paired
        terms = [y - x for x, y in zip(a, b, strict=True)]
        assert paired.value == apart.value == pytest.approx(statistics.fmean(terms), rel=1e-9)  # of sums, once each
        assert paired.se == pytest.approx(statistics.stdev(terms) / math.sqrt(len(terms)), rel=1e-15)


def test_a_missing_step_is_left_open() -> None:
    one, two = small_run.reports()[:2]
    optimizer = two.checkpoint.optimizer.model_copy(update={"no_second_moment": "SGD has none"})
    checkpoint = two.checkpoint.model_copy(update={"optimizer": optimizer})
    two = two.model_copy(update={"update": None, "resolution": None, "checkpoint": checkpoint})
    found = side_by_side([Side("a", one), Side("b", two)])
    assert quantity(found, "momentum share of the step")[0][1] is None
    assert quantity(found, "predicted change per token")[1] == [None, None]
    assert quantity(found, "entropy per token")[1][1] is not None
    for text in (found.text(), found.markdown(), found.to_json()):
        assert "None" not in text


def drawn(policy: oracle.PerToken, prompts: torch.Tensor, group: int, seed: int) -> tuple[Estimate, list[float]]:
    """H per token of sampled responses, with its SE, and what each prompt says of it: in plain sums."""
    generator = torch.Generator().manual_seed(seed)
    probability = policy.logp.sum(-1).exp()[prompts]
    rows = torch.multinomial(probability, group, replacement=True, generator=generator)
    r = policy.entropy.sum(-1)[prompts].gather(1, rows)
    t = oracle.LENGTHS[rows].double()
    h = float(r.sum() / t.sum())
    terms = (h + (r - h * t) / t.mean()).mean(1).tolist()
    return Estimate(value=h, se=statistics.stdev(terms) / math.sqrt(len(terms))), terms


def test_the_paired_error_covers_and_the_other_is_too_large() -> None:
    """Two policies of the enumerable kind, H per token over all responses of all prompts: in 2000 replications of 24
    prompts with 4 responses each, the exact difference lies within 2 paired SE in 93.5 % to 96.5 %: nominal 95.4 %
    less the 1.7 % that t with 23 degrees of freedom takes, ± 3 SE of a share of 2000. The SE is that of the spread."""
    theta = oracle.strong().oracle.theta
    other = theta + 0.15 * oracle._normal(len(theta), seed=5)
    policies = [oracle.per_token(*oracle._tables(one)) for one in (theta, other)]
    exact = []
    for policy in policies:
        p = policy.logp.sum(-1).exp()
        exact.append(float((p * policy.entropy.sum(-1)).sum() / (p * oracle.LENGTHS).sum()))
    truth = exact[1] - exact[0]
    inside, errors, apart, values = 0, [], [], []
    for seed in range(2000):
        prompts = torch.randint(oracle.PROMPTS, (24,), generator=torch.Generator().manual_seed(seed))
        (a, of_a), (b, of_b) = (drawn(one, prompts, 4, 2 * seed + k) for k, one in enumerate(policies))
        found = difference(a, b, (of_a, of_b))
        inside += abs(found.value - truth) <= 2 * found.se
        errors.append(found.se)
        apart.append(difference(a, b).se)
        values.append(found.value)
    spread = statistics.stdev(values)
    assert 0.92 <= inside / 2000 <= 0.965, inside
    assert statistics.fmean(errors) == pytest.approx(spread, rel=0.06)  # 3/√(2·2000), and its own bias at 24 prompts
    assert statistics.fmean(apart) > 1.2 * spread


# The command


def test_the_terminal_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """At most 80 columns, also with long names and several reports; in ASCII where that has to do."""
    files = []
    for k, report in enumerate(small_run.reports()):
        files.append(str(tmp_path / f"{k}.json"))
        report.to_json(files[-1])
    assert main(["compare", *files]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    a, b = small_run.reports()[:2]
    less = entropy_per_token(a, b)
    row = next(line for line in shown.splitlines() if line.startswith("  checkpoint-20"))
    assert f"{less.value:+.3f}" in row.replace("−", "-")
    assert f"{less.value / less.se:+.1f}" in row.replace("−", "-")
    long = side_by_side([Side("x" * 90, a), Side("y" * 90, b)])
    assert max(map(len, long.text().splitlines()[:30])) <= 80
    assert long.text(plain=True).isascii()


def test_json_and_markdown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A folder with a report counts as one, and a report without verdicts is judged."""
    one, two = small_run.reports()[:2]
    one.to_json(tmp_path / "a" / "report.json")
    two.to_json(tmp_path / "b" / "anything.json")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [side["name"] for side in found["reports"]] == ["checkpoint-10", "checkpoint-20"]
    assert found["reports"][0]["answer"].startswith("Healthy")
    less = entropy_per_token(one, two)
    assert found["quantities"]["entropy per token"]["differences"] == [None, less._asdict()]
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--markdown"]) == 0
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {row.count(" | ") for row in rows if not row.startswith("|---")} == {2}
    assert "| entropy per token, nats |" in table


def test_a_checkpoint_is_measured_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With the options of the command; two of one name go by their paths."""
    run = small_run.write(tmp_path / "a", (10,))
    small_run.prompts(tmp_path)
    (tmp_path / "probe.yaml").write_text(small_run.YAML)
    small_run.reports()[0].to_json(tmp_path / "report.json")
    given = [str(run / "checkpoint-10"), str(tmp_path / "report.json")]
    options = [f"--config={tmp_path / 'probe.yaml'}", f"--prompts={tmp_path / 'prompts.jsonl'}", "--json"]
    assert main(["compare", *given, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [side["name"] for side in found["reports"]] == given
    assert (
        ProbeReport.from_json(given[1]).entropy.per_token.value
        == found["quantities"]["entropy per token"]["values"][1]["value"]
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a.json"], "compare: got one report; give two or more"),
        (["gone", "gone"], "gone: no such folder; give a checkpoint folder"),
        (["empty", "empty"], "empty: is not a checkpoint"),
        (["a.json", "a.json", "--json", "--markdown"], "--markdown: is given beside --json; choose one of them"),
        (["bad.json", "bad.json"], "bad.json: is not a report"),
    ],
)
def test_wrong_use_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{}")
    assert main(["compare", *given]) in (1, 4)
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
