"""The fire drill: its faults are those of the page, each is seen on somebody's checkpoint, and the command says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import forked
from entropy_probe import drill
from faults.more import FIGURE
from faults.subjects import Bench

SEEN_BY = {
    "momentum_read_negated": "as_stored",
    "step_read_one_late": "as_stored",
    "weights_moved": "as_stored",
    "bracket_not_detached": "gradient_witness",
    "preconditioner_without_bias_correction": "preconditioner_witness",
    "v_uphill": "optimizer_step_cosine",
    "scored_after_half_a_step": "plain_step",
    "entropies_ten_percent_too_large": "plain_forward",
    "logits_one_position_late": "plain_forward",
    "errors_of_slopes_not_over_root_b": FIGURE,
    "rewards_reversed_in_their_group": "rewards_again",
    "two_batches_without_the_preconditioner": FIGURE,
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    checkpoint, e, u = Bench(tmp_path_factory.mktemp("drill")).files("lora")
    return [str(checkpoint), f"--rollouts={e}", f"--update-rollouts={u}"]


@pytest.mark.parametrize("name", ["", *drill.FAULTS])
def test_each_is_seen(given: list[str], name: str) -> None:
    done = forked.python("-m", "entropy_probe", "drill", *given, f"--fault={name}")
    assert done.returncode == 0, done.stderr
    red = {criterion for criterion, status in json.loads(done.stdout.splitlines()[-1]).items() if status == "fail"}
    assert {SEEN_BY[name]} <= red if name else not red


def test_they_are_on_the_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "faults.md").read_text()
    assert set(drill.FAULTS) == set(SEEN_BY)
    assert {name for name in drill.FAULTS if f"`{name}`" not in page} == set()
    assert all(drill.wrong(name).endswith(".") for name in drill.FAULTS)


def test_the_command(given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is red without a fault does not count; a fault that nothing sees is named and ends it with 1."""
    from entropy_probe import __main__ as command

    answers = {name: {"ess": "fail", "as_stored": "fail" if name else "pass"} for name in ("", *drill.FAULTS)}
    monkeypatch.setattr(command, "_statuses", lambda _, name: answers[name])
    assert command.main(["drill", *given]) == 1
    out = capsys.readouterr().out
    assert "without a fault: ess" in out
    assert "12 of 12 faults were seen" in out
    for answer in answers.values():
        answer["ess"] = "pass"
    assert command.main(["drill", *given]) == 0
    answers["v_uphill"] = answers[""]
    assert command.main(["drill", *given]) == 1
    out = capsys.readouterr().out
    assert "v_uphill\n    The sign of v.\n    seen by NOTHING" in out
    assert max(map(len, out.splitlines())) <= 110
    assert command.main(["drill", "nowhere"]) == 4
