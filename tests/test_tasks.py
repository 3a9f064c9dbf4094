"""Prompt datasets, rewards, and the users' own of both."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from entropy_probe import ProbeConfig
from entropy_probe.errors import ConfigError, ProbeError, RolloutsError
from entropy_probe.model.forward import bind
from entropy_probe.stages.batches import draw_batches
from entropy_probe.stages.responses import rewards, tasks
from entropy_probe.stages.responses.gsm8k import R1_TEMPLATE
from entropy_probe.stages.responses.prompt_files import read_prompts
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.rewards import find_reward, same_answer, tag_pref
from entropy_probe.stages.responses.tasks import DATASETS, dataset_prompts, draw_prompts

QUESTION = {"question": "How many {eggs}?", "answer": "She sells 16 - 3.\n#### 1,072"}
ASKED = Prompt(R1_TEMPLATE.replace("{question}", "How many {eggs}?"), "1,072")
MODULE = """
from entropy_probe.stages.responses.prompt_files import read_prompts
from entropy_probe.stages.responses.prompts import Prompt

def prompts(split):
    yield Prompt(f"{split} 1", "1")
    yield ("two", 2)
    yield {"prompt": "three"}

def reward(response, gold): return len(response) + (gold is None)
def endless(split):
    while True: yield ("a", "b")
def raising(*_): raise KeyError("a\\nb")
def raising_late(split):
    yield ("a", "b")
    raise OSError("disk")
def reading(split): return read_prompts("nowhere.jsonl")
def none(*_): return None
def nothing(split): return []
def text(split): return "abc"
def of(value): return lambda *_: value
no_text, no_prompt, bad_gold = of([("a", 1), ("", 1)]), of([{"question": "a"}]), of([("a", [1])])
nan_gold, surrogate, long_gold = of([("a", float("nan"))]), of([("\\ud800", "")]), of([("a", 10**5000)])
nan, infinite, words, enormous, true = of(float("nan")), of(float("inf")), of("1.0"), of(10**5000), of(True)
number = 3
class Namespace:
    reward = staticmethod(lambda response, gold: 0.25)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of the user's, importable, and modules that cannot be."""
    folder = tmp_path / "site"
    (folder / "own_probe").mkdir(parents=True)
    (folder / "own_probe" / "__init__.py").touch()
    (folder / "own_probe" / "data.py").write_text(MODULE)
    (folder / "own_probe" / "broken.py").write_text("import no_such_module_anywhere")
    (folder / "own_probe" / "script.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [name for name in sys.modules if name.startswith("own_probe")]:
        del sys.modules[name]


def register(folder: Path, package: str, entry_points: str) -> None:
    """What installing a package leaves behind."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


# datasets


def test_prompts_are_drawn_without_repeats_and_splits_are_disjoint() -> None:
    train, test = (DATASETS["arithmetic"](split) for split in ("train", "test"))
    assert len(train) + len(test) == 5000
    assert not {p.text for p in train} & {p.text for p in test}
    drawn = draw_prompts(train, 40, seed=3, with_replacement=False)
    assert len({p.text for p in drawn}) == 40
    assert drawn == draw_prompts(train, 40, seed=3, with_replacement=False)
    assert drawn != draw_prompts(train, 40, seed=4, with_replacement=False)
    with pytest.raises(ConfigError, match="the dataset has 3"):
        draw_prompts(train[:3], 4, seed=0, with_replacement=False)
    assert len(draw_prompts(train[:3], 10, seed=0, with_replacement=True)) == 10


def test_arithmetic_is_what_the_demo_was_trained_on() -> None:
    """Numbers and order are part of the bundled checkpoint: another shuffle would mix its training and test sets."""
    prompts = [prompt for split in ("train", "test") for prompt in dataset_prompts("arithmetic", split)]
    lines = "".join(f"{prompt.text}{prompt.gold}\n" for prompt in prompts)
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "a0c4e3a09afff400"


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "gold": 3}\n\n{"prompt": "b"}\n')
    assert list(read_prompts(file)) == [Prompt("a", "3"), Prompt("b")]
    assert list(dataset_prompts(f"jsonl:{file}", "test")) == [Prompt("a", "3"), Prompt("b")]
    for content, message in (
        ("{", "p.jsonl:1: is not JSON"),
        ("[1]", "p.jsonl:1: is a list"),
        ('{"prompt": ""}', "p.jsonl:1: has neither a text"),
        ('{"prompt": "\\ud800"}', "p.jsonl:1: has a lone surrogate"),
        ('{"prompt": "a", "gold": []}', "p.jsonl:1: `gold`"),
        ('{"prompt": "a", "gold": NaN}', "p.jsonl:1: `gold` is nan"),
        ("", "holds no prompt"),
    ):
        file.write_text(content)
        with pytest.raises(RolloutsError, match=message):
            read_prompts(file)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}')
    assert list(dataset_prompts("jsonl:~/p.jsonl", "train")) == [Prompt("a")]


def test_gsm8k_from_its_own_files(tmp_path: Path) -> None:
    other = {"question": "Two?", "answer": "a #### b #### 2"}
    (tmp_path / "train.jsonl").write_text(json.dumps(QUESTION) + "\n" + json.dumps(other) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps(other))
    assert dataset_prompts(f"gsm8k_r1_template:{tmp_path}", "train")[0] == ASKED
    assert [p.gold for p in dataset_prompts(f"gsm8k_r1_template:{tmp_path}", "test")] == ["2"]
    assert len(dataset_prompts(f"gsm8k_r1_template:{tmp_path / 'train.jsonl'}", "test")) == 2
    assert tag_pref("<think>x</think> <answer>1072</answer>", ASKED.gold) == 1.0
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert tag in ASKED.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "#### 1"}, "has no text under `question`"),
        ({"question": "a"}, "has no gold answer after `####`"),
        ({"question": "a", "answer": "1"}, "has no gold answer after `####`"),
        ({"question": "a", "answer": "1 #### "}, "has no gold answer after `####`"),
        ({"question": "\ud800", "answer": "#### 1"}, "has a lone surrogate"),
    ],
)
def test_gsm8k_errors_name_the_line(tmp_path: Path, row: Any, message: str) -> None:
    file = tmp_path / "g.jsonl"
    file.write_text(json.dumps(QUESTION) + "\n" + json.dumps(row))
    with pytest.raises(RolloutsError, match=r"g\.jsonl:2: " + message):
        dataset_prompts(f"gsm8k_r1_template:{file}", "train")
    file.write_text("")
    with pytest.raises(RolloutsError, match="holds no question"):
        dataset_prompts(f"gsm8k_r1_template:{file}", "train")
    with pytest.raises(ConfigError, match=r"there is no file .*train\.jsonl"):
        dataset_prompts(f"gsm8k_r1_template:{tmp_path}", "train")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package `datasets` with an empty cache, online as far as it knows, and a record of what it tries to reach."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    reached: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        reached.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)  # `datasets` takes a folder openai/gsm8k below the current one for the dataset
    yield datasets
    assert not reached
    assert not datasets.config.HF_HUB_OFFLINE
    assert not datasets.config.HF_DATASETS_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_gsm8k_from_the_cache_and_never_from_the_network(hub: Any, tmp_path: Path, caplog: Any) -> None:
    with pytest.raises(ConfigError, match="gsm8k_r1_template:PATH") as caught:
        dataset_prompts("gsm8k_r1_template", "train")
    assert "\n" not in str(caught.value)
    folder = tmp_path / "cache" / "openai___gsm8k" / "main" / "0.0.0" / "hash"
    folder.mkdir(parents=True)
    with hub.arrow_writer.ArrowWriter(path=str(folder / "gsm8k-train.arrow")) as writer:
        writer.write(QUESTION)
        count, size = writer.finalize()
    splits = hub.splits.SplitDict(dataset_name="gsm8k")
    splits.add(hub.splits.SplitInfo("train", size, count))
    info = hub.DatasetInfo(
        builder_name="parquet", dataset_name="gsm8k", config_name="main", version="0.0.0", splits=splits
    )
    info.write_to_directory(str(folder))
    assert dataset_prompts("gsm8k_r1_template", "train") == [ASKED]
    assert not caplog.records
    with pytest.raises(ConfigError, match="cannot be read from the local cache"):
        dataset_prompts("gsm8k_r1_template", "test")


def test_gsm8k_without_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the package datasets .*gsm8k_r1_template:PATH"):
        dataset_prompts("gsm8k_r1_template", "train")


# the users' own


def test_a_dataset_of_ones_own(own: Path) -> None:
    expected = [Prompt("test 1", "1"), Prompt("two", "2"), Prompt("three")]
    assert dataset_prompts("own_probe.data:prompts", "test") == expected
    register(own, "own-probe", "[entropy_probe.datasets]\nmine = own_probe.data:prompts [extra]\n")
    assert dataset_prompts("mine", "test") == expected
    with pytest.raises(ConfigError, match=r"did you mean `mine`\? known are arithmetic, .*, mine, or module:function"):
        dataset_prompts("mime", "test")


def test_a_reward_of_ones_own(own: Path) -> None:
    assert find_reward("tag_pref") is tag_pref
    register(own, "own-probe", "[entropy_probe.rewards]\nlength = own_probe.data:reward\n")
    for name in ("own_probe.data:reward", "length"):
        assert find_reward(name)("abc", "1") == 3.0
        assert find_reward(name)("abc", None) == 4.0
    assert find_reward("own_probe.data:Namespace.reward")("", None) == 0.25
    one = find_reward("own_probe.data:true")("", None)
    assert (one, type(one)) == (1.0, float)


def test_a_name_registered_twice(own: Path) -> None:
    for package, function in (("one", "nan"), ("two", "true")):
        register(own, package, f"[entropy_probe.rewards]\nr = own_probe.data:{function}\n")
    with pytest.raises(ConfigError, match=r"registered as own_probe\.data:nan and as own_probe\.data:true"):
        find_reward("r")
    register(own, "three", "[entropy_probe.rewards]\ntag_pref = own_probe.data:nan\n")
    assert find_reward("tag_pref") is tag_pref


UNFIT_NAMES = {
    "arithmatic": "'arithmatic' is not known; did you mean `arithmetic`?",
    "json:prompts.jsonl": "did you mean `jsonl:prompts.jsonl`?",
    "gsm8k": "did you mean `gsm8k_r1_template`?",
    "jsonl:": "names no file; write jsonl:PATH",
    "jsonl": "names no file; write jsonl:PATH",
    "arithmetic:7": "arithmetic takes no file",
    "": "'' is not known; known are arithmetic,",
    "no_such.module:f": "there is no module no_such.module",
    "own_probe.none:f": "there is no module own_probe.none",
    "own_probe.broken:f": "raised ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    "own_probe.script:f": "raised SystemExit: 3",
    "own_probe.data:f": "own_probe.data has no f",
    "own_probe.data:number": "is a int; name a function",
    "jsonl:/nowhere.jsonl": "/nowhere.jsonl: cannot be read",
    "jsonl:\0": "cannot be read",
    "own_probe.data:raising": "'own_probe.data:raising' raised KeyError: 'a\\nb'; correct it",
    "own_probe.data:raising_late": "raised OSError: disk",
    "own_probe.data:reading": "nowhere.jsonl: cannot be read",
    "own_probe.data:none": "returned None; return an iterable",
    "own_probe.data:nothing": "yields no prompts for split train",
    "own_probe.data:endless": "yields more than 1000 prompts",
    "own_probe.data:text": "entry 0 is 'a'; give Prompt(text, gold)",
    "own_probe.data:no_text": "entry 1 has neither a text nor messages",
    "own_probe.data:no_prompt": "entry 0 has neither a text nor messages",
    "own_probe.data:bad_gold": "entry 0 `gold` is [1]",
    "own_probe.data:nan_gold": "entry 0 `gold` is nan",
    "own_probe.data:long_gold": "entry 0 `gold` is a int",
    "own_probe.data:surrogate": "entry 0 has a lone surrogate",
}


@pytest.mark.parametrize("name", list(UNFIT_NAMES))
def test_datasets_that_cannot_be_used(own: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_LARGEST_POOL", 1000)
    with pytest.raises(ProbeError) as caught:
        dataset_prompts(name, "train")
    assert UNFIT_NAMES[name] in str(caught.value)
    assert (" raised " in str(caught.value)) == ("raised " in UNFIT_NAMES[name])  # a ProbeError is passed on as it is
    assert "\n" not in str(caught.value)
    if not isinstance(caught.value, RolloutsError):
        assert str(caught.value).startswith("batch.dataset: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tag_perf",
            "'tag_perf' is not known; did you mean `tag_pref`? known are tag_pref, stand_in, or module:function",
        ),
        ("own_probe.data:f", "own_probe.data has no f"),
        ("own_probe.data:raising", "raised KeyError"),
        ("own_probe.data:none", "returned None for 'abc'; return a finite number"),
        ("own_probe.data:nan", "returned nan"),
        ("own_probe.data:infinite", "returned inf"),
        ("own_probe.data:words", "returned '1.0'"),
        ("own_probe.data:enormous", "returned a int"),
        ("own_probe.data:prompts", "raised TypeError"),
    ],
)
def test_rewards_that_cannot_be_used(own: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_reward(name)("abc", "1")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("batch.reward: ")


class Letters:
    """A tokenizer of single characters, enough for `sample_rollouts`."""

    eos_token_id = models.EOS

    def __call__(self, text: str) -> Any:
        return type("Encoding", (), {"input_ids": [3 + ord(c) % 30 for c in text]})()

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "x" * len(ids)


def test_configured_names_reach_the_batches(own: Path) -> None:
    """Dataset and reward of the configuration are those of E and U; `missing_gold` counts prompts without an answer."""
    config = ProbeConfig.from_mapping(
        {
            "batch": {
                "dataset": "own_probe.data:prompts",
                "reward": "own_probe.data:reward",
                "num_prompts": 3,
                "num_update_prompts": 3,
                "with_replacement": True,
            },
            "generation": {"max_new_tokens": 3, "num_return_sequences": 2},
        }
    )
    e, u = draw_batches(bind(models.tiny_model("llama")), Letters(), config, None, None, None, None)
    for batch in (e, u):
        asked = {len("train 1"): False, len("two"): False, len("three"): True}
        without_gold = [asked[n] for n in batch.prompt_lens[::2].tolist()]
        assert batch.missing_gold == sum(without_gold)
        expected = batch.per_prompt(batch.gen_lens) + torch.tensor(without_gold)[:, None]
        assert torch.equal(batch.rewards, expected.double())
    bad = ProbeConfig.from_mapping({"batch": {"reward": "tag_perf"}})
    with pytest.raises(ConfigError, match="did you mean `tag_pref`"):
        draw_batches(bind(models.tiny_model("llama")), Letters(), bad, None, None, None, None)


# tag_pref


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>x</think><answer>42</answer>", 1.0),
        ("<answer> 42.0 </answer>", 1.0),
        ("<answer>$42</answer>", 1.0),
        ("<answer>\n42\n</answer> and more", 1.0),
        ("<answer>43</answer>", 0.0),
        ("42", 0.0),
        ("<answer>42", 0.0),
        ("42</answer>", 0.0),
        ("<answer>42</answer><answer>42</answer>", 0.0),
        ("<answer><answer>42</answer>", 0.0),
        ("<answer>42</answer><answer>", 0.0),
        ("</answer>42<answer>", 0.0),
        ("</answer><answer>42", 0.0),
        ("42</answer><answer>", 0.0),
        ("<Answer>42</Answer>", 0.0),
        ("<answer></answer>", 0.0),
    ],
)
def test_tag_pref(response: str, reward: float) -> None:
    assert tag_pref(response, "42") == reward
    assert tag_pref(response, None) == 0.0
    assert tag_pref("</answer><answer>", "") == 0.0


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1,000", "1000.0"),
        ("$1000", "1,000"),
        ("-$5", "-5"),
        ("$-5.00", "-5"),
        ("$42$", "42"),
        ("+7", "7."),
        (".5", "0.50"),
        ("1e3", "1000"),
        ("2E-1", "0.2"),
        ("-0", "0"),
        ("007", "7"),
        ("12,345,678.90", "12345678.9"),
        ("1" * 50 + "2", "1" * 50 + "2.0"),
        ("The  Cat", "the cat"),
        ("\u0663", "\u0663"),
        ("1,00", "1,00"),
        ("1e999999999", "1E999999999"),
    ],
)
def test_same_answers(answer: str, gold: str) -> None:
    assert same_answer(answer, gold)
    assert same_answer(gold, answer)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1000", "1001"),
        ("nan", "0"),
        ("1,00", "100"),
        ("10,00", "1000"),
        (",100", "100"),
        ("1,0000", "10000"),
        ("1_000", "1000"),
        ("\u0663", "3"),
        ("\uff13", "3"),
        ("1e999999999", "1e999999998"),
        ("1$000", "1000"),
        ("--5", "5"),
        ("-$-5", "5"),
        ("50%", "50"),
        ("1 000", "1000"),
        ("1" * 50 + "2", "1" * 50 + "3"),
        ("", "0"),
        (".", "0"),
        ("$", "0"),
        ("inf", "Infinity"),
    ],
)
def test_different_answers(answer: str, gold: str) -> None:
    assert not same_answer(answer, gold)
    assert not same_answer(gold, answer)


MILLION = 10**6
HOSTILE = {
    "digits": "1" * MILLION,
    "groups": "1" + ",111" * (MILLION // 4),
    "groups that end badly": "1" + ",111" * (MILLION // 4) + ",",
    "zeros": "0." + "0" * MILLION,
    "white space": " " * MILLION + "x",
    "dollars": "$" * MILLION,
    "combining": "a" + "\u0301\u0323" * (MILLION // 2),
    "opened": "<answer>" * (MILLION // 8),
    "opened and closed": "<answer>" * (MILLION // 16) + "</answer>" * (MILLION // 16),
    "almost": "<answer" * (MILLION // 7),
    "exponent": "1e" + "9" * MILLION,
    "surrogates": "\ud800" * MILLION,
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_hostile_text_is_judged_in_linear_time(kind: str) -> None:
    """10⁶ characters take 0.1 s at worst on two slow cores; anything quadratic takes minutes."""
    start = time.process_time()
    assert tag_pref(HOSTILE[kind], "1") == 0.0
    assert tag_pref(f"<answer>{HOSTILE[kind]}</answer>", "1") == 0.0
    assert not same_answer(HOSTILE[kind], "1e999")
    assert time.process_time() - start < 5


def test_the_decimal_context_does_not_matter() -> None:
    """A sign applied to a Decimal would round it to the precision of the context."""
    import decimal

    with decimal.localcontext() as context:
        context.prec = 2
        assert not same_answer("-12345", "-12346")
        assert rewards.same_answer("-12345", "-12345.0")
