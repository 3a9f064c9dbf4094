"""Prompts, rewards and rollouts as trainers hold them: what was asked is what is measured, or it is said."""

from __future__ import annotations

import asyncio
import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import chat
from entropy_probe import ProbeConfig, run_probe
from entropy_probe.errors import ConfigError, MeasurementError, RolloutsError
from entropy_probe.stages.responses.ids import Door
from entropy_probe.stages.responses.prompt_files import read_prompts
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.rewards import Asked, find_rewards, stand_in
from entropy_probe.stages.responses.tasks import draw_prompts
from entropy_probe_checks.criteria import CRITERIA

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+3?"}]

# What the three families' templates make of MESSAGES and of a question alone, as verl's data loader asks for them:
# `apply_chat_template(messages, add_generation_prompt=True, tokenize=False)`, then the ids without special tokens.
RENDERED = {
    "qwen2_5": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2+3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2+3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": (None, "<bos><start_of_turn>user\nWhat is 2+3?<end_of_turn>\n<start_of_turn>model\n"),
}


@pytest.mark.parametrize("family", RENDERED)
def test_messages_become_the_ids_of_the_published_templates(family: str) -> None:
    """One BOS where the template writes it, whatever the tokenizer adds to bare text. Gemma's takes no system one."""
    own = chat.tokenizer(family)
    with_system, question = RENDERED[family]
    door = Door(own)
    for messages, text in ((MESSAGES, with_system), (MESSAGES[1:], question)):
        if text is None:
            with pytest.raises(MeasurementError, match="the chat template raised TemplateError"):
                door.of_prompt(Prompt("", None, tuple(messages)))
            continue
        ids = door.of_prompt(Prompt("", None, tuple(messages)))
        assert ids == own(text, add_special_tokens=False).input_ids
        assert own.decode(ids) == text
        assert ids.count(own.bos_token_id) == (family != "qwen2_5")
    if with_system is not None:  # a system prompt that is configured goes before messages, and before bare text
        asked = Door(own, system="Be brief.")
        for prompt in (Prompt("", None, tuple(MESSAGES[1:])), Prompt("What is 2+3?")):
            assert own.decode(asked.of_prompt(prompt)) == with_system
        assert own.decode(asked.of_prompt(Prompt("", None, tuple(MESSAGES)))) == with_system
    assert not door.lines()


def test_an_answer_that_has_begun_stays_open_and_tools_are_rendered() -> None:
    own = chat.tokenizer("qwen2_5")
    begun = (*MESSAGES, {"role": "assistant", "content": "It is "})
    text = own.decode(Door(own).of_prompt(Prompt("", None, begun)))
    assert text.endswith("<|im_start|>assistant\nIt is ")
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
    with_tools = Door(own).of_prompt(Prompt("", None, tuple(MESSAGES), {"tools": [tool]}))
    assert '"name": "add"' in own.decode(with_tools)
    own.chat_template = "{{ flavour }}{% for m in messages %}{{ m.content }}{% endfor %}"
    door = Door(own, template={"flavour": "plain "})
    assert own.decode(door.of_prompt(Prompt("", None, tuple(MESSAGES)))).startswith("plain Be brief.")
    own_flavour = {"chat_template_kwargs": {"flavour": "own "}}
    assert own.decode(door.of_prompt(Prompt("", None, tuple(MESSAGES), own_flavour))).startswith("own Be brief.")


# The same questions in every kind of file

ROWS = [{"prompt": [{"role": "user", "content": f"Question {n}"}], "answer": f"{n}", "level": n % 3} for n in range(40)]


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"prompts.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif kind == "folder":
        datasets.Dataset.from_list(rows).save_to_disk(file)
    else:
        datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:3])}
        ).save_to_disk(file)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder", "splits"])
def test_each_kind_of_file_has_the_same_prompts(tmp_path: Path, kind: str) -> None:
    """And the draw depends on the seed alone: it is that of a list of as many."""
    pool = read_prompts(written(tmp_path, kind, ROWS))
    expected = [Prompt(f"Question {n}", f"{n}", tuple(ROWS[n]["prompt"])) for n in range(40)]
    assert list(pool) == expected
    assert (len(pool), pool[3], pool[-1], pool.gold) == (40, expected[3], expected[39], "answer")
    assert pool[5].columns == {"answer": "5", "level": 2}
    for again in (False, True):
        drawn = draw_prompts(pool, 12, seed=7, with_replacement=again)
        assert drawn == draw_prompts(expected, 12, seed=7, with_replacement=again)
    other = read_prompts(pool.path, "test")
    assert len(other) == (3 if kind == "splits" else 40)


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerows([("prompt", "gold", "level"), ("two\nlines, and a comma", "3", "hard"), ("b", "", "easy")])
    assert list(read_prompts(file)) == [Prompt("two\nlines, and a comma", "3"), Prompt("b", "")]
    assert read_prompts(file)[0].columns["level"] == "hard"
    file.write_text("question,gold\na,3\n")
    with pytest.raises(RolloutsError, match=r"p\.csv: has the columns \['question', 'gold'\]; name one `prompt`"):
        read_prompts(file)
    file.write_text("prompt,gold\na,3,4\n")
    with pytest.raises(RolloutsError, match=r"p\.csv:2: has more than 2 columns"):
        read_prompts(file)


GOLD = {
    "gold before answer": ({"gold": "1", "answer": "2"}, "1", "gold"),
    "answer": ({"answer": "2", "solution": "3"}, "2", "answer"),
    "solution": ({"solution": 3}, "3", "solution"),
    "ground_truth": ({"ground_truth": "4"}, "4", "ground_truth"),
    "verl": ({"reward_model": {"style": "rule", "ground_truth": "5"}}, "5", "reward_model.ground_truth"),
    "a list is no answer": ({"answer": ["a"]}, None, None),
    "none": ({"level": 3}, None, None),
}


@pytest.mark.parametrize("kind", GOLD)
def test_the_gold_answer_is_found_and_its_column_named(tmp_path: Path, kind: str) -> None:
    columns, gold, name = GOLD[kind]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "a", **columns}))
    pool = read_prompts(file)
    assert (pool[0].gold, pool.gold) == (gold, name)


BAD_PROMPTS = {
    "no messages": ([], "has an empty list under `prompt`"),
    "a message without a role": ([{"content": "a"}], "among its messages, expected"),
    "a picture": ([{"role": "user", "content": [{"type": "image"}]}], "content is [{'type': 'image'}], expected text"),
    "half a pair": ([{"role": "user", "content": "\ud800"}], "has a lone surrogate"),
    "a number": (3, "has neither a text nor messages"),
}


@pytest.mark.parametrize("kind", BAD_PROMPTS)
def test_prompts_that_are_none_name_their_row(tmp_path: Path, kind: str) -> None:
    prompt, said = BAD_PROMPTS[kind]
    file = tmp_path / "p.json"
    file.write_text(json.dumps([{"prompt": "a"}, {"prompt": prompt}]))
    with pytest.raises(RolloutsError, match=r"p\.json: entry 2: ") as caught:
        read_prompts(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    for name, content, said in (
        ("p.parquet", b"PAR1 no", "cannot be read"),
        ("p.json", b"[1]", "entry 1: is 1"),
        ("p.json", b"[", "is not JSON"),
        ("p.csv", b"prompt\n\xff", "cannot be read"),
        ("p.jsonl", b"\xff", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RolloutsError, match=name) as caught:
            read_prompts(tmp_path / name)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(RolloutsError, match="folder: cannot be read"):
        read_prompts(tmp_path / "folder")


MILLION = """
import resource, sys
from entropy_probe.stages.responses.prompt_files import read_prompts
from entropy_probe.stages.responses.tasks import draw_prompts
if sys.argv[2] == "parquet":
    import pyarrow.parquet
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pool = read_prompts(sys.argv[1])
drawn = draw_prompts(pool, 16, seed=3, with_replacement=False)
print(len(pool), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle, *(p.gold for p in drawn))
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_million_prompts_are_never_held(tmp_path: Path, kind: str) -> None:
    """200 MB over the idle process; all of them would take 600 MB."""
    file, count = tmp_path / f"p.{kind}", 1_000_000
    filler = "x" * 60
    if kind == "jsonl":
        with file.open("w") as out:
            for start in range(0, count, 1000):
                rows = range(start, start + 1000)
                out.write("".join(f'{{"prompt": "{filler} {n}", "gold": "{n}"}}\n' for n in rows))
    else:
        schema = pyarrow.schema([("prompt", pyarrow.string()), ("gold", pyarrow.string())])
        with pyarrow.parquet.ParquetWriter(file, schema) as out:
            for start in range(0, count, 250_000):
                rows = range(start, start + 250_000)
                table = {"prompt": [f"{filler} {n}" for n in rows], "gold": [f"{n}" for n in rows]}
                out.write_table(pyarrow.table(table, schema), row_group_size=250_000)
    ended = subprocess.run([sys.executable, "-c", MILLION, file, kind], capture_output=True, text=True, check=True)
    size, more, *golds = map(int, ended.stdout.split())
    assert size == count
    assert more < 200 * 1024, more
    assert golds == random.Random(3).sample(range(count), 16)


# Rewards in the forms of trainers


def of_trl(prompts: list[Any], completions: list[Any], level: list[int], **kwargs: Any) -> list[float | None]:
    assert {"answer", "completion_ids"} <= kwargs.keys()
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [None if own == 9 else own + len(text) for own, text in zip(level, texts, strict=True)]


async def awaited(prompts: list[Any], completions: list[Any]) -> list[float]:
    await asyncio.sleep(0)
    return [1.0 for _ in prompts]


def of_verl(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, Any]:
    return {"score": 1.0 if (data_source, solution_str) == ("mine", ground_truth) else 0.0, "acc": 1}


def pair(response: str, gold: str | None) -> float:
    return float(len(response))


def raises(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    if "bad" in completions:
        raise KeyError("spoilt")
    return [0.0] * len(prompts)


def nothing(completions: list[Any], **_: Any) -> list[Any]:
    return [None if c == "bad" else float("nan") if c == "worse" else 1.0 for c in completions]


def too_few(completions: list[Any], **_: Any) -> list[float]:
    return [1.0]


def asked(*texts: str, messages: bool = False, **columns: Any) -> list[Asked]:
    turns = ({"role": "user", "content": "q"},) if messages else None
    columns = {"level": 2, "answer": "a"} | columns
    return [Asked(Prompt("q", "gold", turns, columns), text, [1, 2]) for text in texts]


def test_rewards_in_the_forms_of_trainers() -> None:
    name = f"{__name__}:{{}}".format
    for messages in (False, True):
        assert find_rewards(name("of_trl"))(asked("ab", "c", messages=messages)) == [4.0, 3.0]
    assert find_rewards(name("awaited"))(asked("ab")) == [1.0]
    verl = asked("gold", "other", data_source="mine")
    assert find_rewards(name("of_verl"))(verl) == [1.0, 0.0]
    other = asked("7", data_source="mine", reward_model={"ground_truth": "7"})
    assert find_rewards(name("of_verl"))(other) == [1.0]
    assert find_rewards(name("pair"))(asked("abc")) == [3.0]
    both = find_rewards([name("of_trl"), name("pair"), "stand_in"], [1.0, 0.5, 2.0])
    assert both(asked("abc")) == [pytest.approx(5 + 1.5 + 2 * stand_in("abc", None))]
    of_some = find_rewards([name("of_trl"), name("pair")])  # None of one of several counts as nothing, as in TRL
    assert of_some(asked("abc", level=9)) == [3.0]


BAD_REWARDS = {
    "raises": ("raised KeyError: 'spoilt' for 'bad' to 'q'", ["good", "bad"]),
    "nothing": ("returned None for 'bad' to 'q'", ["good", "bad"]),
    "nothing ": ("returned nan for 'worse' to 'q'", ["good", "worse"]),
    "too_few": ("returned 1 rewards for 2 responses", ["a", "b"]),
}


@pytest.mark.parametrize("kind", BAD_REWARDS)
def test_a_reward_that_is_none_names_prompt_and_response(kind: str) -> None:
    said, texts = BAD_REWARDS[kind]
    with pytest.raises(ConfigError, match=r"batch\.reward: ") as caught:
        find_rewards(f"{__name__}:{kind.strip()}")(asked(*texts))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="has 1 weights for 2 functions"):
        find_rewards(["tag_pref", "stand_in"], [1.0])


def test_the_stand_in_differs_within_every_group_of_different_texts() -> None:
    values = [stand_in(f"text {n}", None) for n in range(1000)]
    assert len(set(values)) == 1000
    assert 0.45 < sum(values) / 1000 < 0.55
    assert stand_in("a", None) == stand_in("a", "gold")


# The whole way, against TRL's own trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[list[int]]]:
    folder = tmp_path_factory.mktemp("chat")
    logs, seen = chat.run_of_trl(folder / "run")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat.QUESTIONS))
    return folder, logs, seen


def test_entropy_and_prompts_are_those_of_trl(trained: Any) -> None:
    """H of checkpoint 1 on the run's own dataset is what TRL logged in the step after it, 64 responses of 10 tokens;
    and the prompts are TRL's, id for id."""
    folder, logs, seen = trained
    config = {
        "budget": "smoke",
        "batch": {"reward": "chat:reward", "num_prompts": 8, "num_update_prompts": 8},
        "generation": {"num_return_sequences": 8},
    }
    report = run_probe(
        folder / "run" / "checkpoint-1", ProbeConfig.from_mapping(config), prompts=folder / "questions.jsonl"
    )
    logged = next(line["entropy"] for line in logs if line.get("step") == 2)
    assert abs(report.entropy.per_token.value - logged) <= 3 * report.entropy.per_token.se
    assert report.recipe.settings["max_new_tokens"].value == 10
    assert report.evidence is not None
    own = set()
    for which in ("e", "u"):
        arrays = [report.evidence.arrays[f"{which}.{name}"].tolist() for name in ("ids", "prompt_lens")]
        own |= {tuple(row[:start]) for row, start in zip(*arrays, strict=True)}
    assert own == {tuple(ids) for ids in seen}
    assert len(own) == 16
    verdicts = {name: criterion(report) for name, criterion in CRITERIA.items()}
    assert {n: v for n, v in verdicts.items() if v.status not in ("pass", "not_applicable")} == {}
    assert verdicts["prompts_as_given"].status == verdicts["rewards_again"].status == "pass"
    assert not report.not_chosen
    assert "E and U: gold answers are those of `answer`" in report.doubts
