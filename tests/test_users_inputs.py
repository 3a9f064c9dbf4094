"""Prompts, rewards and rollouts as trainers hold them: what was asked is what is measured, or it is said."""

from __future__ import annotations

import asyncio
import csv
import json
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import processors

import chat
import healthy
import site_pages
from entropy_probe import ProbeConfig, run_probe
from entropy_probe.__main__ import main
from entropy_probe.afresh.inputs import of_file
from entropy_probe.errors import ConfigError, MeasurementError, RolloutsError
from entropy_probe.model.forward import bind
from entropy_probe.stages.responses.ids import Door, about_eos, eos_ids
from entropy_probe.stages.responses.prompt_files import read_prompts
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.rewards import Asked, find_rewards, stand_in
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.responses.sampled_rollouts import sample_rollouts
from entropy_probe.stages.responses.tasks import draw_prompts
from entropy_probe.stages.responses.trainers_rollouts import understood
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
    said = Door(own)
    said.of_prompt(Prompt("", None, begun))
    assert said.lines()[0].startswith("1 prompts end with an assistant's message, which is left open")
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
    with_tools = Door(own).of_prompt(Prompt("", None, tuple(MESSAGES), {"tools": [tool]}))
    assert '"name": "add"' in own.decode(with_tools)
    own.chat_template = "{{ flavour }}{% for m in messages %}{{ m.content }}{% endfor %}"
    door = Door(own, template={"flavour": "plain "})
    assert own.decode(door.of_prompt(Prompt("", None, tuple(MESSAGES)))).startswith("plain Be brief.")
    for own_flavour in ({"flavour": "own "}, '{"flavour": "own "}'):  # a cell of CSV holds it as JSON
        columns = {"chat_template_kwargs": own_flavour}
        assert own.decode(door.of_prompt(Prompt("", None, tuple(MESSAGES), columns))).startswith("own Be brief.")
    with pytest.raises(MeasurementError, match="`tools` is 'x', no JSON"):
        door.of_prompt(Prompt("", None, tuple(MESSAGES), {"tools": "x"}))


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


def test_a_format_for_training_hides_nothing(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS).map(lambda row: {"answer": int(row["answer"])})
    for name, formatted in (
        ("numpy", table.with_format("numpy")),
        ("some", table.with_format(columns=["prompt"])),
        ("pandas", table.with_format("pandas")),
    ):
        formatted.save_to_disk(tmp_path / name)
        pool = read_prompts(tmp_path / name)
        assert (pool[7].gold, pool[7].columns["level"], pool.gold) == ("7", 1, "answer")


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerows([("prompt", "gold", "level"), ("two\nlines, and a comma", "3", "hard"), ("b", "", "easy")])
    assert list(read_prompts(file)) == [Prompt("two\nlines, and a comma", "3"), Prompt("b")]  # an empty cell is nothing
    assert read_prompts(file)[0].columns["level"] == "hard"
    file.write_text('\ufeffprompt, gold,answer\n"[{""role"": ""user"", ""content"": ""q""}]",,5\n')
    assert list(read_prompts(file)) == [Prompt("q", "5", ({"role": "user", "content": "q"},))]
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
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.responses.sampled_rollouts import sample_rollouts
from entropy_probe.stages.responses.tasks import draw_prompts
from entropy_probe.stages.responses.trainers_rollouts import understood
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


PAGES_REWARDS = {
    "howto/prompts.md": ("scoring.py", {"right": [1.0, 0.0], "short": [1 - 6 / 500, 1 - 2 / 500]}),
    "start/checkpoint.md": ("rewards.py", {"accuracy": [1.0, 0.0]}),
    "README.md": ("", {"accuracy": [1.0, 0.0]}),
}


@pytest.mark.parametrize("page", PAGES_REWARDS)
@pytest.mark.parametrize("messages", [False, True])
def test_rewards_of_the_pages_take_texts_and_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str, messages: bool
) -> None:
    """Of "It: 53" and "no" to a question whose answer is 53, the prompts being texts or chat messages."""
    title, expected = PAGES_REWARDS[page]
    if title:
        text = next(text for _, name, _, text in site_pages.fenced(page) if name == title)
    else:
        code = re.search(r"^      def accuracy.*\n(?: {10}.*\n)+", (site_pages.ROOT / page).read_text(), re.MULTILINE)
        assert code is not None
        text = textwrap.dedent(code[0])
    module = f"rewards_of_page_{title.partition('.')[0]}_{messages}"
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    responses = asked("It: 53", "no", messages=messages, answer="53")
    for name, values in expected.items():
        assert find_rewards(f"{module}:{name}")(responses) == pytest.approx(values, rel=1e-12)


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


def changes(completions: list[str], targets: list[list[str]], **_: Any) -> list[float]:
    for own in targets:
        own.append("more")
    return [float(len(own)) for own in targets]


def test_each_response_has_columns_of_its_own_and_a_loop_may_be_running() -> None:
    together = asked("a", "b", "c", targets=["x"])
    assert find_rewards(f"{__name__}:changes")(together) == [2.0] * 3

    async def in_a_notebook() -> list[float]:
        return find_rewards(f"{__name__}:awaited")(asked("ab"))

    assert asyncio.run(in_a_notebook()) == [1.0]


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
    assert "gold answers are from the column `answer`" in report.doubts


# Rollouts that trainers wrote


def verl_rows() -> list[dict[str, Any]]:
    """As `_dump_generations` of verl's trainer writes them: responses of a prompt need not stand side by side."""
    return [
        {"input": f"q{n}", "output": text, "gts": str(n), "score": float(len(text)), "step": 7, "acc": True}
        for text in ("a", "bb", "ccc")
        for n in range(2)
    ]


def prime_rows(*, ids: bool) -> list[dict[str, Any]]:
    rows = []
    for n in range(2):
        for text in ("a", "bb"):
            tokens = {
                "prompt_ids": [5, n + 3],
                "completion_ids": [7] * len(text),
                "completion_logprobs": [-1.0] * len(text),
            }
            rows.append(
                {
                    "example_id": n,
                    "prompt": [{"role": "user", "content": f"q{n}"}],
                    "completion": [{"role": "assistant", "content": text}],
                    "reward": len(text),
                    "advantage": len(text) - 1.5,
                    "is_truncated": text == "bb",
                    "trajectory": [{"tokens": tokens}] if ids else [],
                }
            )
    return rows


def dumped(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_rollouts_of_verl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = dumped(tmp_path / "7.jsonl", verl_rows())
    found = understood(file)
    assert found is not None
    assert [line for _, line in found.lines] == [
        {"prompt": f"q{n}", "gold": str(n), "responses": ["a", "bb", "ccc"], "rewards": [1.0, 2.0, 3.0]}
        for n in range(2)
    ]
    assert main(["rollouts", str(file), "--out", str(tmp_path / "e.jsonl")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "rollouts as verl writes them: 2 prompts, 6 responses (3 of each)"
    assert said[1] == "keys: prompt, gold, responses, rewards"
    assert "without special tokens" in said[2]
    own = chat.tokenizer(None)
    bound = bind(chat.tiny_model(own))
    direct, by_file = (read_rollouts(path, bound, own) for path in (file, tmp_path / "e.jsonl"))
    assert torch.equal(direct.ids, by_file.ids)
    assert direct.found[0] == "rollouts as verl writes them"
    assert own.decode(direct.responses[2]) == "ccc" + own.eos_token
    two = dumped(tmp_path / "both.jsonl", [*verl_rows(), *({**row, "step": 9} for row in verl_rows()[:4])])
    assert len(understood(two).lines[0][1]["rewards"]) == 2
    assert len(understood(two, 7).lines[0][1]["rewards"]) == 3
    assert main(["rollouts", str(two), "--step", "8"]) == 4
    assert "has the steps [7, 9], not 8; give one of them" in capsys.readouterr().err
    as_text = dumped(tmp_path / "text.jsonl", [{**row, "step": "7"} for row in verl_rows()])
    assert [line for _, line in understood(as_text).lines] == [line for _, line in found.lines]
    ours = dumped(tmp_path / "ours.jsonl", [{"prompt_ids": [3], "response_ids": [[4]], "rewards": 3}])
    assert main(["rollouts", str(ours)]) == 4
    assert "is not a rollouts file that verl, TRL or prime-rl writes" in capsys.readouterr().err
    dumped(file, [{**verl_rows()[0], "score": "high"}])
    assert main(["rollouts", str(file)]) == 4
    assert "7.jsonl:1: is not a row of verl (TypeError: 'high' is not a number)" in capsys.readouterr().err


def test_rollouts_of_prime_rl(tmp_path: Path) -> None:
    """By the ids that were sampled, where they are there; else by text, with what was cut."""
    found = understood(dumped(tmp_path / "a.jsonl", prime_rows(ids=True)))
    assert found.lines[1][1] == {
        "prompt_ids": [5, 4],
        "response_ids": [[7], [7, 7]],
        "rewards": [1.0, 2.0],
        "advantages": [-0.5, 0.5],
        "logprobs": [[-1.0], [-1.0, -1.0]],
    }
    found = understood(dumped(tmp_path / "b.jsonl", prime_rows(ids=False)))
    assert found.lines[0][1] == {
        "prompt": [{"role": "user", "content": "q0"}],
        "responses": ["a", "bb"],
        "rewards": [1.0, 2.0],
        "advantages": [-0.5, 0.5],
        "truncated": [False, True],
    }


def test_columns_that_trl_logged_beside_rewards(tmp_path: Path) -> None:
    """A table does not say which of its numbers are rewards: where there are several it is asked."""
    rows = [
        {"step": 1, "prompt": "q", "completion": "a", "acc": 1.0, "length": 100, "ok": True, "advantage": 0.5},
        {"step": 1, "prompt": "q", "completion": "b", "acc": None, "length": 101, "ok": True, "advantage": -0.5},
    ]
    file = tmp_path / "completions_00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    with pytest.raises(RolloutsError, match=r"has the columns \['acc', 'length', 'ok'\] before the advantage"):
        understood(file)
    found = understood(file, rewards=["acc"])
    assert found.lines[0][1]["rewards"] == [1.0, 0.0]
    assert "rewards are the column acc" in found.assumed
    with pytest.raises(RolloutsError, match="has no column 'accuracy' of rewards; there are"):
        understood(file, rewards=["accuracy"])


def test_tokens_that_the_policy_did_not_choose_are_refused(tmp_path: Path) -> None:
    rows = prime_rows(ids=True)
    rows[1]["trajectory"][0]["tokens"]["completion_mask"] = [1, 0]
    with pytest.raises(RolloutsError, match=r"a\.jsonl:2: is not a row of prime-rl .*completion_mask has a 0"):
        understood(dumped(tmp_path / "a.jsonl", rows))
    rows = prime_rows(ids=False)
    rows[2]["advantage"] = None
    found = understood(dumped(tmp_path / "b.jsonl", rows))
    assert "`advantages` are left out: some responses have none" in found.assumed
    assert all("advantages" not in line for _, line in found.lines)


def test_rollouts_of_trl(trained: Any) -> None:
    """The table that the run itself wrote: prompts are TRL's own id for id, rewards and advantages as it had them."""
    folder, logs, seen = trained
    file = folder / "run" / "completions" / "completions_00002.parquet"
    found = understood(file)
    assert found is not None
    assert found.trainer == "TRL"
    own = chat.tokenizer()
    rollouts = read_rollouts(file, bind(chat.tiny_model(own)), own)
    assert (rollouts.num_prompts, rollouts.num_responses) == (16, 4)
    prompts = {
        tuple(ids[:start]) for ids, start in zip(rollouts.ids.tolist(), rollouts.prompt_lens.tolist(), strict=True)
    }
    assert prompts == {tuple(ids) for ids in seen}
    logged = next(line["reward"] for line in logs if line.get("step") == 2)
    assert float(rollouts.rewards.mean()) == pytest.approx(logged, rel=1e-6)
    assert rollouts.advantages is not None
    torch.testing.assert_close(rollouts.advantages.mean(1), torch.zeros(16, dtype=torch.float64), atol=1e-6, rtol=0)
    assert any("other ids were sampled" in line for line in rollouts.found)  # bytes that are no character


# Ids that are not what they seem


def bytes_tokenizer(**more: Any) -> Any:
    return chat.tokenizer(None, **more)


def test_a_second_bos_is_left_out() -> None:
    """Text that was rendered by a template begins with BOS, and the tokenizer adds another."""
    own = chat.tokenizer("llama3")
    door, text = Door(own), "<|begin_of_text|>What is 2+3?"
    assert own(text).input_ids[:2] == [own.bos_token_id] * 2
    assert door.of_text(text) == own("What is 2+3?").input_ids == door.of_text("What is 2+3?")
    assert door.lines() == ("1 prompts began with BOS, and the tokenizer added another, which was left out",)


def test_an_appended_eos_is_left_out() -> None:
    own = bytes_tokenizer()
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {own.eos_token}", pair=None, special_tokens=[(own.eos_token, own.eos_token_id)]
    )
    door = Door(own)
    assert own("ab").input_ids[-1] == own.eos_token_id
    assert door.of_text("ab") == own("ab", add_special_tokens=False).input_ids
    assert door.of_text(f"ab{own.eos_token}")[-1] == own.eos_token_id  # the text has it itself
    assert door.lines() == ("1 prompts had an EOS that the tokenizer appended, which was left out",)


def test_padding_of_ids_is_left_out(tmp_path: Path) -> None:
    """Prompts padded on the left and responses on the right, with no mask; with padding that is EOS too."""
    own = bytes_tokenizer()
    pad, eos = own.pad_token_id, own.eos_token_id
    bound = bind(chat.tiny_model(own))
    clean = {"prompt_ids": [20, 21], "response_ids": [[30, eos], [31, 32]], "rewards": [1, 0]}
    padded = clean | {"prompt_ids": [pad, pad, 20, 21], "response_ids": [[30, eos, pad], [31, 32, pad]]}
    with_numbers = padded | {"logprobs": [[-1, -2, 0], [-3, -4, 0]]}
    one, other = (
        read_rollouts(dumped(tmp_path / f"{k}.jsonl", [line, line]), bound, own)
        for k, line in enumerate((clean, with_numbers))
    )
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.gen_lens, other.gen_lens)
    assert other.logprobs.tolist() == [[-1, -2], [-3, -4]] * 2
    assert other.found == (
        "2 prompts began with padding, which was left out (first: 1.jsonl:1)",
        "4 responses ended with padding, which was left out (first: 1.jsonl:1)",
    )
    own.pad_token = own.eos_token
    line = clean | {"response_ids": [[30, eos, eos, eos], [31, 32]]}
    again = read_rollouts(dumped(tmp_path / "eos.jsonl", [line, line]), bound, own)
    assert torch.equal(again.ids[:, :4], one.ids[:, :4])
    seen = of_file(tmp_path / "1.jsonl", [[20, 21]] * 2, [[[30, eos], [31, 32]]] * 2, lambda: pad)
    assert seen["wrong"] == []
    masked = padded | {"prompt_mask": [1] * 4, "response_mask": [[1, 1, 0], [1, 1, 1]]}
    kept = read_rollouts(dumped(tmp_path / "masked.jsonl", [masked, masked]), bound, own)
    assert kept.prompt_lens.tolist() == [4] * 4  # what a mask calls a token is one
    assert kept.responses[:2] == [[30, eos], [31, 32, pad]]
    nothing = clean | {"response_ids": [[30, eos], [pad, pad]]}
    with pytest.raises(RolloutsError, match="`response_ids` has an empty entry"):
        read_rollouts(dumped(tmp_path / "none.jsonl", [nothing, nothing]), bound, bytes_tokenizer())
    dropped = of_file(tmp_path / "1.jsonl", [[21]] * 2, [[[30, eos], [31, 32]]] * 2, lambda: pad)
    assert dropped["wrong"] == [0, 1]  # a token of the prompt is no padding


@pytest.mark.parametrize(
    ("configured", "own", "ends"),
    [
        ("<|endoftext|>", "<|im_end|>", ["<|endoftext|>", "<|im_end|>"]),  # the tokenizer's is not among the model's
        (["<|im_end|>", "<|endoftext|>"], "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),  # a list, as Qwen has it
        ("a", "<|im_end|>", ["a", "<|im_end|>"]),  # an ordinary token of the text: a default that nobody set?
        (None, "<|im_end|>", ["<|im_end|>"]),
    ],
)
def test_where_a_response_ends(configured: Any, own: str, ends: list[str]) -> None:
    made = bytes_tokenizer(eos_token=own)
    ids = made.convert_tokens_to_ids
    given = ids(configured) if configured is not None else None
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=given), config=None)
    assert eos_ids(model, made) == [ids(end) for end in ends]
    said = {"<|endoftext|>": ["responses end at the tokenizer's"], "a": ["responses end at", "generation_config ends"]}
    lines = about_eos(model, made)
    expected = said.get(str(configured), [])
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))
    assert eos_ids(model, None) == ([] if given is None else given if isinstance(given, list) else [given])


def test_responses_end_at_the_tokenizers_eos(tmp_path: Path) -> None:
    """Where generation_config names another: none goes on after it."""
    own = bytes_tokenizer()
    model = chat.tiny_model(own)
    model.generation_config.eos_token_id = own.convert_tokens_to_ids("<|endoftext|>")
    rollouts = sample_rollouts(bind(model), own, [Prompt(f"q{n}") for n in range(8)], ProbeConfig().generation, seed=0)
    ends = {own.eos_token_id, own.convert_tokens_to_ids("<|endoftext|>")}
    assert sum(own.eos_token_id in response for response in rollouts.responses) > 5
    assert all(not ends & set(response[:-1]) for response in rollouts.responses)


def test_ids_beyond_the_tokenizer_and_characters_that_are_cut() -> None:
    """A padded embedding has more rows than the tokenizer has tokens; a response may end inside a character."""
    own = bytes_tokenizer()
    door = Door(own, [own.eos_token_id])
    door.text_of([len(own) + 3, 20])
    door.text_of(own("é").input_ids[:1])
    door.inside_response([20, len(own)])
    assert door.lines() == (
        "2 responses hold ids that the tokenizer does not have",
        "1 responses end inside a character: rewards see U+FFFD at the end",
    )
    told = Door(own)
    told.of_response("a�", ended=False)
    assert told.lines() == (
        "1 responses of text hold U+FFFD or do not come back from their ids: other ids were sampled",
    )
    clean = Door(own)
    assert clean.of_response("plain é", ended=False) == own("plain é").input_ids
    assert not clean.lines()


def test_bare_text_for_a_model_that_chats_is_said() -> None:
    own = chat.tokenizer()
    door = Door(own)
    door.of_prompt(Prompt("What is 2+3?"))
    assert door.lines()[0].startswith("1 prompts are bare text, and the tokenizer has a chat template")
    assert not Door(chat.tokenizer(None)).lines()


# The second reader asks for the same


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return healthy.supervised("llama", tmp_path_factory.mktemp("plain") / "ckpt", 0)


def one(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def with_state(completions: list[str], trainer_state: Any, log_metric: Any) -> list[float]:
    log_metric("length", 3.0)
    return [float(len(text)) for text in completions]


def by_target(completions: list[str], target: list[int]) -> list[float]:
    return [float(own) for own in target]


async def later(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


AGAIN: dict[str, tuple[Any, str]] = {
    "relative to the batch": ({"reward": "chat:longer_than_the_mean"}, "pass"),
    "three weights": ({"reward": [f"{__name__}:one"] * 3, "reward_weights": [0.1, 0.2, 0.3]}, "pass"),
    "asynchronous": ({"reward": f"{__name__}:later"}, "pass"),
    "what a trainer hands over beside": ({"reward": f"{__name__}:with_state"}, "pass"),
    "the same text with other columns": ({"reward": f"{__name__}:by_target"}, "not_applicable"),  # which of them?
}


@pytest.mark.parametrize("kind", AGAIN)
def test_rewards_are_asked_for_again(tmp_path: Path, plain: Path, kind: str) -> None:
    batch, status = AGAIN[kind]
    same = kind == "the same text with other columns"
    rows = [{"prompt": "Write a poem." if same else f"Question {n}", "target": n, "answer": "x"} for n in range(12)]
    config = ProbeConfig.from_mapping(
        {
            "budget": "smoke",
            "invariance": {"max_examples": 0},
            "generation": {"num_return_sequences": 3, "max_new_tokens": 6},
            "batch": {"num_prompts": 4, "num_update_prompts": 4, **batch},
        }
    )
    report = run_probe(plain, config, prompts=dumped(tmp_path / "p.jsonl", rows))
    verdict = CRITERIA["rewards_again"](report)
    assert (verdict.status, verdict.value) == (status, 0.0 if status == "pass" else None)
    assert CRITERIA["prompts_as_given"](report).status == "pass"
