"""Update batches as a step takes them: groups of unequal size, one prompt, weights of tokens, padded ids.

The gradient is held against a loss that is written out here, and the whole suite must pass on the report.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import models
from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.errors import RolloutsError
from entropy_probe_checks.criteria import CRITERIA

Lines = list[dict[str, Any]]
CONFIG = {"budget": "smoke", "invariance": {"max_examples": 0}}
NEEDS_TWO = {"u_cross_identity", "delta_h1_identity", "se_formula", "se_identity", "se_agreement"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("update-batches")
    checkpoint = models.full_checkpoint(folder / "ckpt", "llama")
    model = load_checkpoint(checkpoint).model
    models.sampled_rollouts(folder / "e.jsonl", model, prompts=5, responses=3, seed=1)
    models.sampled_rollouts(folder / "whole.jsonl", model, prompts=4, responses=4, seed=2)
    return folder


def uneven(lines: Lines) -> Lines:
    """Groups of 4, 2, 3 and 1."""
    sizes = (4, 2, 3, 1)
    return [
        {key: value if key == "prompt_ids" else value[:size] for key, value in line.items()}
        for line, size in zip(lines, sizes, strict=True)
    ]


def weighed(lines: Lines) -> Lines:
    """Weights of tokens, by which the gradient of each is multiplied."""
    generator = torch.Generator().manual_seed(3)
    return [
        line | {"weights": [torch.randn(len(own), generator=generator).tolist() for own in line["response_ids"]]}
        for line in lines
    ]


def padded(lines: Lines) -> Lines:
    """Under TRL's names; `[N, T]` of the whole batch, as its tensors are."""
    longest = max(len(own) for line in lines for own in line["response_ids"])
    found = []
    for line in lines:
        own = line["response_ids"]
        rest = {key: value for key, value in line.items() if key != "response_ids"}
        ids = [[*ids, *[0] * (longest - len(ids))] for ids in own]
        mask = [[*[1] * len(ids), *[0] * (longest - len(ids))] for ids in own]
        found.append(rest | {"completion_ids": ids, "completion_mask": mask})
    return found


KINDS: dict[str, Any] = {
    "uneven": uneven,
    "one prompt": lambda lines: lines[:1],
    "one prompt, uneven to E": lambda lines: uneven(lines)[2:3],
    "weights": weighed,
    "uneven, weights": lambda lines: weighed(uneven(lines)),
    "padded, uneven, weights": lambda lines: padded(weighed(uneven(lines))),
}


def report_of(folder: Path, kind: str, **config: Any) -> tuple[ProbeReport, Lines]:
    lines = [json.loads(line) for line in (folder / "whole.jsonl").read_text().splitlines()]
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in KINDS[kind](lines)))
    report = run_probe(folder / "ckpt", ProbeConfig.from_mapping(CONFIG | config), folder / "e.jsonl", file)
    return report, KINDS[kind.replace("padded, ", "")](lines)


def loss(model: Any, lines: Lines, recipe: str) -> Tensor:
    """slime's: the mean of each response's mean of −A·log p, A = (r − r̄)/(std + 1e-6); or −Σ weight·log p."""
    of_responses = []
    for line in lines:
        rewards = line["rewards"]
        mean = math.fsum(rewards) / len(rewards)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1))
        for g, own in enumerate(line["response_ids"]):
            ids, start = torch.tensor([line["prompt_ids"] + own]), len(line["prompt_ids"])
            logp = model(input_ids=ids).logits[0].double().log_softmax(-1)
            logp = logp[start - 1 : -1].gather(-1, torch.tensor(own)[:, None])[:, 0]
            if recipe == "weights":
                of_responses.append(-(torch.tensor(line["weights"][g], dtype=torch.float64) * logp).sum())
            else:
                of_responses.append(-(rewards[g] - mean) / (std + 1e-6) * logp.mean())
    total = torch.stack(of_responses).sum()
    return total if recipe == "weights" else total / len(of_responses)


@pytest.mark.parametrize("kind", KINDS)
def test_the_suite_on_the_batch_of_a_step(folder: Path, kind: str) -> None:
    report, lines = report_of(folder, kind, recipe="slime", precision={"dtype": "float64"})
    verdicts = {name: criterion(report) for name, criterion in CRITERIA.items() if criterion.family != "gate"}
    failed = {name: verdict for name, verdict in verdicts.items() if verdict.status == "fail"}
    assert not failed
    assert verdicts["figures_recomputed"].status == verdicts["gradient_witness"].status == "pass"
    assert verdicts["prompts_as_given"].status == verdicts["rewards_again"].status == "pass"

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "ckpt").double().eval()
    loss(model, lines, "weights" if "weights" in kind else "slime").backward()
    norm = math.sqrt(math.fsum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    assert report.update is not None
    assert report.update.grad_norm == pytest.approx(norm, rel=1e-6)  # its norms of layers are taken in float32

    batch, rewards = report.update_batch, [r for line in lines for r in line["rewards"]]
    assert batch.total_responses == len(rewards)
    assert batch.num_responses == max(len(line["rewards"]) for line in lines)
    assert batch.mean_reward == pytest.approx(math.fsum(rewards) / len(rewards), rel=1e-14)
    assert batch.advantages == ("weights" if "weights" in kind else "recipe")
    single = len(lines) == 1
    assert (report.first_order is None, report.update.spread_over_batches is None) == (single, single)
    assert report.two_batch is not None
    assert (report.two_batch.delta_h1_se is None) == single
    found = {name for name, verdict in verdicts.items() if verdict.hint.startswith("The update batch has one prompt")}
    assert found == (NEEDS_TWO if single else set())


def test_each_estimator_of_x(folder: Path) -> None:
    """Also with coefficients of tokens: U_cross of a batch whose groups have unequal sizes is what two ways say."""
    for baseline in ("none", "hk", "hk_ema", "hk_ridge"):
        config = {"first_order": {"estimator": "rb", "baseline": baseline}}
        report, _ = report_of(folder, "uneven", **config)
        assert CRITERIA["gradient_witness"](report).status == "pass"
        assert CRITERIA["figures_recomputed"](report).status == "pass"


def test_an_e_batch_needs_more(folder: Path) -> None:
    """One file for both is one batch, and E's own rules hold."""
    report_of(folder, "uneven")
    config = ProbeConfig.from_mapping(CONFIG)
    with pytest.raises(RolloutsError, match=r"has 2 responses, but the first line has 4.*give it as the update"):
        run_probe(folder / "ckpt", config, folder / "uneven.jsonl", folder / "uneven.jsonl")
