"""Figures: the palette under colour blindness, alternatives against hand-worked numbers, labels that keep apart."""

import html
import itertools
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from derta_lib import figures, style, supervision
from derta_lib.errors import DertaError
from derta_lib.experiment import DPO
from derta_lib.runs import open_run

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast_with_white(colour: str) -> float:
    return 1.05 / (linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05)


@pytest.mark.parametrize("vision", VISION)
def test_methods_stay_apart_for_every_kind_of_colour_vision(vision):
    seen = {name: lab(np.array(VISION[vision]) @ linear(look.colour)) for name, look in style.METHODS.items()}
    distances = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in itertools.combinations(seen, 2)}
    assert min(distances.values()) > 20, min(distances, key=distances.get)


def test_every_method_that_can_be_trained_has_a_look():
    """Else a notebook would stop at its first figure, once all is trained."""
    assert {*supervision.METHODS, DPO, "base"} <= style.METHODS.keys()


def test_writing_in_the_heat_map_has_a_contrast_of_4_5_at_every_rate():
    for shade in np.linspace(0, 1, 256):
        colour = (shade, 0.6 * shade, 0.3 * shade)
        lum = linear("#" + "".join(f"{round(c * 255):02x}" for c in colour)) @ [0.2126, 0.7152, 0.0722] + 0.05
        ink = style.readable_on(colour)
        assert {"black": lum / 0.05, "white": 1.05 / lum}[ink] >= 4.5


def test_a_heat_map_names_n_where_it_is_not_the_usual_one():
    frame = pd.DataFrame(
        [("vanilla", "direct", 0.5, 0.4, 0.6, 16), ("derta", "direct", 0, 0, 0.2, 16), ("derta", "pair", 0, 0, 0.7, 2)],
        columns=["method", "attack", "value", "low", "high", "n"],
    )
    said = [found.get_text() for found in figures.attack_heatmap(frame).findobj(Text)]
    assert [text for text in said if "n = " in text and "%" not in text] == ["n = 2"]
    assert "attack success, %; 95 % intervals; n = 16 unless given" in said


def test_figures_say_what_their_bars_are_and_the_n_that_all_rows_share():
    rows = [("direct", "vanilla", 0.5, 0.4, 0.6, 1200), ("direct", "derta", 0.1, 0.0, 0.2, 1200)]
    frame = pd.DataFrame(rows, columns=["attack", "method", "value", "low", "high", "n"])
    assert figures.rates(frame, "success").axes[0].get_xlabel() == "success\n95 % intervals, n = 1,200"
    frame.loc[1, "n"] = 7
    drawn = figures.rates(frame, "success")
    assert drawn.axes[0].get_xlabel() == "success\n95 % intervals"
    assert "DeRTa 10 %, n = 7" in [found.get_text() for found in drawn.findobj(Text)]


def test_methods_differ_in_marker_and_contrast_with_the_backing():
    looks = style.METHODS.values()
    assert len({look.marker for look in looks}) == len(looks)
    assert min(contrast_with_white(look.colour) for look in looks) >= 3
    texts = ["#" + "".join(f"{round(c * 255):02x}" for c in style.text_colour(name)) for name in style.METHODS]
    assert min(contrast_with_white(text) for text in texts) >= 4.5


POSITIONS = pd.DataFrame(
    [("vanilla", 1, 0.75), ("vanilla", 20, 0.97), ("derta", 1, 0.39), ("derta", 10, 0.57), ("derta", 100, 0.83)],
    columns=["method", "position", "share"],
)
PROBABILITIES = pd.DataFrame(
    [
        ("derta", 0, 0.9, 0.8, 1.0),
        ("derta", 1, 0.7, 0.6, 0.8),
        ("vanilla", 0, 1.0, 1.0, 1.0),
        ("vanilla", 1, 0.0, 0.0, 0.1),
    ],
    columns=["method", "position", "mean", "low", "high"],
)
RATES = pd.DataFrame(
    [
        ("direct", "vanilla", 0.05, 0.01, 0.2, 20),
        ("direct", "derta", 0.0, 0.0, 0.16, 20),
        ("pair", "derta", 0.1, 0.03, 0.3, 20),
    ],
    columns=["attack", "method", "value", "low", "high", "n"],
)
POINTS = pd.DataFrame(
    [("vanilla", "vanilla", 0.02, 0.0, 0.1, 0.9, 0.8, 0.95), ("keep 15 %", "derta", 0.05, 0.0, 0.1, 0.04, 0.0, 0.1)],
    columns=["label", "method", "benign", "benign_low", "benign_high", "asr", "asr_low", "asr_high"],
)
PAPER = pd.DataFrame(
    [("8B", "vanilla", "PAIR", 0.82, 0.8, 0.7, 0.9), ("8B", "derta", "PAIR", 0.24, 0.4, 0.3, 0.5)],
    columns=["group", "method", "attack", "paper", "value", "low", "high"],
)
TRAINING = pd.DataFrame(
    [("derta", "MLE", 1, 2.5), ("derta", "MLE", 9, 0.5), ("derta", "RTO", 1, 4.0), ("derta", "RTO", 9, 0.25)],
    columns=["method", "term", "step", "loss"],
)
FIGURES = {
    "position_curve": (POSITIONS, ["Curves of the share of safe responses whose",
                                   "vanilla: 75 % by token 1, 75 % by token 10, 97 % by token 20",
                                   "DeRTa: 39 % by token 1, 57 % by token 10, 57 % by token 50, 83 % by token 100"]),
    "refusal_by_position": (PROBABILITIES, ["DeRTa: 90 % before token 1, 80 % on average, 70 % after 1 tokens"]),
    "attack_heatmap": (RATES, ["vanilla: direct 5 % (1 to 20, n = 20)", "n = 20), PAIR 10 % (3 to 30, n = 20)"]),
    "rates": (RATES, ["95 % intervals: attack success, by attack",
                      "direct: vanilla 5 % (1 to 20, n = 20), DeRTa 0 % (0 to 16, n = 20)"]),
    "trade_off": (POINTS, ["keep 15 %: 4 % attack success, 5 % of benign twins refused"]),
    "compare_to_paper": (PAPER, ["mean absolute difference is 9.0 points",
                                 "largest is 16.0 points (8B, DeRTa, PAIR)"]),
    "training_curves": (TRAINING, ["DeRTa, MLE: 2.50 at step 1, 0.50 at step 9", "DeRTa, RTO: 4.00 at step 1"]),
}  # fmt: skip
SAID = {"rates": ["attack success"], "position_curve": ["safe responses"]}  # what a figure is told beside its frame


@pytest.mark.parametrize("name", FIGURES)
def test_text_alternative_says_the_data_and_the_svg_is_deterministic(name, tmp_path):
    frame, phrases = FIGURES[name]
    said = SAID.get(name, [])
    draw = getattr(figures, name)
    alternative = draw(frame, *said).get_label()
    for phrase in phrases:
        assert phrase in alternative
    texts = []
    for attempt in ("a", "b"):
        figure = draw(frame, *said)
        assert figure.get_label() == alternative
        run = open_run("test", str(tmp_path / attempt), {})
        assert html.escape(alternative) in run.figure(name, figure, frame).markup
        texts.append((tmp_path / attempt / "figures" / f"{name}.svg").read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert float(ET.fromstring(texts[0]).get("width").removesuffix("pt")) < 375, "too wide for a phone"
    assert len(texts[0]) < 150_000


@pytest.mark.parametrize("name", FIGURES)
def test_a_missing_column_or_an_empty_frame_is_a_sentence(name):
    frame, draw = FIGURES[name][0], getattr(figures, name)
    column = "share" if name == "position_curve" else frame.columns[-1] if name != "rates" else "high"
    with pytest.raises(DertaError, match=f"{name}: the frame lacks the column '{column}'"):
        draw(frame.drop(columns=column))
    with pytest.raises(DertaError, match="empty"):
        draw(frame.iloc[:0])


def test_an_unknown_method_never_gets_somebody_elses_colour():
    with pytest.raises(DertaError, match="'simpo' is not known"):
        figures.position_curve(POSITIONS.replace("derta", "simpo"), "responses")


def test_labels_keep_their_gap_order_and_limits_and_move_as_little_as_can_be():
    values, gap = [0.5, 0.1, 0.52, 0.95], 0.1
    moved = style.spread(values, gap, 0.0, 1.0)
    order = np.argsort(values)
    assert (np.diff(np.array(moved)[order]) >= gap - 1e-9).all()
    assert min(moved) >= 0
    assert max(moved) <= 1
    grid = np.arange(0, 1.0001, 0.01)
    best = min(
        sum((a - b) ** 2 for a, b in zip(point, sorted(values), strict=True))
        for point in itertools.product(grid[5:16], grid[40:56], grid[50:66], grid[90:])
        if all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(point))
    )
    assert sum((a - b) ** 2 for a, b in zip(moved, values, strict=True)) == pytest.approx(best, abs=1e-3)


def test_crowded_labels_do_not_cover_one_another():
    points = [(f"recipe {i}", "derta", 0.02 * i, 0.01 * i) for i in range(6)]
    frame = pd.DataFrame(
        [(t, m, x, max(0, x - 0.02), x + 0.02, y, max(0, y - 0.02), y + 0.02) for t, m, x, y in points],
        columns=POINTS.columns,
    )
    figure = figures.trade_off(frame)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(label) for label in figure.axes[0].texts]  # without the lines
    assert len(boxes) == len(points)
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_a_curve_of_one_item_is_drawn_without_a_band():
    rows = [("derta", position, 0.5, None, None) for position in (0, 1)]
    figure = figures.refusal_by_position(pd.DataFrame(rows, columns=["method", "position", "mean", "low", "high"]))
    (band,) = figure.axes[0].collections
    assert all(len(path.vertices) == 0 for path in band.get_paths())
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0.5, 0.5]
