"""The auditor: on every kind of checkpoint and run; that it says something of every number; the command; the file."""

from __future__ import annotations

import json
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from pydantic import BaseModel
from scipy import stats

import entropy_probe_checks.audit
import forked
from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.evidence import Evidence
from entropy_probe_checks.audit import LIMIT, audit, worst
from entropy_probe_checks.audit.sheet import Sheet, difference, quantile
from entropy_probe_checks.criteria import CRITERIA
from faults.subjects import SUBJECTS, Bench, Subject, adapter, full, some_reward
from fields import JUDGED_BY, NOT_JUDGED

AUDITED = [name for name, criterion in CRITERIA.items() if criterion.family == "audit"]
SMALL = {"budget": "smoke", "invariance": {"max_examples": 0}}
BLOCKS = {"first_order": {"mode": "block", "num_blocks": 3}}
SUBJECTS_TOO = {
    "mixtral-lora": Subject("experts", lambda folder, seed: adapter("mixtral", folder, seed)),
    "mixtral": Subject("experts, all trained", lambda folder, seed: full("mixtral", folder, seed)),
    "bfloat16": Subject("weights stored in bfloat16", lambda folder, seed: in_bfloat16(full("llama", folder, seed))),
}


def in_bfloat16(folder: Path) -> Path:
    """The same checkpoint as a trainer saves it that computes in bfloat16 and keeps Adam's moments in float32."""
    file = folder / "model.safetensors"
    weights = {name: w.bfloat16() for name, w in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    return folder


# subject, configuration, whether one batch serves as both
RUNS: dict[str, tuple[str, dict[str, Any], bool]] = {
    **{name: (name, {}, False) for name in (*SUBJECTS, *SUBJECTS_TOO)},
    "float64": ("llama", {"precision": {"dtype": "float64"}}, False),
    "float64 of bfloat16, one batch": ("bfloat16", {"precision": {"dtype": "float64"}}, True),
    "float64 lora, one batch": ("lora", {"precision": {"dtype": "float64"}}, True),
    "blocks": ("llama", BLOCKS, False),
    "one batch": ("dora", {}, True),
    "one batch, blocks": ("lora", BLOCKS, True),
    "one batch, per token": ("llama", {"true_delta_h": {"normalize": "per_token"}}, True),
    "per token": ("lora", {"true_delta_h": {"normalize": "per_token"}}, False),
    "nucleus, one batch": ("nucleus", {}, True),
    **{
        f"rb {baseline}": ("llama", {"first_order": {"estimator": "rb", "baseline": baseline}}, False)
        for baseline in ("none", "hk", "hk_ema", "hk_ridge")
    },
    "clipped": ("llama", {"true_delta_h": {"clip_log_weight": 0.001}}, True),
    "psis": (
        "sampled",
        {"true_delta_h": {"fallback": "psis", "etas": [0.3, -0.2]}, "generation": {"num_return_sequences": 12}},
        False,
    ),
    "resample": ("sampled", {"true_delta_h": {"fallback": "resample", "etas": [0.3, -0.2]}}, False),
    "grpo, clipped gradient": (
        "gpt2",
        {"first_order": {"advantage": "grpo", "lr": 1e-3}, "update": {"max_grad_norm": 0.1}},
        False,
    ),
    **{
        f"small steps, {name}": (name, {"budget": "standard"}, False)
        for name in ("llama", "dora", "nucleus", "mixtral-lora")
    },
    "limited": ("llama", {"memory_limit": "64GiB"}, False),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("audit"))


def run_of(bench: Bench, name: str) -> ProbeReport:
    subject, config, one = RUNS[name]
    made = SUBJECTS | SUBJECTS_TOO
    checkpoint, e, u = bench.files(subject, subject=made[subject])
    merged: dict[str, Any] = dict(SMALL)
    for part in (made[subject].config, config):
        merged = {k: merged.get(k, {}) | v if isinstance(v, dict) else v for k, v in part.items()} | {
            k: v for k, v in merged.items() if k not in part
        }
    return run_probe(checkpoint, ProbeConfig.from_mapping(merged), e, None if one else u)


@pytest.mark.parametrize("name", RUNS)
def test_all_is_computed_again(bench: Bench, name: str) -> None:
    """With a factor of ten to the limit; and the folder says the same, after the report went through JSON too."""
    report = run_of(bench, name)
    again = json.loads(report.model_dump_json())
    assert report.evidence is not None
    line = worst(audit(again, report.evidence))
    assert line.difference <= LIMIT / 10, line
    verdicts = {name: CRITERIA[name](report) for name in AUDITED}
    assert {v.status for v in verdicts.values()} <= {"pass", "not_applicable"}, verdicts
    unseen = {name for name, verdict in verdicts.items() if verdict.unseen}
    assert unseen == ({"plain_forward", "plain_step"} if name == "limited" else set())
    assert verdicts["figures_recomputed"].status == verdicts["as_stored"].status == "pass"
    methods = {row.method for row in report.entropy_change}
    assert methods >= ({"psis"} if "psis" in name else {"resample"} if name == "resample" else {"snis"})


def one_percent_more(of: Any) -> Any:
    if isinstance(of, dict):
        return {key: one_percent_more(entry) for key, entry in of.items()}
    if isinstance(of, list):
        return [one_percent_more(entry) for entry in of]
    return 1.01 * of if isinstance(of, float) else of


@pytest.mark.parametrize("name", ["small steps, llama", "one batch, per token", "nucleus"])
def test_one_percent_is_seen(bench: Bench, name: str) -> None:
    """In every figure, but in a few whose terms are 10⁸ times larger: changes at a small η, and errors of identities,
    which are parts of 1. So is a figure that is missing."""
    report = run_of(bench, name)
    assert report.evidence is not None
    own = json.loads(report.model_dump_json())
    given = {key: own[key] for key in ("config", "recipe")}
    lines = audit(one_percent_more(own) | given, report.evidence)
    figures = [x for x in lines if isinstance(x.again, float) and x.again and x.name.partition(".")[0] in own]
    missed = {line.name for line in figures if not line.difference > LIMIT}
    assert all(name.startswith(("entropy_change", "continuity.identity_error")) for name in missed), missed
    assert len(missed) < len(figures) / 50, missed
    empty = [line for line in figures if difference(None, line.again, 1e300) != math.inf]
    assert empty == []


def half_for_null(of: Any) -> Any:
    if isinstance(of, dict):
        return {key: half_for_null(entry) for key, entry in of.items()}
    return [half_for_null(entry) for entry in of] if isinstance(of, list) else 0.5 if of is None else of


@pytest.mark.parametrize("name", ["llama", "one batch, blocks", "nucleus", "small steps, nucleus", "sampled"])
def test_what_no_formula_gives_is_null(bench: Bench, name: str) -> None:
    """A number, where there is nothing to compute it from, is wrong: fields, and whole sections."""
    report = run_of(bench, name)
    assert report.evidence is not None
    own = json.loads(report.model_dump_json())
    nulls = {n for n, x in Sheet(own, report.evidence.arrays, report.evidence.facts).reported.items() if x is None}
    given = {key: own[key] for key in ("config", "recipe")}
    lines = audit(half_for_null(own) | given, report.evidence)
    assert nulls
    assert {line.name for line in lines if line.difference == math.inf} == nulls


def numbers(kind: Any, path: str = "") -> typing.Iterator[str]:
    """The path of every number that a type may hold; `*` for the entries of lists and dicts."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            yield from numbers(field.annotation, f"{path}.{name}" if path else name)
    elif typing.get_origin(kind) in (list, tuple, dict):
        yield from numbers([*typing.get_args(kind)][-1], f"{path}.*")
    elif typing.get_args(kind):
        for one in typing.get_args(kind):
            yield from numbers(one, path)
    elif kind in (int, float, bool, Any):
        yield path


def named(line: str) -> str:
    """The path of a line of the sheet, in the form of `numbers`."""
    path = re.sub(r"\[\d+\]", ".*", line)
    path = re.sub(r"^(update\.estimators)\.\w+", r"\1.*", path)
    return re.sub(r"(delta_h1_parts\.\w+)\..*\.(value|se)$", r"\1.*.\2", path)


def test_something_is_said_of_every_number(bench: Bench) -> None:
    """It is computed again, judged by a criterion that is named, or on a short list with its reason; one of these."""
    recomputed: set[str] = set()
    for name in ("small steps, llama", "one batch, per token", "grown", "psis"):
        report = run_of(bench, name)
        assert report.evidence is not None
        lines = audit(json.loads(report.model_dump_json()), report.evidence)
        recomputed |= {named(line.name) for line in lines if line.again is not None}  # else null is all that is said
    said = JUDGED_BY | NOT_JUDGED
    listed = {path for path in numbers(ProbeReport) if any(re.match(rf"{re.escape(s)}($|[._])", path) for s in said)}
    assert set(numbers(ProbeReport)) - recomputed - listed == set()
    assert recomputed & listed == set()
    for start in said:
        assert any(path.startswith(start) for path in numbers(ProbeReport)), f"{start} is no field"
    assert set(JUDGED_BY.values()) <= set(CRITERIA)
    assert len(NOT_JUDGED) <= 13


def test_it_can_be_held_beside_the_formulas() -> None:
    """What judges every figure is short enough to be read: under 900 lines that say something."""
    files = Path(entropy_probe_checks.audit.__file__).parent.rglob("*.py")
    lines = [line for file in files for line in file.read_text().splitlines() if line.strip()]
    assert len(lines) < 900


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 2047])
def test_quantiles_of_students_t(degrees: int) -> None:
    assert quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)


def test_the_command(bench: Bench, tmp_path: Path) -> None:
    """Exit codes 0 and 1; a line for what is wrong; no torch; and evidence of another run is said to be that."""
    report, other = run_of(bench, "llama"), run_of(bench, "lora")
    assert report.evidence is not None
    assert other.evidence is not None
    report.to_json(tmp_path / "report.json")
    report.evidence.to_file(tmp_path / "kept" / f"{report.checkpoint.name}.safetensors")
    code = "import sys\nfrom entropy_probe.__main__ import main\n"
    code += "end = main(sys.argv[1:])\nprint('torch' in sys.modules)\nsys.exit(end)"
    (tmp_path / "command.py").write_text(code)

    def ran(*arguments: str) -> tuple[int, str, str]:
        done = forked.subprocess.run(
            [forked.sys.executable, "command.py", "audit", *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    code_of, out, _ = ran("report.json", "--evidence", "kept")
    assert (code_of, out.splitlines()[-1]) == (0, "False"), out
    assert " figures computed again, 0 wrong" in out
    text = (tmp_path / "report.json").read_text()
    value = report.entropy.rb.se
    (tmp_path / "wrong.json").write_text(text.replace(repr(value), repr(1.1 * value)))
    code_of, out, _ = ran("wrong.json", "--evidence", "kept")
    assert code_of == 1
    assert "WRONG entropy.rb.se" in out
    other.evidence.to_file(tmp_path / "other.safetensors")
    code_of, out, err = ran("report.json", "--evidence", "other.safetensors")
    assert code_of == 1
    assert "WRONG checkpoint.fingerprint" in out
    for name, content in (("none", None), ("empty", b""), ("text", b"{}")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        code_of, out, err = ran("report.json", "--evidence", name)
        assert code_of == 1
        assert err.count("\n") == 1, err
        assert "holds no evidence" in err


def test_evidence_comes_back(bench: Bench, tmp_path: Path) -> None:
    """Every bit of it, and it is no larger than is said."""
    report = run_of(bench, "one batch, blocks")
    evidence = report.evidence
    assert evidence is not None
    evidence.to_file(tmp_path / "e.safetensors")
    read = Evidence.from_file(tmp_path / "e.safetensors")
    assert dict(read.facts) == json.loads(json.dumps(evidence.facts))
    assert {name: a.tobytes() for name, a in read.arrays.items()} == {
        name: a.tobytes() for name, a in evidence.arrays.items()
    }
    assert report == report.with_evidence(None)
    assert ProbeReport.model_validate_json(report.model_dump_json()).evidence is None


def test_a_live_checkpoint_has_no_folder(bench: Bench, tmp_path: Path) -> None:
    """Objects that no folder is behind: what asks the folder is skipped and says so, the figures are judged."""
    from dataclasses import replace

    path, e, u = bench.files("llama")
    loaded = load_checkpoint(path)
    nowhere = replace(loaded, info=replace(loaded.info, path=tmp_path / "gone", optimizer_file=tmp_path / "gone.pt"))
    report = run_probe(nowhere, ProbeConfig.from_mapping(SMALL), e, u)
    found = {name: CRITERIA[name](report) for name in AUDITED}
    for name in ("as_stored", "plain_forward", "plain_step"):
        assert found[name].status == "not_applicable"
        assert "without its folder" in found[name].hint
    assert found["figures_recomputed"].status == "pass"


def test_the_rewards_of_the_probe_are_those_that_are_computed_again() -> None:
    """Both readings of `tag_pref`, on texts at the edges of its rule."""
    from entropy_probe.afresh.inputs import pool, tag_pref
    from entropy_probe.stages.responses import rewards, tasks

    golds = ("7", "1,000", "$3.50", "1e3", "x y", "1,00", ".5", "-2", "")
    answers = ("7", "7.0", " 7", "1000", "1,000.00", "3.5", "1000.", "X  Y", "100", "0.5", "-2.0", "$-2", "", "²")
    frames = ("<answer>{}</answer>", "{}", "<answer>{}", "</answer>{}<answer>", "a <answer>{}</answer> b",
              "<answer>{}</answer><answer>{}</answer>", "<answer>\n{}\n</answer>")  # fmt: skip
    for gold in (None, *golds):
        for answer in answers:
            for frame in frames:
                text = frame.replace("{}", answer)
                assert tag_pref(text, gold) == rewards.tag_pref(text, gold), (text, gold)
    for split in ("train", "test"):
        again = [(question.prompt, question.gold) for question in pool("arithmetic", split, None)]
        assert again == [(p.text, p.gold) for p in tasks.arithmetic(split)]
    assert some_reward("a", None) >= 0
