"""The book's figures, and for each a text alternative computed from the same data.

Every function takes a pandas frame (columns in its docstring) and returns a matplotlib Figure whose label is its
text alternative: `figure.get_label()`. Rates are shares from 0 to 1; `low` and `high` bound the 95 % interval.
`Run.figure` puts figure and alternative into a page.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from derta_lib.style import (
    FAINT,
    INK,
    METHODS,
    book_figure,
    canvas,
    end_labels,
    in_words,
    leader,
    methods_in,
    percent_axis,
    readable_on,
    row_axes,
    spread,
    text_colour,
)


def _show(value: float) -> str:
    return f"{value * 100:.0f} %"


def _interval(row: pd.Series) -> str:
    text = f"{_show(row['value'])} ({row['low'] * 100:.0f} to {row['high'] * 100:.0f}"
    return text + (f", n = {row['n']:.0f})" if "n" in row and pd.notna(row["n"]) else ")")


def _about(frame: pd.DataFrame) -> str:
    """What bars and bands are, and n where all rows have the same."""
    counts = set(frame["n"].dropna()) if "n" in frame else set()
    return "95 % intervals" + (f", n = {min(counts):,.0f}" if len(counts) == 1 else "")


def _curves(axes: Axes, frame: pd.DataFrame, column: str, steps_to: float | None = None) -> None:
    """A named line a method by position, with its band where there is one; steps that go on to `steps_to` if given."""
    ends = []
    stepped = steps_to is not None
    for name in methods_in(frame):
        rows, colour = frame[frame["method"] == name].sort_values("position"), METHODS[name].colour
        if stepped:
            rows = pd.concat([rows, rows.tail(1).assign(position=steps_to)])
        axes.plot(rows["position"], rows[column], color=colour, lw=2, drawstyle="steps-post" if stepped else "default")
        if {"low", "high"} <= set(rows):
            # a single item has no interval (None): no band there
            band = rows["position"], rows["low"].astype(float), rows["high"].astype(float)
            axes.fill_between(*band, step="post" if stepped else None, color=colour, alpha=0.16, lw=0)
        ends.append((METHODS[name].label, name, float(rows["position"].iloc[-1]), float(rows[column].iloc[-1])))
    end_labels(axes, ends)


def _each_method(frame: pd.DataFrame, say: Callable[[pd.DataFrame], str]) -> str:
    """What `say` says of each method's rows, in the book's order."""
    return "; ".join(f"{METHODS[name].label}: {say(frame[frame['method'] == name])}" for name in methods_in(frame))


@book_figure("method", "position", "share")
def position_curve(frame: pd.DataFrame, of: str) -> Figure:
    """Where the first refusal starts (Figure 4): one step curve a method on a logarithmic token axis.

    Columns: method, position (token of the response, from 1), share (cumulative, 0 to 1); low, high and n if known.
    `of` names what the share is of.
    """
    figure, (axes,) = canvas(3.4)
    last = float(frame["position"].max())
    bands = f"\nbands: {_about(frame)}" if "low" in frame else ""
    axes.set(xscale="log", xlim=(1, max(last, 2)), ylim=(0, 1.02), xlabel=f"token of the response (log scale){bands}")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= last]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    percent_axis(axes.yaxis)
    axes.set_title(f"{of.capitalize()} that have begun to refuse by this token")
    _curves(axes, frame, "share", last)

    def say(rows: pd.DataFrame) -> str:
        marks = sorted({min(mark, rows["position"].max()) for mark in (1, 10, 50, last)})
        shares = rows.set_index("position")["share"].sort_index().asof(marks).fillna(0)
        return ", ".join(f"{_show(share)} by token {mark:.0f}" for mark, share in shares.items())

    said = _each_method(frame, say)
    figure.set_label(f"Curves of the share of {of} whose first refusal has begun by each token position. {said}.")
    return figure


@book_figure("method", "position", "mean", "low", "high")
def refusal_by_position(frame: pd.DataFrame) -> Figure:
    """P(refusal token | q, r̂_{<t}) by t, mean over held-out harmful responses with its interval.

    Columns: method, position (t − 1, the tokens of r̂ that stand before, from 0), mean, low, high (0 to 1); n if
    known.
    """
    figure, (axes,) = canvas(3.4)
    axes.set(xlim=(0, max(float(frame["position"].max()), 1)), ylim=(-0.02, 1.02))
    axes.set_xlabel(f"tokens of the harmful response already written (t − 1)\nbands: {_about(frame)}")
    percent_axis(axes.yaxis)
    axes.set_title("Probability of the refusal token, the first of “Sorry”")
    _curves(axes, frame, "mean")

    def say(rows: pd.DataFrame) -> str:
        means = rows.set_index("position")["mean"].sort_index()
        return (
            f"{_show(means.iloc[0])} before token {means.index[0] + 1:.0f}, {_show(means.mean())} on average, "
            f"{_show(means.iloc[-1])} after {means.index[-1]:.0f} tokens"
        )

    figure.set_label(
        "Curves of the mean probability of the refusal token, the first of “Sorry”, by how much of a harmful response "
        f"stands before it. {_each_method(frame, say)}."
    )
    return figure


@book_figure("method", "attack", "value", "low", "high", "n")
def attack_heatmap(frame: pd.DataFrame) -> Figure:
    """Attack success by attack (rows) and method (columns), the rate and its interval written in each cell, and n where
    it is not that of most cells, which stands below.

    Columns: method, attack, value, low, high (0 to 1), n. A combination without a row stays blank and is marked so.
    """
    methods, attacks = methods_in(frame), list(dict.fromkeys(frame["attack"]))
    numbers = ["value", "low", "high", "n"]
    cells = frame.drop_duplicates(["method", "attack"]).pivot(index="attack", columns="method", values=numbers)
    grid, *about = (cells[key].reindex(index=attacks, columns=methods).to_numpy(float) for key in numbers)
    figure, (axes,) = canvas(1.3 + 0.5 * len(attacks))
    colours = LinearSegmentedColormap.from_list("asr", ["#f4f4f4", "#e3a37c", "#7a2c00"])
    usual = frame["n"].mode().iloc[0]
    for column, row in np.ndindex(grid.T.shape):
        if np.isnan(value := grid[row, column]):
            axes.text(column, row, "not run", ha="center", va="center", size=8, color="#5f5f5f")
            continue
        ink = readable_on(colours(value))
        low, high, n = (each[row, column] for each in about)
        lines = [f"{low * 100:.0f} to {high * 100:.0f}", *([] if n == usual else [f"n = {n:.0f}"])]
        top = row - 0.04 - 0.12 * len(lines)
        axes.text(column, top, f"{value * 100:.0f}", ha="center", va="center", color=ink, weight="bold")
        for place, said in enumerate(lines, start=1):
            axes.text(column, top + 0.08 + 0.25 * place, said, ha="center", va="center", color=ink, size=8)
    axes.imshow(np.ma.masked_invalid(grid), cmap=colours, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(methods)), [METHODS[name].label.replace(" ", "\n") for name in methods])
    axes.set_yticks(range(len(attacks)), [in_words(attack) for attack in attacks])
    axes.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
    axes.tick_params(axis="x", labelsize=8.5)
    unless = " unless given" if frame["n"].nunique() > 1 else ""
    axes.set_xlabel(f"attack success, %; 95 % intervals; n = {usual:,.0f}{unless}", size=9)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(methods) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(attacks) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=2)
    axes.tick_params(which="minor", length=0, top=False)

    def say(rows: pd.DataFrame) -> str:
        return ", ".join(f"{in_words(row['attack'])} {_interval(row)}" for _, row in rows.iterrows())

    said = _each_method(frame, say)
    figure.set_label(f"Table of attack success with 95 % intervals, darker for more success. {said}.")
    return figure


@book_figure("label", "method", "benign", "benign_low", "benign_high", "asr", "asr_low", "asr_high")
def trade_off(frame: pd.DataFrame) -> Figure:
    """Safety against over-refusal: a point a recipe with an interval in both directions.

    Columns: label (the recipe in words), method (its colour), benign, benign_low, benign_high (refusals of benign
    twins), asr, asr_low, asr_high (attack success); all rates from 0 to 1; n (of both) if known.
    """
    figure, (axes,) = canvas(4.2)
    methods_in(frame)
    for _, row in frame.iterrows():
        style = METHODS[row["method"]]
        axes.plot([row["benign_low"], row["benign_high"]], [row["asr"]] * 2, color=style.colour, lw=1.1)
        axes.plot([row["benign"]] * 2, [row["asr_low"], row["asr_high"]], color=style.colour, lw=1.1)
        axes.plot(row["benign"], row["asr"], style.marker, color=style.colour, ms=8, mec="white", mew=0.6)
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), ylabel="attack success")
    axes.set_xlabel(f"benign twins refused\nlines: {_about(frame)}")
    axes.set_title("Lower left is better")
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    # beside its own point, at a height of its own: points without successes share theirs
    for (_, row), level in zip(frame.iterrows(), spread(frame["asr"] + 0.05, 0.07, 0.05, 1.0), strict=True):
        right = row["benign"] < 0.8
        axes.annotate(
            row["label"],
            (row["benign"], row["asr"]),
            xytext=(row["benign"] + (0.02 if right else -0.02), level),
            ha="left" if right else "right",
            va="center",
            color=text_colour(row["method"]),
            weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},  # over the lines of other points
            arrowprops=leader(METHODS[row["method"]].colour, right),
        )
    said = "; ".join(
        f"{row['label']}: {_show(row['asr'])} attack success, {_show(row['benign'])} of benign twins refused"
        for _, row in frame.iterrows()
    )
    figure.set_label(f"Points of attack success against refusal of benign twins, lower left is better. {said}.")
    return figure


@book_figure("attack", "method", "value", "low", "high")
def rates(frame: pd.DataFrame, what: str) -> Figure:
    """A rate by attack and method (Table 4, Figure 5): points with intervals, grouped by attack.

    Columns: attack (or whatever groups the rows), method, value, low, high (0 to 1); n if known. `what` names the rate.
    """
    methods_in(frame)
    rows: list[tuple[str, pd.Series | None]] = []
    parts = []
    for attack, group in frame.set_index("method").groupby("attack", sort=False):
        found = [(name, group.loc[name]) for name in METHODS if name in group.index]
        rows += [(attack, None), *found]
        said = ", ".join(f"{METHODS[name].label} {_interval(row)}" for name, row in found)
        parts.append(f"{in_words(attack)}: {said}")
    own_n = "n" in frame and frame["n"].nunique() > 1
    figure, (axes,) = canvas(1.05 + 0.21 * len(rows))
    for level, (name, row) in enumerate(rows):
        if row is None:
            axes.text(-0.02, level, in_words(name), weight="bold", va="center")
            axes.axhline(level - 0.5, color=FAINT, lw=0.8)
            continue
        axes.plot([row["low"], row["high"]], [level, level], color=METHODS[name].colour, lw=1.6)
        axes.plot(row["value"], level, METHODS[name].marker, color=METHODS[name].colour, ms=7, mec="white", mew=0.6)
        left = row["high"] > 0.7
        n = f", n = {row['n']:,.0f}" if own_n else ""
        axes.annotate(
            f"{METHODS[name].label} {_show(row['value'])}{n}",
            (row["low"] if left else row["high"], level),
            xytext=(-7 if left else 7, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            size=9,
            color=text_colour(name),
        )
    row_axes(axes, len(rows), (-0.03, 1.03))
    axes.set_xlabel(f"{what}\n{_about(frame)}")
    figure.set_label(f"Points with 95 % intervals: {what}, by attack. {'; '.join(parts)}.")
    return figure


@book_figure("group", "method", "attack", "paper", "value", "low", "high")
def compare_to_paper(frame: pd.DataFrame) -> Figure:
    """The paper's value (open ring) beside ours (filled, with interval), a row a cell of the paper's tables.

    Columns: group (the model), method, attack, paper, value, low, high (all 0 to 1); n if known.
    """
    rows: list[tuple[str, pd.Series | None]] = []
    for group, part in frame.groupby("group", sort=False):
        for name in methods_in(part):
            rows.append((f"{group}, {METHODS[name].label}", None))
            rows += [(row["attack"], row) for _, row in part[part["method"] == name].iterrows()]
    figure, (axes,) = canvas(0.8 + 0.2 * len(rows))
    for level, (text, row) in enumerate(rows):
        if row is None:
            axes.text(-0.50, level, text, weight="bold", va="center")
            axes.axhline(level - 0.5, color=FAINT, lw=0.8)
            continue
        style = METHODS[row["method"]]
        axes.text(-0.48, level, text, va="center", size=9)
        axes.plot([row["low"], row["high"]], [level, level], color=style.colour, lw=2)
        axes.plot(row["value"], level, style.marker, color=style.colour, ms=7, mec="white", mew=0.6)
        axes.plot(row["paper"], level, "o", mfc="none", mec=INK, ms=10, mew=1.2)
        if "n" in row:
            axes.text(1.06, level, f"n = {row['n']:,.0f}", va="center", size=8.5)
    row_axes(axes, len(rows), (-0.52, 1.25 if "n" in frame else 1.03))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("attack success: ring = paper, filled = ours, 95 % intervals")
    gap = (frame["value"] - frame["paper"]).abs()
    worst = frame.loc[gap.idxmax()]
    where = f"{worst['group']}, {METHODS[worst['method']].label}, {worst['attack']}"
    figure.set_label(
        f"Attack success as the paper reports it and as found here, for {len(frame)} combinations. The mean absolute "
        f"difference is {gap.mean() * 100:.1f} points; the largest is {gap.max() * 100:.1f} points ({where})."
    )
    return figure


@book_figure("method", "term", "step", "loss")
def training_curves(frame: pd.DataFrame) -> Figure:
    """Loss by step, one panel a term, one line a method.

    Columns: method, term ("MLE", "RTO", ...), step, loss (nats a supervised token).
    """
    terms = list(dict.fromkeys(frame["term"]))
    figure, panels = canvas(0.5 + 2.1 * len(terms), len(terms))
    for axes, term in zip(panels, terms, strict=True):
        part = frame[frame["term"] == term].rename(columns={"step": "position"})
        axes.set(title=f"{term} (nats a token)", ylim=(0, 1.05 * part["loss"].max()))
        axes.set_xlim(frame["step"].min(), frame["step"].max())
        _curves(axes, part, "loss")
    panels[-1].set_xlabel("optimiser step")
    parts = []
    for term, part in frame.groupby("term", sort=False):
        for name in methods_in(part):
            rows = part[part["method"] == name].sort_values("step")
            first, last = rows.iloc[0], rows.iloc[-1]
            parts.append(
                f"{METHODS[name].label}, {term}: {first['loss']:.2f} at step {first['step']:.0f}, "
                f"{last['loss']:.2f} at step {last['step']:.0f}"
            )
    figure.set_label(f"Training loss by step, a panel a term of the loss. {'; '.join(parts)}.")
    return figure
