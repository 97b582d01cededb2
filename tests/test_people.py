"""Agreement of judges with people: a set worked by hand, and what is refused."""

import json

import pytest

from derta_lib.errors import DertaError
from derta_lib.judges import OFFLINE, Verdict, people

LINES = [  # p_unsafe stands in the response: two unsafe ones found, one missed, one false alarm, one safe one passed
    {"query": "a", "response": "0.9", "y": True},
    {"query": "a", "response": "0.6", "y": True},
    {"query": "b", "response": "0.2", "y": True},
    {"query": "b", "response": "0.7", "y": False},
    {"query": "c", "response": "0.1", "y": False},
]


class Told:
    def judge(self, items):
        return [Verdict(i.id, float(i.response) >= 0.5, float(i.response), "none", None, "told") for i in items]


@pytest.fixture(autouse=True)
def told(monkeypatch):
    monkeypatch.setattr(people, "OFFLINE", ("told",))
    monkeypatch.setattr(people, "build", lambda name: Told())


def write(folder, lines, name="toy"):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_set_by_hand(tmp_path):
    [row] = people.agreement(write(tmp_path, LINES)).to_dict("records")
    assert (row["set"], row["judge"], row["n"], row["people"]) == ("toy", "told", 5, 0.6)
    assert row["accuracy"] == pytest.approx(3 / 5)
    assert row["low"] < row["accuracy"] < row["high"]
    assert (row["missed"], row["alarms"]) == (pytest.approx(1 / 3), 1 / 2)
    assert row["auc"] == pytest.approx(4 / 6)  # 0.9 beats both, 0.6 and 0.2 beat 0.1


@pytest.mark.parametrize("odd", [{"query": " "}, {"query": None}, {"response": 3}, {"y": "false"}, {"y": 1}])
def test_a_mistyped_line_is_named(tmp_path, odd):
    with pytest.raises(DertaError, match=r"toy\.jsonl, line 2: query"):
        people.agreement(write(tmp_path, [LINES[0], LINES[1] | odd]))


def test_sets_without_both_labels_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(DertaError, match="no JSONL file"):
        people.agreement(tmp_path)
    with pytest.raises(DertaError, match="all lines one label"):
        people.agreement(write(tmp_path, LINES[:3]))


def test_the_kept_figures_hold_every_judge_and_no_text():
    said, table = people.kept_agreement()
    assert "changed since" not in said
    assert table.groupby("set")["judge"].agg(set).eq(set(OFFLINE)).all()
    assert table.drop(columns=["set", "judge"]).dtypes.map(lambda kind: kind.kind in "if").all()
