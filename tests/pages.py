"""What is put on pages here: real runs of tiny checkpoints, one of which is healthy, one noisy, one collapsing.

The prompts of the first try to be markup.
"""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import collapsed
import healthy
import models
from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.page.contents import Checkpoint
from entropy_probe.page.details import details_of
from entropy_probe_checks.shown import explained, judged

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\">"
SMALL: dict[str, Any] = {"budget": "smoke", "invariance": {"max_examples": 0}}
LIMITS = {"limits": {"entropy": {"min": 0.5}}}
VOID = {"meta", "link", "input", "br", "img", "hr"}


def length(response: str, gold: str | None) -> float:
    """A reward."""
    return len(response) / 20


def healthy_run(folder: Path) -> ProbeReport:
    prompts = folder / "prompts.jsonl"
    lines = [{"prompt": f"{HOSTILE} {n}+{n}=", "gold": str(2 * n)} for n in range(8)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = healthy.supervised("llama", folder / "healthy", 0)
    return run_probe(path, ProbeConfig.from_mapping(_small(4)), prompts=prompts)


def noisy_run(folder: Path) -> ProbeReport:
    """The same checkpoint at a learning rate that leaves few responses with weight, and with few of them."""
    config = _small(2) | {"first_order": {"lr": 0.05}}
    path = folder / "healthy"
    return run_probe(path, ProbeConfig.from_mapping(config), prompts=folder / "prompts.jsonl", name="noisy")


def collapsing_run(folder: Path) -> ProbeReport:
    """A policy that was trained to repeat one token, on responses of its own, given as ids; the gate sees it."""
    path = collapsed.policy(folder / "collapsing", lora=False, of="trained")
    model = load_checkpoint(path).model
    e, u = (
        models.sampled_rollouts(folder / f"{name}.jsonl", model, prompts=4, responses=4, seed=seed)
        for seed, name in enumerate("eu")
    )
    return run_probe(path, ProbeConfig.from_mapping(SMALL | LIMITS), e, u)


def _small(prompts: int) -> dict[str, Any]:
    return SMALL | {
        "generation": {"num_return_sequences": 4, "max_new_tokens": 12},
        "batch": {"num_prompts": prompts, "num_update_prompts": prompts, "reward": "pages:length"},
    }


def checkpoint(report: ProbeReport, step: int | None = 1, **changes: Any) -> Checkpoint:
    name = report.checkpoint.name
    made = Checkpoint(name, "run", step, report, details_of(report), explained(judged(report)))
    return replace(made, **changes)


UNLOADED = Checkpoint("<b>unloaded", "run", 4, None, trouble="ckpt/config.json: is missing; copy the whole folder")


class Page(HTMLParser):
    """Elements in their order, with attributes and text; `faults` are tags that are not closed as they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.faults += self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"/{tag} at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join("".join(data for tag, data in self.texts if tag not in ("script", "style")).split())

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]
