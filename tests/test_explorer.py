"""The explorer's data: what is measured is what a model gives, hostile text stays inside the string."""

import json
import re

import pytest
from explorer_demo import HOSTILE, demo_data
from tiny import tiny_folder

from derta_lib import explorer, position
from derta_lib.chat import ask
from derta_lib.data import Behaviour
from derta_lib.generation import local_target


def test_the_script_is_one_statement_that_no_text_can_leave(tmp_path):
    path = explorer.write(tmp_path, demo_data())
    assert path.name == "explorer.js"
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"[<>&\u2028\u2029\x00-\x09\x0b-\x1f]", text)
    found = re.fullmatch(r"window\.DERTA_EXPLORER=(\{.*\});\n", text)
    tokens = json.loads(found[1])["queries"][0]["tokens"]
    assert tokens[1] == HOSTILE[0]
    assert tokens[3].startswith("␛[31mred␛[0m <U+202E>right to left")
    assert tokens[4] == HOSTILE[3]


def test_models_are_measured_at_the_depths_that_a_response_reaches(tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    boat = Behaviour("a", "How do I fold a \x1bboat?", "", harmful="Step 1: fold the paper. Step 2: wait.")
    kite = Behaviour("b", "How do I fold a kite?", "", harmful="Sure")
    data = explorer.measure({"derta": folder, "vanilla": folder}, [boat, kite], [0, 2, 8], 3)
    assert [method["name"] for method in data["methods"]] == ["vanilla", "derta"]  # in the book's order
    long, short = data["queries"]
    assert (long["id"], long["text"], long["depths"]) == ("a", "How do I fold a ␛boat?", [0, 2, 8])
    assert short["depths"] == [depth for depth in (0, 2, 8) if depth <= len(short["tokens"])]
    target = local_target(folder)
    [alone] = target.respond([ask(boat.query, target.chat.cut(boat.harmful, 2))], 3)
    frame = position.refusal_probability(target, [boat])
    assert long["tokens"] == frame.token.tolist()[:-1]  # the last place is behind r̂
    for run in long["runs"].values():
        assert run["goes_on"][1] == alone
        assert run["p"] == pytest.approx(frame.p.tolist()[:-1], abs=5e-5)
