"""The predictors that need no gradient: each formula's own claim, on tabular softmax policies that take its step; the
report's figures against loops over full distributions; and the two parts of the slope."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import models
import reference as ref
from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.estimators import predictors
from entropy_probe.estimators.slope import PromptMean
from entropy_probe.report import PredictorsSection

# A state visited by a batch that is exactly π: action a was taken counts[a] times of sum(counts).
STATES = {"one": [[1, 2, 3, 4]], "several": [[1, 2, 3, 4], [5, 1, 1, 1], [2, 2, 2, 3], [1, 1, 1, 9]]}


def batch(counts: list[list[int]], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(p of every state, state, action and advantage of every token); an action of a state has one advantage."""
    visits = torch.tensor(counts, dtype=torch.float64)
    advantage = torch.randn(visits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    state, action = torch.tensor(
        [(s, a) for s, own in enumerate(counts) for a, n in enumerate(own) for _ in range(n)]
    ).T
    return visits / visits.sum(1, keepdim=True), state, action, advantage[state, action]


def mean_entropy(z: Tensor, state: Tensor) -> float:
    """Of the steps at which the tokens were drawn: states keep their weights."""
    p = z.softmax(-1)
    return float(-(p * p.log()).sum(-1)[state].mean())


def natural(p: Tensor, state: Tensor, action: Tensor, a: Tensor) -> Tensor:
    """z_s(a) moves by A(s, a)."""
    step = torch.zeros_like(p)
    step[state, action] = a
    return step


def own_logit(p: Tensor, state: Tensor, action: Tensor, a: Tensor) -> Tensor:
    """z_s(a) moves by A(s, a)·(1 − p(a))."""
    return natural(p, state, action, a) * (1 - p)


def plain(p: Tensor, state: Tensor, action: Tensor, a: Tensor) -> Tensor:
    """z_s moves by the gradient of the mean of A·log p over the tokens of s."""
    step = torch.zeros_like(p)
    for s in range(len(p)):
        mine = state == s
        one_hot = torch.nn.functional.one_hot(action[mine], p.shape[1])
        step[s] = (a[mine][:, None] * (one_hot - p[s])).mean(0)
    return step


def predicted(p: Tensor, state: Tensor, action: Tensor, a: Tensor) -> dict[str, float]:
    """By the estimators, the tokens as one response of one prompt."""
    logits = p.log()[state]
    logp = logits[torch.arange(len(state)), action]
    entropy = -(p * p.log()).sum(-1)[state]
    of_s = predictors.mean_s(logits, 1.0)
    one = [of[None, None] for of in (logp, entropy, of_s, a, torch.ones_like(state, dtype=torch.bool))]
    return {name: of.value for name, of in predictors.of_scores(predictors.prompt_sums(*one)).items()}


@pytest.mark.parametrize(
    ("name", "step", "states"),
    [
        ("cov_logp_advantage", natural, "one"),
        ("steer", own_logit, "one"),
        ("steer", own_logit, "several"),
        ("wang", plain, "one"),
        ("wang", plain, "several"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_each_is_the_first_order_change_by_its_own_step(
    name: str, step: Callable[..., Tensor], states: str, seed: int
) -> None:
    """By a five-point difference, whose error is below 1e-9 at h = 1e-3; every other step gives another change."""
    p, state, action, a = batch(STATES[states], seed)
    z, h = p.log(), 1e-3

    def change(move: Tensor) -> float:
        at = {k: mean_entropy(z + k * h * move, state) for k in (-2, -1, 1, 2)}
        return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)

    found = predicted(p, state, action, a)[name]
    assert found == pytest.approx(change(step(p, state, action, a)), abs=1e-9)
    for other in {natural, own_logit, plain} - {step}:
        assert abs(found - change(other(p, state, action, a))) > 1e-3


def test_tokens_that_share_no_state_need_no_exact_batch() -> None:
    """Wang's is exact for any tokens, each with a state of its own: no expectation is in it."""
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(40, 7, dtype=torch.float64, generator=generator).mul(2).softmax(-1)
    state, action = torch.arange(40), torch.randint(7, (40,), generator=generator)
    a = torch.randn(40, dtype=torch.float64, generator=generator)
    move, h = plain(p, state, action, a), 1e-4
    moved = [mean_entropy(p.log() + k * h * move, state) for k in (-1, 1)]
    assert predicted(p, state, action, a)["wang"] == pytest.approx((moved[1] - moved[0]) / (2 * h), abs=1e-7)


def test_the_covariance_over_states_is_not_the_mean_of_those_within() -> None:
    """Where states differ in mean log p and mean A, the pooled covariance has that of their means too: it is an exact
    change in one state alone."""
    p, state, action, a = batch(STATES["several"], 0)
    logp = p.log()[state, action]
    visits = torch.bincount(state).double()
    l, m = (torch.bincount(state, of) / visits for of in (logp, a))
    within = ((logp - l[state]) * (a - m[state])).mean()
    between = ((l[state] - l[state].mean()) * (m[state] - m[state].mean())).mean()
    found = predicted(p, state, action, a)["cov_logp_advantage"]
    assert found == pytest.approx(-float(within + between), abs=1e-12)
    assert abs(float(between)) > 1e-2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_mean_of_s(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop; with logits of −∞, in the thousands, and one token that is certain; in pieces as at once."""
    z = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)) * 3
    z[1, :4], z[2] = -math.inf, z[2] + 4000
    z[3, 2] = 300.0
    found = predictors.mean_s(z, temperature)
    for row, value in zip(z.double().tolist(), found.tolist(), strict=True):
        top = max(row)
        weights = [math.exp((x - top) / temperature) for x in row]
        p = [w / math.fsum(weights) for w in weights]
        entropy = -math.fsum(x * math.log(x) for x in p if x > 0)
        expected = math.fsum(x * x * (entropy + math.log(x)) for x in p if x > 0)
        assert value == pytest.approx(expected, abs=1e-14)
    assert found.dtype is torch.float64
    monkeypatch.setattr("entropy_probe.estimators.token_stats._CHUNK", 12)
    assert torch.equal(predictors.mean_s(z, temperature), found)


def random_tokens(prompts: int, seed: int) -> tuple[Tensor, ...]:
    """Tokens whose log p, H and A depend on their prompt, in groups of 3 of up to 8."""
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, 3, 8)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    entropy = (noise(*shape) + noise(prompts, 1, 1)).exp()
    logp = -(noise(*shape) + entropy.log()).exp()
    lengths = torch.randint(1, 9, (prompts, 3), generator=generator)
    a = 1 + noise(prompts, 3) + 0.3 * noise(prompts, 1)  # a mean that is not 0, as tokens have it
    counts = torch.arange(8) < lengths[..., None]
    return logp, entropy, 0.1 * noise(*shape), a, counts


def test_standard_errors_are_those_of_fresh_batches() -> None:
    """The root mean square of the SE over the spread of 600 batches of 40 prompts, with an error of 1/√1200: 1.02, 1.06
    and 1.03. Tokens taken for independent give 0.84, 0.91 and 0.84: those of a prompt share a part of A."""
    found = [predictors.of_scores(predictors.prompt_sums(*random_tokens(40, seed))) for seed in range(600)]
    as_tokens = []
    for seed in range(200):
        logp, entropy, of_s, a, counts = random_tokens(40, seed)
        tokens = [of[counts][:, None, None] for of in (logp, entropy, of_s, a[..., None].expand_as(logp))]
        every = torch.ones_like(tokens[0], dtype=torch.bool)
        as_tokens.append(predictors.of_scores(predictors.prompt_sums(*tokens, every)))
        for name, of in as_tokens[-1].items():
            assert of.value == pytest.approx(found[seed][name].value, abs=1e-12)

    def rms(of: list[dict[str, predictors.Predicted]], name: str) -> float:
        return math.sqrt(statistics.fmean((batch[name].se or math.nan) ** 2 for batch in of))

    for name in ("cov_logp_advantage", "steer", "wang"):
        spread = statistics.stdev(of[name].value for of in found)
        assert rms(found, name) / spread == pytest.approx(1.0, abs=0.1), name
        assert rms(as_tokens, name) / rms(found, name) < 0.9, name


def test_one_prompt_has_no_standard_error() -> None:
    logp, entropy, of_s, a, counts = (of[:1] for of in random_tokens(2, 0))
    found = predictors.of_scores(predictors.prompt_sums(logp, entropy, of_s, a, counts))
    assert all(of.se is None for of in found.values())


# --- the report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictors")
    models.full_checkpoint(folder / "ckpt", "llama")
    models.random_rollouts(folder / "e.jsonl", prompts=5, responses=3, seed=1)
    models.random_rollouts(folder / "u.jsonl", prompts=6, responses=2, seed=2)
    return folder


CONFIG = {
    "budget": "smoke",
    "invariance": {"max_examples": 0},
    "precision": models.FLOAT64,
    "generation": {"temperature": 0.9},
    "true_delta_h": {"etas": [-1e-6, 1e-6]},
}


def report_on(folder: Path, u: str | None) -> ProbeReport:
    file = None if u is None else folder / u
    return run_probe(folder / "ckpt", ProbeConfig.from_mapping(CONFIG), folder / "e.jsonl", file)


@pytest.fixture(scope="module")
def report(folder: Path) -> ProbeReport:
    return report_on(folder, "u.jsonl")


def by_loops(folder: Path, file: str, taken: Callable[[int, int], bool] = lambda n, g: True) -> dict[str, float]:
    """From whole distributions, one token after the other; A = r − mean r."""
    batch = ref.Reference(load_checkpoint(folder / "ckpt").model.double(), folder / file, temperature=0.9)
    tokens: list[tuple[float, float, float, float]] = []
    for n, line in enumerate(batch.lines):
        for g, response in enumerate(line["response_ids"]):
            if not taken(n, g):
                continue
            rewards = line["rewards"]
            a = line.get("advantages", [r - sum(rewards) / len(rewards) for r in rewards])[g]
            with torch.no_grad():
                rows = (batch.logits(n, g) / 0.9).softmax(-1).tolist()
            for t, (p, k) in enumerate(zip(rows, response, strict=True)):
                h = -math.fsum(x * math.log(x) for x in p)
                s = [x * (h + math.log(x)) for x in p]
                of_wang = s[k] - math.fsum(x * y for x, y in zip(p, s, strict=True))
                own = a[t] if isinstance(a, list) else a
                tokens.append(
                    (math.log(p[k]), own, own / p[k] * p[k] * (1 - p[k]) * (math.log(p[k]) + h), own * of_wang)
                )
    logp, a, steer, wang = (list(of) for of in zip(*tokens, strict=True))
    mean = [math.fsum(of) / len(tokens) for of in (logp, a)]
    products = [(x - mean[0]) * (y - mean[1]) for x, y in zip(logp, a, strict=True)]
    named = {"cov_logp_advantage": products, "steer": steer, "wang": wang}
    return {name: -math.fsum(of) / len(of) for name, of in named.items()}


def agrees(section: PredictorsSection, expected: dict[str, float]) -> None:
    """Terms are of size 1 at most a few: 1e-10 is far above float64's rounding of a forward pass."""
    for name, value in expected.items():
        assert getattr(section, name) == pytest.approx(value, abs=1e-10), name


def test_of_the_update_batch(folder: Path, report: ProbeReport) -> None:
    agrees(report.predictors, by_loops(folder, "u.jsonl"))
    other = by_loops(folder, "e.jsonl")
    assert all(abs(getattr(report.predictors, name) - value) > 1e-4 for name, value in other.items())


def test_of_the_one_batch(folder: Path) -> None:
    agrees(report_on(folder, None).predictors, by_loops(folder, "e.jsonl"))


def test_of_the_responses_that_the_step_takes(folder: Path) -> None:
    """And with advantages of the file, of responses or of tokens."""
    lines = [json.loads(line) for line in (folder / "u.jsonl").read_text().splitlines()]
    generator = torch.Generator().manual_seed(4)

    def drawn(count: int) -> list[float]:
        return torch.randn(count, dtype=torch.float64, generator=generator).tolist()

    for name, made in (
        ("some.jsonl", [line | {"in_step": [n % 3 > 0, True]} for n, line in enumerate(lines)]),
        ("given.jsonl", [line | {"advantages": drawn(2)} for line in lines]),
        ("tokens.jsonl", [line | {"advantages": [drawn(len(y)) for y in line["response_ids"]]} for line in lines]),
    ):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in made))
        found = report_on(folder, name).predictors
        agrees(found, by_loops(folder, name, lambda n, g, some=name == "some.jsonl": not some or n % 3 > 0 or g == 1))


def test_the_parts_add_up_to_the_slope(report: ProbeReport) -> None:
    """Per token and per response; of 1e-12 of the parts, which rounding of a sum of two may move."""
    update, of = report.update, report.predictors
    assert update is not None
    for slope, parts in (
        (update.delta_h1_per_lr_per_token, (of.of_entropies, of.of_visits)),
        (update.delta_h1_per_lr_rb, (of.of_entropies_per_response, of.of_visits_per_response)),
    ):
        one, other = parts
        assert one is not None
        assert other is not None
        assert one + other == pytest.approx(update.lr * slope, abs=1e-12 * (abs(one) + abs(other)))
        assert abs(other) > 1e-3 * abs(one)


def test_entropies_alone_is_the_change_with_the_visits_held(report: ProbeReport) -> None:
    """A central difference of the mean entropy of the same tokens at θ ± ηv, without weights."""
    assert report.evidence is not None
    assert report.update is not None
    arrays, etas = report.evidence.arrays, report.evidence.facts["etas"]
    mean = {eta: arrays[f"after.{k}.entropy"].sum() / arrays["e.gen_lens"].sum() for k, eta in enumerate(etas)}
    change = (mean[1e-6] - mean[-1e-6]) / 2e-6 * report.update.lr
    assert report.predictors.of_entropies == pytest.approx(change, rel=1e-6)


def test_the_parts_of_a_slope_by_prompt() -> None:
    """SE by a jackknife over prompts of the ratio, which is that of the influence to O(1/B)."""
    generator = torch.Generator().manual_seed(8)
    d_r = torch.randn(200, 3, dtype=torch.float64, generator=generator) + 1
    lengths = torch.randint(1, 30, (200, 3), generator=generator).double()
    slope = PromptMean(torch.randn(200, dtype=torch.float64, generator=generator))
    of_entropies, of_visits = predictors.parts_of_slope(slope, d_r, lengths)
    assert of_entropies.value == pytest.approx(float(d_r.sum() / lengths.sum()), rel=1e-12)
    left_out = (d_r.sum() - d_r.sum(1)) / (lengths.sum() - lengths.sum(1))
    jackknife = math.sqrt(199 / 200 * float((left_out - left_out.mean()).square().sum()))
    assert of_entropies.se == pytest.approx(jackknife, rel=0.02)
    assert torch.equal(of_entropies.per_prompt + of_visits.per_prompt, slope.per_prompt) or torch.allclose(
        of_entropies.per_prompt + of_visits.per_prompt, slope.per_prompt, rtol=0, atol=1e-14
    )


def test_terms_of_the_entropy_per_token(report: ProbeReport) -> None:
    """Their mean is the entropy per token and their spread its SE, to rounding."""
    of = report.entropy
    terms = torch.tensor(of.per_token_by_prompt, dtype=torch.float64)
    assert float(terms.mean()) == pytest.approx(of.per_token.value, rel=1e-13)
    assert float(terms.std()) / math.sqrt(len(terms)) == pytest.approx(of.per_token.se, rel=1e-12)


def test_the_same_prompts_have_one_fingerprint(folder: Path, report: ProbeReport) -> None:
    """Other responses leave it, another prompt does not."""
    lines = [json.loads(line) for line in (folder / "e.jsonl").read_text().splitlines()]
    for line in lines:
        line["response_ids"] = line["response_ids"][::-1]
    (folder / "swapped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    swapped = report_on(folder, "swapped.jsonl")
    assert swapped.update_batch.prompts_fingerprint == report.batch.prompts_fingerprint
    assert swapped.update_batch.fingerprint != report.batch.fingerprint
    assert report.update_batch.prompts_fingerprint != report.batch.prompts_fingerprint
