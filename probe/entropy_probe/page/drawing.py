"""A matplotlib figure as inline SVG: text as text, the page's own colours in light and dark, a title and a description.

The same figure gives the same text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which stays apart for colour-blind readers; the page's style sheet has a dark twin of each.
PREDICTED, REALISED, ENTROPY, MOMENTUM = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
INK, FAINT = "#010101", "#8a8f98"
_COLOURS = {
    INK: "currentColor",
    FAINT: "var(--faint)",
    PREDICTED: "var(--predicted)",
    REALISED: "var(--realised)",
    ENTROPY: "var(--entropy)",
    MOMENTUM: "var(--momentum)",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "entropy-probe",
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "text.parse_math": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
WIDTH = 4.6
"""Inches; drawn at about its own size on a telephone, and in a column of a wide screen."""


def inline_svg(
    key: str, title: str, description: str, draw: Callable[[Axes], None], height: float = 2.9
) -> str:
    """The SVG element; `key` is unique on the page and begins each of its ids.

    The margins are fixed, which halves the time that matplotlib's own layout takes; `draw` may move them.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(WIDTH, height))
        figure.subplots_adjust(left=0.17, right=0.97, bottom=0.5 / height, top=1 - 0.22 / height)
        figure.patch.set_alpha(0.0)
        axes = figure.subplots()
        axes.patch.set_alpha(0.0)
        draw(axes)
        stream = StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return _inlined(stream.getvalue(), key, title, description)


def _inlined(text: str, key: str, title: str, description: str) -> str:
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"""(?:url\(#|href="#)([^")]+)""", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", svg)
    svg = svg.replace("xlink:href", "href")
    for colour, of_page in _COLOURS.items():
        svg = re.sub(re.escape(colour), of_page, svg, flags=re.IGNORECASE)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # as of matplotlib 3.9
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"<[^>]*>", _short_numbers, svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    (box,) = re.findall(r'viewBox="([^"]+)"', svg[: svg.index(">")])
    names = f"{key}-title {key}-description"
    head = (
        f'<svg role="img" aria-labelledby="{names}" viewBox="{box}">'
        f'<title id="{key}-title">{html.escape(title)}</title>'
        f'<desc id="{key}-description">{html.escape(description)}</desc>'
    )
    return head + svg[svg.index(">") + 1 :].strip()


def _short_numbers(tag: re.Match[str]) -> str:
    """Two decimals of a point are enough for the eye, and take half the room."""
    return re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), tag[0])
