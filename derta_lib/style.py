"""The book's visual language: how each method looks, the page's drawing style, labels beside the data, SVG.

Figures carry a white backing of their own, so that they look the same in a light and a dark page, and are narrow
enough to be read on a phone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.optimize import isotonic_regression

from derta_lib import paper
from derta_lib.errors import DertaError, check_known

INK, FAINT = "#1b1b1b", "#d9d9d9"
WIDTH = 4.9  # inches: seven tenths of its size on a 375-pixel screen
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a8a8a",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#ececec",
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",  # an <img> has no page fonts; outlines look the same everywhere
    "svg.hashsalt": "derta",
}


@dataclass(frozen=True)
class Method:
    """How a training method looks everywhere: its name in words, its colour and its marker."""

    label: str
    colour: str
    marker: str


# Chosen so that every pair stays apart (CIE76 distance above 20) for the three kinds of colour blindness, at a contrast
# of at least 3 : 1 with white; the marker says the same once more.
METHODS = {
    "official": Method("as published", "#221111", "P"),
    "base": Method("untuned", "#5c4b65", "X"),
    "vanilla": Method("vanilla", "#963a00", "s"),
    "vanilla_half": Method("vanilla, half the data", "#8400fc", ">"),
    "harmful_prefix": Method("harmful prefix", "#e96b1f", "^"),
    "rto": Method("RTO only", "#368bff", "v"),
    "derta": Method("DeRTa", "#030383", "o"),
    "dpo": Method("DPO", "#31744f", "<"),
    "recaug": Method("RecAug", "#b573b4", "D"),
}


def svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same data: no date, fixed ids; its text alternative is the title."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Title": figure.get_label()})
    return out.getvalue()


def book_figure(*needs: str) -> Callable:
    """Check that the frame has rows and the columns `needs`, and draw in the book's style."""

    def decorate(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        @wraps(draw)
        def drawn(frame: pd.DataFrame, *words: str) -> Figure:
            if missing := [name for name in needs if name not in frame]:
                raise DertaError(
                    f"{draw.__name__}: the frame lacks the column '{missing[0]}'; it needs {', '.join(needs)}."
                )
            if frame.empty:
                raise DertaError(f"{draw.__name__}: the frame is empty, so there is nothing to draw.")
            with matplotlib.rc_context(STYLE):
                return draw(frame, *words)

        return drawn

    return decorate


def canvas(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def percent_axis(axis: matplotlib.axis.Axis) -> None:
    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


ATTACKS = {name.lower(): name for name in paper.ATTACKS}


def in_words(name: object) -> str:
    """A method's or an attack's name as the prose writes it; anything else as it is."""
    return METHODS[str(name)].label if name in METHODS else (ATTACKS | paper.WORDS).get(str(name), str(name))


def methods_in(frame: pd.DataFrame) -> list[str]:
    """Methods of the frame in the fixed order of the book."""
    present = set(frame["method"])
    for name in sorted(present):
        check_known("method", name, METHODS)  # two methods must never share a colour
    return [name for name in METHODS if name in present]


def text_colour(name: str) -> tuple[float, ...]:
    """The method's colour darkened towards the ink, so that small text has a contrast of 4.5 : 1 and more."""
    colour, ink = (np.array(matplotlib.colors.to_rgb(value)) for value in (METHODS[name].colour, INK))
    return tuple(0.6 * colour + 0.4 * ink)


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart within low..high, in the same order and as near to where they were as can be.

    Least squares under the gaps is isotonic regression once the gaps are subtracted; clipping keeps the order.
    """
    order = np.argsort(positions, kind="stable")
    steps = gap * np.arange(len(order))
    fitted = isotonic_regression(np.asarray(positions, dtype=float)[order] - steps).x
    result = np.empty(len(order))
    result[order] = np.clip(fitted, low, max(low, high - (len(order) - 1) * gap)) + steps
    return [float(value) for value in result]


def leader(colour: str, right: bool = True) -> dict[str, Any]:
    """A thin line from a point to the near end of its label, which stands right of it or left."""
    return {"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 0, "relpos": (0 if right else 1, 0.5)}


def readable_on(colour: Sequence[float]) -> str:
    """Black or white, whichever has the higher contrast with a colour (WCAG 2; at least 4.5 : 1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "white"


def end_labels(axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Write each (text, method, x, y) in the right margin, moved apart where texts would meet, with a line to it."""
    low, high = axes.get_ylim()
    levels = spread([y for *_, y in ends], 0.07 * (high - low) * 250 / (axes.get_window_extent().height), low, high)
    for (text, method, x, y), level in zip(ends, levels, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(1.03, level),
            textcoords=("axes fraction", "data"),
            va="center",
            color=text_colour(method),
            weight="bold",
            annotation_clip=False,
            arrowprops=leader(METHODS[method].colour) | {"ls": ":", "shrinkB": 0},
        )


def row_axes(axes: Axes, count: int, limits: tuple[float, float]) -> None:
    axes.set(ylim=(count - 0.4, -0.6), xlim=limits)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    percent_axis(axes.xaxis)
