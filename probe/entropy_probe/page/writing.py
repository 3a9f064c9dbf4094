"""The file: one HTML page that holds its style, its script and its figures, and asks nothing of a network.

Whatever a user or a checkpoint named or said is escaped by the template (Jinja2, autoescape), and a content security
policy in the page lets no script run but its own and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from entropy_probe import __version__
from entropy_probe.atomic import write_atomically
from entropy_probe.errors import ConfigError
from entropy_probe.page.contents import BAD, OPEN, Checkpoint
from entropy_probe.page.conventions import TOKENS
from entropy_probe.page.figures import Figure, figures_by_step, figures_of
from entropy_probe.page.sentence import verdict, verdict_of_all
from entropy_probe.page.shown import MISSING, number, percent, with_se
from entropy_probe.report import ProbeReport

SUFFIXES = (".html", ".htm")
LARGEST = 2_800_000
"""Bytes of a page; from there on checkpoints are told in short, those that passed first."""
_HERE = Path(__file__).parent


def require_page(path: Path) -> None:
    """A `ConfigError` where no page could be written to `path`: another suffix, or no matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(path, "is not the name of a page", "end its name in .html")
    if find_spec("matplotlib") is None:
        problem = "the page's figures need matplotlib"
        raise ConfigError(path, problem, "pip install pytest-entropy-probe[plots]")


def write_page(path: Path, checkpoints: Sequence[Checkpoint], title: str = "") -> None:
    """Write the page of these checkpoints, in their order, atomically."""
    require_page(path)
    write_atomically(path, page_of(checkpoints, title))


def page_of(checkpoints: Sequence[Checkpoint], title: str = "") -> str:
    """The text of the page, whatever bytes a name holds. The same checkpoints give the same text."""
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    shown = _within_size(checkpoints)
    digest = hashlib.sha256(script.encode()).digest()
    text = (
        _environment()
        .get_template("page.html")
        .render(
            title=title or _title(checkpoints),
            style=style,
            script=script,
            policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
            f"script-src 'sha256-{base64.b64encode(digest).decode()}'",
            version=__version__,
            shown=shown,
            several=len(checkpoints) > 1,
            overall=verdict_of_all(checkpoints),
            marks=sorted({c.report.not_chosen for c in checkpoints if c.report is not None} - {""}),
            by_step=figures_by_step("by-step", checkpoints),
        )
    )
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class Shown:
    """A checkpoint as the template takes it. `in_short`: no figures and no tables of details."""

    place: int
    of: Checkpoint
    tone: str
    verdict: str
    figures: Sequence[Figure]
    in_short: bool = False

    @property
    def key(self) -> str:
        return f"checkpoint-{self.place}"


def _within_size(checkpoints: Sequence[Checkpoint]) -> list[Shown]:
    """All in full as long as they find room; what failed comes first."""
    said = [verdict(checkpoint) for checkpoint in checkpoints]
    order = sorted(range(len(said)), key=lambda place: said[place][0] == "good")
    left, found = LARGEST - 100_000, {}
    template = _environment().get_template("section.html").module
    for place in order:
        tone, sentence = said[place]
        of = checkpoints[place]
        whole = Shown(place, of, tone, sentence, figures_of(f"c{place}", of))
        size = len(template.section(whole).encode(errors="replace"))  # pyright: ignore[reportAttributeAccessIssue]
        if size > left:
            whole = Shown(place, of, tone, sentence, (), in_short=True)
            size = len(template.section(whole).encode(errors="replace"))  # pyright: ignore[reportAttributeAccessIssue]
        left -= size
        found[place] = whole
    return [found[place] for place in range(len(checkpoints))]


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "with_se": with_se, "percent": percent}
    environment.filters["prose"] = _prose
    environment.globals |= {
        "figures_block": figures_block,
        "flat": _flat,
        "notes": _notes,
        "sort_key": _sort_key,
        "margin_key": _margin_key,
        "counted": _counted,
        "tokens": TOKENS,
        "missing": MISSING,
        "left_out": {"warnings", "device_map"},
    }
    return environment


def _title(checkpoints: Sequence[Checkpoint]) -> str:
    if len(checkpoints) == 1:
        return checkpoints[0].name
    return f"{len(checkpoints)} checkpoints"


def figures_block(report: ProbeReport) -> list[tuple[str, str, str]]:
    """(what, figure, unit) of the first screen, per token first."""
    step, update, h = report.next_step, report.update, report.entropy.per_token
    mark = f", {report.not_chosen}" if report.not_chosen else ""
    entropy = ("H, entropy of the policy", with_se(h.value, h.se), f"nats/token{mark}")
    if step is None or update is None:
        return [entropy]
    value, se = step.realised_per_token
    predicted = with_se(step.predicted_per_token, step.predicted_per_token_se, signed=True)
    share = percent(value / h.value, signed=True) if h.value else MISSING
    return [
        ("ΔH by the next step, realised", with_se(value, se, signed=True), f"nats/token{mark}"),
        ("the same, predicted", predicted, f"nats/token{mark}"),
        ("share of the entropy", share, f"ΔH/H{mark}"),
        entropy,
        ("effective sample size", f"{step.unclipped_ess_fraction:.2f}", "ESS/N"),
        ("decided before this batch", percent(update.momentum_share), "momentum and decay"),
        ("step size", number(update.lr), "lr"),
    ]


def _notes(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.report is not None:
        yield from checkpoint.report.doubts
        yield from (f"warning: {text}" for text in checkpoint.report.checkpoint.warnings)
    yield from checkpoint.notes


def _counted(checkpoint: Checkpoint) -> str:
    """How the verdicts ended, in as few words as tell."""
    ended = [one.status for one in checkpoint.judged]
    bad, open_ = sum(s in BAD for s in ended), sum(s in OPEN for s in ended)
    passed = ended.count("pass")
    said = [f"{bad} failed"] * (bad > 0) + [f"{open_} open"] * (open_ > 0)
    return ", ".join([*said, f"{passed} passed"]) if ended else "not judged"


def _prose(text: str) -> Markup:
    """Text whose names in backticks are set as code; everything in it is escaped."""
    escaped = str(escape(text))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped))  # noqa: S704 (escaped above)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as JSON) of a nested table."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{before}{key}", shown


def _sort_key(value: Any) -> str:
    """What a cell is sorted by: a number, or nothing."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return repr(float(value)) if is_number else ""


def _margin_key(margin: str) -> str:
    found = re.fullmatch(r">?([\d.]+)x", margin)
    return found[1] if found else {"exact": "1e9"}.get(margin, "")
