"""Configuration: documented keys, precedence, numbers, and one-line errors that name the nearest valid key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from entropy_probe import ProbeConfig
from entropy_probe.errors import ConfigError

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt key": ({"batch": {"num_promts": 3}}, "unknown key `batch.num_promts`; did you mean `num_prompts`?"),
    "misspelt section": ({"generations": {}}, "unknown key `generations`; did you mean `generation`?"),
    "deep key": ({"precision": {"tf_nograd": {"dtyp": "float32"}}}, "did you mean `dtype`?"),
    "wrong type": ({"batch": {"num_prompts": "many"}}, "`batch.num_prompts`"),
    "impossible value": ({"generation": {"top_p": 0}}, "`generation.top_p`: input should be greater than 0, got 0"),
    "one response": (
        {"generation": {"num_return_sequences": 1}},
        "`generation`: num_return_sequences must be at least 2",
    ),
    "greedy": ({"generation": {"do_sample": False}}, "`generation.do_sample`"),
    "autocast": ({"precision": {"func_override": {"autocast": True}}}, "`precision.func_override.autocast`"),
    "dtypes differ": ({"precision": {"tf_nograd": {"dtype": "float64"}}}, "must have the same dtype"),
    "dtype of a section": (
        {"precision": {"dtype": "float64", "tf_nograd": {"dtype": "float32"}}},
        "`precision`: dtype is 'float64' and tf_nograd.dtype is 'float32': give one of them",
    ),
    "no dtype": ({"precision": {"dtype": "float16"}}, "`precision.dtype`: input should be 'float32' or 'float64'"),
    "no dtype of a section": (
        {"precision": {"func_override": {"dtype": "float16"}}},
        "`precision.func_override.dtype`: input should be 'float32' or 'float64'",
    ),
    "section of precision is a number": ({"precision": {"dtype": "float64", "tf_nograd": 3}}, "`precision.tf_nograd`"),
    "logits in bf16": (
        {"precision": {"tf_nograd": {"cast_logits_fp32": False}}},
        "`precision.tf_nograd.cast_logits_fp32`",
    ),
    "parameters as they are": (
        {"precision": {"func_override": {"cast_params": False}}},
        "`precision.func_override.cast_params`: input should be True, got False",
    ),
    "section is a number": ({"batch": 3}, "`batch`"),
    "eta is NaN": ({"true_delta_h": {"etas": [float("nan")]}}, "`true_delta_h.etas"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_errors_are_one_line(kind: str) -> None:
    values, message = BAD[kind]
    with pytest.raises(ConfigError) as caught:
        ProbeConfig.from_mapping(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


SECTIONS = ("func_override", "tf_nograd", "tf_withgrad")


@pytest.mark.parametrize(
    "precision",
    [
        {"dtype": "float64"},
        {name: {"dtype": "float64"} for name in SECTIONS},
        {"dtype": "float64", "tf_withgrad": {"dtype": "float64", "autocast": False}},
    ],
    ids=["one line", "three", "both"],
)
def test_spellings_of_float64(precision: dict[str, Any]) -> None:
    config = ProbeConfig.from_mapping({"precision": precision})
    assert config.precision.dtype == "float64"
    assert [getattr(config.precision, name).dtype for name in SECTIONS] == ["float64"] * 3
    table = config.model_dump(mode="json")
    assert "dtype" not in table["precision"]  # so that a report's configuration is what it was
    assert ProbeConfig.model_validate(table) == config


def test_command_line_over_yaml_over_pyproject(tmp_path: Path) -> None:
    pyproject, file = tmp_path / "pyproject.toml", tmp_path / "probe.yaml"
    pyproject.write_text("[tool.entropy-probe]\nbatch = {num_prompts = 4, num_update_prompts = 5, seed = 1}\n")
    file.write_text("batch: {num_prompts: 6, seed: 2}\nfirst_order: {lr: 8e-7}\n")
    config = ProbeConfig.load(file, pyproject, {"batch.seed": 3})
    assert (config.batch.num_prompts, config.batch.num_update_prompts, config.batch.seed) == (6, 5, 3)
    assert config.first_order.lr == 8e-7
    assert ProbeConfig.load() == ProbeConfig()
    pyproject.write_text("[project]\nname = 'x'\n")
    file.write_text("")
    assert ProbeConfig.load(file, pyproject) == ProbeConfig()


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "is not readable YAML"), ("- 1", "holds a list"), ("\x00", "is not readable YAML")],
)
def test_unreadable_yaml(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "probe.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"probe.yaml: {message}") as caught:
        ProbeConfig.load(file)
    assert "\n" not in str(caught.value)


def test_unreadable_pyproject(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool")
    with pytest.raises(ConfigError, match=r"pyproject.toml: is not readable TOML"):
        ProbeConfig.load(pyproject=tmp_path / "pyproject.toml")
    (tmp_path / "pyproject.toml").write_text("[tool]\nentropy-probe = 3\n")
    with pytest.raises(ConfigError, match="is not a table"):
        ProbeConfig.load(pyproject=tmp_path / "pyproject.toml")


def test_what_belongs_to_a_device_map() -> None:
    """`max_memory` does; `offload_folder` serves gradients too, and is a placement with a map alone."""
    given = {"max_memory": {"cpu": "8GiB"}}
    with pytest.raises(ConfigError) as caught:
        ProbeConfig.from_mapping(given)
    expected = "configuration: `max_memory` is given without `device_map`, which it belongs to; correct the value"
    assert str(caught.value) == expected
    assert ProbeConfig.from_mapping({"device_map": "auto", **given}).placement["max_memory"] is not None
    for device_map, placed in ((None, None), ("auto", "scratch")):
        config = ProbeConfig.from_mapping({"device_map": device_map, "offload_folder": "scratch"})
        assert config.placement["offload_folder"] == placed
