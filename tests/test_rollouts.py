"""Reading rollouts, and sampling them from the policy that is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import models
from entropy_probe import ProbeConfig, load_checkpoint
from entropy_probe.afresh.inputs import of_file
from entropy_probe.demo import checkpoint_path
from entropy_probe.errors import MeasurementError, RolloutsError
from entropy_probe.model.forward import bind
from entropy_probe.stages.batches import batch_section, draw_batches
from entropy_probe.stages.gradients.payloads import update_batch
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.responses.sampled_rollouts import sample_rollouts
from entropy_probe.stages.responses.steps import left_padded
from entropy_probe.stages.scores import score
from entropy_probe.stages.witnesses.invariance import padding

GOOD = {"prompt_ids": [5, 6], "response_ids": [[7, 2], [8]], "rewards": [1.0, 0.0]}
BAD: dict[str, tuple[Any, str]] = {
    "not json": ("{", "is not JSON"),
    "not an object": ([1], "is a list"),
    "no prompt": ({"rewards": [1]}, "has no `prompt_ids`, and has neither a text nor messages"),
    "empty prompt": ({**GOOD, "prompt_ids": []}, "`prompt_ids` has an empty entry"),
    "empty response": ({**GOOD, "response_ids": [[7], []]}, "`response_ids` has an empty entry"),
    "token outside": ({**GOOD, "response_ids": [[7], [67]]}, "holds 67; give token ids from 0 to 66"),
    "token negative": ({**GOOD, "response_ids": [[7], [-1]]}, "holds -1"),
    "token a bool": ({**GOOD, "response_ids": [[7], [True]]}, "holds True"),
    "goes on after EOS": ({**GOOD, "response_ids": [[2, 7], [8]]}, "goes on after the EOS at 0"),
    "one response": (
        {**GOOD, "response_ids": [[7]], "rewards": [1]},
        "has 1 responses, expected at least 2; give 2 or more, or",
    ),
    "rewards too few": ({**GOOD, "rewards": [1]}, "`rewards` has 1 entries for 2 responses"),
    "reward NaN": ({**GOOD, "rewards": [1, float("nan")]}, "`rewards` holds nan"),
    "reward text": ({**GOOD, "rewards": [1, "a"]}, "`rewards` holds 'a'"),
    "unequal G": (
        {**GOOD, "response_ids": [[7]] * 3, "rewards": [1] * 3},
        "has 3 responses, but the first line has 2; give the same number on every line, or give it",
    ),
    "advantages on some": ({**GOOD, "advantages": [1, 2]}, "only some lines have `advantages`"),
    "reward enormous": ({**GOOD, "rewards": [1, 10**400]}, "`rewards` holds 1000"),
    "logprobs too few": ({**GOOD, "logprobs": [[-1.0], [-1.0]]}, "`logprobs` has [1, 1] numbers"),
    "logprobs text": ({**GOOD, "logprobs": "x"}, "has no list under `logprobs`"),
    "logprobs NaN": ({**GOOD, "logprobs": [[-1.0, float("nan")], [-1.0]]}, "`logprobs` holds nan"),
    "advantage for advantages": ({**GOOD, "advantage": [1, 2]}, "unknown key 'advantage'; did you mean `advantages`?"),
    "a key of nobody's": ({**GOOD, "zzz": 1}, "unknown key 'zzz'; keys are prompt_ids"),
    "advantages of too few tokens": ({**GOOD, "advantages": [[1], [1]]}, "`advantages` has [1, 1] numbers"),
    "in_step of numbers": ({**GOOD, "in_step": [1, 0]}, "`in_step` is [1, 0]; give one true or false"),
    "in_step on some": ({**GOOD, "in_step": [True, False]}, "only some lines have `in_step`"),
    "micro-batches below 0": ({**GOOD, "micro_batches": [0, -1]}, "`micro_batches` is [0, -1]"),
    "another step": ({**GOOD, "after_step": 3}, "`after_step` is 3, but on the first line it is None"),
    "a step of text": ({**GOOD, "after_step": "3"}, "`after_step` is '3'"),
    "weights and advantages": (
        {**GOOD, "weights": [[1, 2], [3]], "advantages": [1, 2]},
        "has `advantages` and `weights`; give one",
    ),
    "weights of responses": ({**GOOD, "weights": [1, 2]}, "`weights` has [None, None] numbers"),
    "a mask with a hole": (
        {**GOOD, "response_ids": [[7, 7, 2], [8]], "response_mask": [[1, 0, 1], [1]]},
        "`response_mask` is not 0s and one run of 1s",
    ),
    "a mask too short": ({**GOOD, "response_mask": [[1], [1]]}, "as long as its ids"),
    "a mask of texts": ({**GOOD, "prompt_mask": ["1", "1"]}, "`prompt_mask` is not 0s and one run of 1s"),
    "a mask of numbers": ({**GOOD, "response_mask": 3}, "one of them is not a list"),
    "a mask of nothing": ({**GOOD, "response_mask": [[0, 0], [1]]}, "has an empty entry"),
    "two names": ({**GOOD, "completion_ids": [[7], [8]]}, "has `response_ids` twice, once as `completion_ids`"),
    "text without tokenizer": ({"prompt": "a", "responses": ["b"], "rewards": [1]}, "no tokenizer"),
}


@pytest.fixture(scope="module")
def tiny() -> Any:
    return bind(models.tiny_model("llama"))


@pytest.mark.parametrize("kind", list(BAD))
def test_errors_name_the_line(tmp_path: Path, tiny: Any, kind: str) -> None:
    content, message = BAD[kind]
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + (content if isinstance(content, str) else json.dumps(content)) + "\n")
    with pytest.raises(RolloutsError, match=r"r\.jsonl:2: ") as caught:
        read_rollouts(file, tiny, None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used(tmp_path: Path, tiny: Any) -> None:
    file = tmp_path / "r.jsonl"
    with pytest.raises(RolloutsError, match="cannot be read"):
        read_rollouts(file, tiny, None)
    file.write_text(json.dumps(GOOD))
    with pytest.raises(RolloutsError, match="has 1 prompts, expected at least 2"):
        read_rollouts(file, tiny, None)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RolloutsError, match="cannot be read"):
        read_rollouts(file, tiny, None)


def test_the_batch_of_a_step(tmp_path: Path, tiny: Any) -> None:
    """Which responses it took, and together; advantages of tokens; a step that took none is an error."""
    file = tmp_path / "r.jsonl"
    of_step = {"after_step": 7, "in_step": [True, False], "micro_batches": [4, 9], "advantages": [[1, 2], [3]]}
    file.write_text((json.dumps(GOOD | of_step) + "\n") * 2)
    rollouts = read_rollouts(file, tiny, None)
    assert rollouts.in_step is not None
    assert rollouts.advantages is not None
    assert (rollouts.after_step, rollouts.in_step.tolist()) == (7, [[True, False]] * 2)
    assert rollouts.advantages.tolist() == [[[1, 2], [3, 0]]] * 2
    batch = update_batch(rollouts, ProbeConfig())  # the index of what is not taken makes no micro-batch
    assert batch.micro_batch.tolist() == [[0, 0], [0, 0]]
    file.write_text((json.dumps(GOOD | {"in_step": [False, False]}) + "\n") * 2)
    with pytest.raises(RolloutsError, match="has no response with `in_step` true"):
        read_rollouts(file, tiny, None)


def test_padding_that_masks_name(tmp_path: Path, tiny: Any) -> None:
    """Under TRL's names, prompts padded on the left, responses on the right, and numbers of tokens with them."""
    plain, padded = tmp_path / "plain.jsonl", tmp_path / "padded.jsonl"
    of_tokens = {"weights": [[0.5, 2], [3]], "logprobs": [[-1, -2], [-3]]}
    plain.write_text((json.dumps(GOOD | of_tokens) + "\n") * 2)
    line = {
        "prompt_ids": [0, *GOOD["prompt_ids"]],
        "prompt_mask": [0, 1, 1],
        "completion_ids": [[7, 2, 0], [8, 0, 0]],
        "completion_mask": [[1, 1, 0], [1, 0, 0]],
        "rewards": GOOD["rewards"],
        "weights": [[0.5, 2, 9], [3, 9, 9]],
        "logprobs": [[-1, -2, 0], [-3, 0, 0]],
    }
    padded.write_text((json.dumps(line) + "\n") * 2)
    one, other = (read_rollouts(file, tiny, None) for file in (plain, padded))
    for name in ("ids", "prompt_lens", "gen_lens", "rewards", "advantages", "logprobs"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.weighed
    assert other.weighed
    seen = of_file(padded, [GOOD["prompt_ids"]] * 2, [GOOD["response_ids"]] * 2)
    assert (seen["wrong"], seen["advantages"]) == ([], [of_tokens["weights"]] * 2)


def test_an_update_of_few_responses(tmp_path: Path, tiny: Any) -> None:
    """One prompt, and groups of unequal size, are a batch of which only the update is made."""
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(GOOD | {"advantages": [[1, 2], [3]], "in_step": [True, True]}))
    assert read_rollouts(file, tiny, None, only_update=True).num_prompts == 1
    more = {"prompt_ids": [9], "response_ids": [[7, 7, 7]], "rewards": [2], "advantages": [[1, 2, 3]]}
    with file.open("a") as out:
        out.write("\n" + json.dumps(more | {"in_step": [False]}))
    uneven = read_rollouts(file, tiny, None, only_update=True)
    assert uneven.gen_lens.tolist() == [2, 1, 3, 0]
    assert uneven.responses == [[7, 2], [8], [7, 7, 7], []]
    assert uneven.rewards.tolist() == [[1, 0], [2, 0]]
    assert uneven.advantages.tolist() == [[[1, 2, 0], [3, 0, 0]], [[1, 2, 3], [0, 0, 0]]]
    assert uneven.in_step.tolist() == [[True, True], [False, False]]
    with pytest.raises(RolloutsError, match="has 1 responses, expected at least 2"):
        read_rollouts(file, tiny, None)
    file.write_text("\n")
    with pytest.raises(RolloutsError, match=r"has 0 prompts, expected at least 1; add lines$"):
        read_rollouts(file, tiny, None, only_update=True)


def test_ids_are_kept(tmp_path: Path, tiny: Any) -> None:
    file = tmp_path / "r.jsonl"
    other = {"prompt_ids": [9], "response_ids": [[7, 7, 7], [8, 2]], "rewards": [0.5, 2], "gold": "3"}
    file.write_text("\n".join(map(json.dumps, (GOOD, other))) + "\n\n")
    rollouts = read_rollouts(file, tiny, None)
    assert rollouts.gen_lens.tolist() == [2, 1, 3, 2]
    assert rollouts.prompt_lens.tolist() == [2, 2, 1, 1]
    assert rollouts.ids.tolist() == [[5, 6, 7, 2], [5, 6, 8, 0], [9, 7, 7, 7], [9, 8, 2, 0]]
    assert rollouts.rewards.tolist() == [[1, 0], [0.5, 2]]
    assert rollouts.advantages is None


def test_the_fingerprint_is_that_of_tokens_rewards_and_advantages(tmp_path: Path, tiny: Any) -> None:
    def fingerprint(**changes: Any) -> str:
        file = tmp_path / "r.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in ({**GOOD, **changes}, {**GOOD, **changes})))
        return batch_section(read_rollouts(file, tiny, None), False, ProbeConfig(), str(file), [2]).fingerprint

    changes: tuple[dict[str, Any], ...] = (
        {},
        {"prompt_ids": [5, 9]},
        {"prompt_ids": [5], "response_ids": [[6, 7, 2], [6, 8]]},  # the same rows, which begin elsewhere
        {"response_ids": [[7, 2], [9]]},
        {"rewards": [1.0, 1e-300]},
        {"advantages": [0.5, -0.5]},
    )
    assert len({fingerprint(**change) for change in changes}) == len(changes)
    assert fingerprint() == fingerprint()


def test_text_is_tokenised_and_ended(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(checkpoint_path())
    eos = checkpoint.tokenizer.eos_token_id
    file = tmp_path / "r.jsonl"
    lines = [
        {"prompt": "What is 1+1?\n", "responses": ["<answer>2</answer>", "no"], "rewards": [1, 0]},
        {"prompt": "What is 2+1?\n", "responses": ["3", "4"], "rewards": [1, 0], "truncated": [True, False]},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    rollouts = read_rollouts(file, bind(checkpoint.model), checkpoint.tokenizer)
    text = json.dumps({"prompt": "a", "responses": ["1<|end|>2", "3"], "rewards": [1, 0]})
    file.write_text(text)
    with pytest.raises(RolloutsError, match="goes on after the EOS"):
        read_rollouts(file, bind(checkpoint.model), checkpoint.tokenizer)
    file.write_text(json.dumps({"prompt": "a", "responses": ["\ud800", "3"], "rewards": [1, 0]}))
    with pytest.raises(RolloutsError, match="a response is"):
        read_rollouts(file, bind(checkpoint.model), checkpoint.tokenizer)
    ends = [int(rollouts.ids[i, n - 1]) == eos for i, n in enumerate(rollouts.prompt_lens + rollouts.gen_lens)]
    assert ends == [True, True, False, True]


def test_among_several_eos_ids_the_tokenizers_own_ends_a_text(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(checkpoint_path())
    own = checkpoint.tokenizer.eos_token_id
    checkpoint.model.get_base_model().generation_config.eos_token_id = [7, own]
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join([json.dumps({"prompt": "a\u2028b", "responses": ["1", "2"], "rewards": [1, 0]})] * 2))
    rollouts = read_rollouts(file, bind(checkpoint.model), checkpoint.tokenizer)
    assert {int(rollouts.ids[i, n - 1]) for i, n in enumerate(rollouts.prompt_lens + rollouts.gen_lens)} == {own}


def test_other_line_separators_inside_json_are_text(tmp_path: Path, tiny: Any) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join([json.dumps({**GOOD, "gold": "a\u2028b\x85c"}, ensure_ascii=False)] * 2))
    assert read_rollouts(file, tiny, None).num_prompts == 2


@pytest.mark.parametrize("eos", ["x", [[1]], -1, [], True])
def test_eos_ids_that_are_none(tmp_path: Path, eos: Any) -> None:
    model = models.tiny_model("llama")
    model.generation_config.eos_token_id = eos
    file = models.random_rollouts(tmp_path / "r.jsonl", prompts=2, responses=2, seed=0)
    with pytest.raises(MeasurementError, match="eos_token_id: is "):
        read_rollouts(file, bind(model), None)


def test_e_and_u_have_prompts_and_noise_of_their_own(tmp_path: Path) -> None:
    bound = bind(models.tiny_model("llama"))
    config = ProbeConfig.from_mapping({"batch": {"num_prompts": 3, "num_update_prompts": 4}})
    e, u = draw_batches(bound, OneToken(), config, None, None, None, None)
    assert (e.num_prompts, u.num_prompts) == (3, 4)
    prompts = [{tuple(r.ids[i, :n].tolist()) for i, n in enumerate(r.prompt_lens.tolist())} for r in (e, u)]
    assert not prompts[0] & prompts[1]
    one = tmp_path / "p.jsonl"
    one.write_text('{"prompt": "ab"}')
    config = ProbeConfig.from_mapping(
        {"batch": {"num_prompts": 3, "num_update_prompts": 3, "with_replacement": True, "seed": 5}}
    )
    e, u = draw_batches(bound, OneToken(), config, None, None, one, None)
    assert e.missing_gold == 3
    assert e.ids.shape != u.ids.shape or not torch.equal(e.ids, u.ids)


def test_one_file_named_twice_is_one_batch(tmp_path: Path, tiny: Any) -> None:
    file = models.random_rollouts(tmp_path / "r.jsonl", prompts=3, responses=2, seed=0)
    e, u = draw_batches(tiny, None, ProbeConfig(), file, tmp_path / "." / "r.jsonl", None, None)
    assert e is u


def test_rows_that_the_model_cannot_hold(tmp_path: Path) -> None:
    """GPT-2 has 64 positions: 64 tokens are scored, one more is an error with the number in it."""
    bound = bind(models.tiny_model("gpt2"), torch.float64)
    for length, works in ((62, True), (63, False)):
        line = json.dumps({"prompt_ids": [5, 6], "response_ids": [[7] * length, [8]], "rewards": [1, 0]})
        file = tmp_path / "r.jsonl"
        file.write_text(line + "\n" + line)
        rollouts = read_rollouts(file, bound, None)
        if works:
            score(bound, rollouts, ProbeConfig())
            assert padding(bound, rollouts, ProbeConfig()).worst < 1e-12
        else:
            with pytest.raises(MeasurementError, match="cannot score rows of 65 tokens"):
                score(bound, rollouts, ProbeConfig())


def test_logits_that_are_not_finite_are_said_to_be(tmp_path: Path) -> None:
    model = models.tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    file = models.random_rollouts(tmp_path / "r.jsonl", prompts=2, responses=2, seed=0)
    with pytest.raises(MeasurementError, match="log-probabilities are not finite at θ"):
        score(bind(model), read_rollouts(file, bind(model), None), ProbeConfig())


def test_token_outside_the_nucleus_is_an_error(tmp_path: Path, tiny: Any) -> None:
    file = models.random_rollouts(tmp_path / "r.jsonl", prompts=3, responses=2, seed=0)
    config = ProbeConfig.from_mapping({"generation": {"top_p": 0.05}})
    with pytest.raises(RolloutsError, match=r"outside the nucleus of top_p 0\.05"):
        score(tiny, read_rollouts(file, tiny, None), config)


# sampling


class OneToken:
    """A tokenizer of single characters, enough for `sample_rollouts`."""

    eos_token_id = models.EOS

    def __call__(self, text: str) -> Any:
        return type("Encoding", (), {"input_ids": [3 + ord(c) % 30 for c in text]})()

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


def generation(**changes: Any) -> Any:
    return ProbeConfig.from_mapping({"generation": {"max_new_tokens": 2, **changes}}).generation


@pytest.mark.parametrize("policy", [{}, {"temperature": 0.7}, {"top_p": 0.6}, {"temperature": 1.5, "top_p": 0.8}])
def test_sampled_frequencies_are_q(policy: dict[str, float]) -> None:
    """Chi-square of the first token against exact q, with a checkpoint whose own generation_config would spoil it."""
    model = models.tiny_model("llama")
    spoiled = model.generation_config
    spoiled.update(top_k=3, repetition_penalty=3.0, suppress_tokens=[5, 6], min_p=0.3, temperature=0.1)
    bound = bind(model, torch.float64)
    prompts = [Prompt("ab")] * 8
    settings = generation(num_return_sequences=250, gen_batch_size=2000, max_new_tokens=1, **policy)
    rollouts = sample_rollouts(bound, OneToken(), prompts, settings, seed=11)
    with torch.no_grad():
        logits = bound.logits(torch.tensor([OneToken()("ab").input_ids]))[0, -1]
    p = torch.softmax(logits / settings.temperature, -1)
    order = p.argsort(descending=True)
    keep = order[: int((p[order].cumsum(0) < settings.top_p).sum()) + 1] if settings.top_p < 1 else order
    q = torch.zeros_like(p).scatter(0, keep, p[keep]) / p[keep].sum()
    counts = torch.bincount(rollouts.ids[:, 2], minlength=models.VOCABULARY).double()
    assert float(counts[q == 0].sum()) == 0
    common = q * 2000 >= 5
    observed = [*counts[common].tolist(), float(counts[~common].sum())]
    expected = [*(2000 * q[common]).tolist(), float(2000 * q[~common].sum())]
    if expected[-1] < 1e-9:
        observed, expected = observed[:-1], expected[:-1]
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    assert model.generation_config is spoiled


def test_same_seed_same_responses_and_no_global_noise() -> None:
    bound = bind(models.tiny_model("llama"))
    prompts = [Prompt("abc"), Prompt("d"), Prompt("efghi")]
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    a, b, c = (sample_rollouts(bound, OneToken(), prompts, generation(max_new_tokens=6), seed=s).ids for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert a.shape != c.shape or not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_responses_do_not_depend_on_the_batch_size() -> None:
    bound = bind(models.tiny_model("llama"), torch.float64)
    prompts = [Prompt("abc"), Prompt("d"), Prompt("efghi")]
    one, other = (
        sample_rollouts(bound, OneToken(), prompts, generation(max_new_tokens=6, gen_batch_size=size), seed=1)
        for size in (2, 32)
    )
    assert torch.equal(one.ids, other.ids)


def test_responses_end_with_their_stop_string() -> None:
    """The text of a token is its number: a response ends with the first one that completes "9 1"."""
    rollouts = sample_rollouts(
        bind(models.tiny_model("llama")),
        OneToken(),
        [Prompt("abc"), Prompt("d")],
        generation(max_new_tokens=60, num_return_sequences=32, stop=["9 1"]),
        seed=4,
    )
    stopped = 0
    for row, start, length in zip(rollouts.ids, rollouts.prompt_lens, rollouts.gen_lens, strict=True):
        response = row[start : start + length].tolist()
        assert "9 1" not in OneToken().decode(response[:-1])
        stopped += "9 1" in OneToken().decode(response)
    assert stopped > 0


def test_responses_end_at_their_eos() -> None:
    rollouts = sample_rollouts(
        bind(models.tiny_model("llama")),
        OneToken(),
        [Prompt("abc"), Prompt("d")],
        generation(max_new_tokens=30, num_return_sequences=16),
        seed=4,
    )
    ended = 0
    for row, start, length in zip(rollouts.ids, rollouts.prompt_lens, rollouts.gen_lens, strict=True):
        response = row[start : start + length].tolist()
        assert models.EOS not in response[:-1]
        ended += response[-1] == models.EOS
        assert response[-1] == models.EOS or length == 30
    assert ended > 0


def test_without_tokenizer_nothing_can_be_sampled() -> None:
    with pytest.raises(MeasurementError, match="--probe-rollouts"):
        sample_rollouts(bind(models.tiny_model("llama")), None, [Prompt("a")], generation(), seed=0)


def test_left_padding() -> None:
    ids, mask = left_padded([[1, 2, 3], [4]], pad=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
