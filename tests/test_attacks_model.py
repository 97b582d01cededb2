"""Every attack against a real (tiny, random) model in a folder, as `derta attack` runs them."""

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import tiny_folder
from transformers import LlamaForCausalLM

from derta_lib import attacks
from derta_lib.attacks.run import attack_command
from derta_lib.behaviours import PAPER
from derta_lib.chat import ask
from derta_lib.corpus import concord
from derta_lib.errors import DertaError, UsageError
from derta_lib.generation import LocalTarget, local_target
from derta_lib.judges import Verdict
from derta_lib.position import position_command
from derta_lib.records import write_jsonl

NAMES = ["direct", "prefilling-4", "completingattack", "selfcipher", "codeattack", "jailbreakchat", "pair", "autodan"]
BUDGETS = {"k": 3, "streams": 2, "iterations": 2, "attempts": 2, "attacker_tokens": 12, "population": 6, "steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tiny_folder(tmp_path_factory.mktemp("tiny"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only get in each other's way on so small a model
    yield path
    torch.set_num_threads(threads)


@pytest.fixture
def behaviours(tmp_path):
    rows = [asdict(behaviour) for behaviour in concord(0).behaviours["test"][:2]]
    return str(write_jsonl(tmp_path / "behaviours.jsonl", rows))


def test_every_attack_runs_and_a_second_run_asks_nothing(folder, behaviours, tmp_path, monkeypatch):
    path = attack_command(folder, NAMES, behaviours, tmp_path / "a", attacker=folder, max_new_tokens=6, **BUDGETS)
    data = path.read_bytes()
    records = [json.loads(line) for line in data.splitlines()]
    assert [record["attack"] for record in records] == [name for name in NAMES for _ in range(2)]
    assert [record["benign"] for record in records[:2]] == [False, True]
    by_name = {record["attack"]: record for record in records}
    assert by_name["pair"]["details"]["streams"] == 2
    assert by_name["autodan"]["details"]["population"] == 6
    assert by_name["autodan"]["details"]["fitness"][0] < 0
    prefill = by_name["prefilling-4"]["prefill"]
    assert len(local_target(folder).chat.response_ids(prefill)) == 4

    def fail(*_):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr("derta_lib.generation.LocalTarget.respond", fail)
    again = attack_command(folder, NAMES, behaviours, tmp_path / "a", attacker=folder, max_new_tokens=6, **BUDGETS)
    assert again.read_bytes() == data


def test_a_model_without_a_template_can_be_given_plain_text(folder, behaviours, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    path = attack_command(str(bare), ["completingattack"], behaviours, tmp_path / "a", max_new_tokens=2)
    assert len(path.read_text().splitlines()) == 2
    with pytest.raises(DertaError, match="has no chat template"):
        attack_command(str(bare), ["prefilling-4"], behaviours, tmp_path / "b", max_new_tokens=2)


def test_an_attacker_that_was_trained_again_is_another_request(folder, behaviours, tmp_path):
    attacker = tiny_folder(tmp_path / "attacker")
    request = {"attacker": attacker, "max_new_tokens": 6, **BUDGETS}
    attack_command(folder, ["pair"], behaviours, tmp_path / "a", **request)
    model = LlamaForCausalLM.from_pretrained(attacker)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(attacker)
    with pytest.raises(UsageError, match="responses of another request"):
        attack_command(folder, ["pair"], behaviours, tmp_path / "a", **request)


def test_interrupted_within_a_real_run_the_file_ends_up_the_same(folder, behaviours, tmp_path):
    names = ["direct", "pair", "autodan"]
    whole = attack_command(folder, names, behaviours, tmp_path / "a", attacker=folder, max_new_tokens=6, **BUDGETS)
    lines = whole.read_bytes().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "responses.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:30])
    again = attack_command(folder, names, behaviours, tmp_path / "b", attacker=folder, max_new_tokens=6, **BUDGETS)
    assert again.read_bytes() == whole.read_bytes()


def test_a_generations_likelihoods_equal_those_of_separate_forward_passes(folder):
    target = local_target(folder, "float32")
    prompts = [ask(text) for text in attacks.autodan.PROTOTYPES] + [ask("short")]
    opening = "Sure, here are the steps:"
    for prompt, found in zip(prompts, target.log_likelihood(prompts, [opening] * 5), strict=True):
        text = target.tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
        ids = target.tokenizer(text + opening, return_tensors="pt").input_ids
        n = target.tokenizer(opening, return_tensors="pt").input_ids.shape[1]
        with torch.no_grad():
            logs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0].log_softmax(-1)
        expected = sum(logs[i - 1, ids[0, i]].item() for i in range(ids.shape[1] - n, ids.shape[1])) / n
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"names": ["direct", "pears"]}, "attack 'pears': there is none of this name"),
        ({"source": "none.csv"}, "none.csv: there is no such file"),
        ({"templates": "none.jsonl", "model": "/nowhere"}, "none.jsonl: there is no such file"),
        ({"names": ["direct", "direct"], "model": "/nowhere"}, "an attack is named twice"),
        ({"streams": 0, "model": "/nowhere"}, "streams is 0; it must be 1 or more"),
        ({"steps": 2.5, "model": "/nowhere"}, "steps is 2.5; it must be a whole number"),
        ({"names": ["prefilling-4"], "source": "bare", "model": "/nowhere"}, "has no harmful response to prefill"),
        ({"model": "/nowhere"}, "model '/nowhere': there is no such folder"),
        ({"attacker": "/nowhere", "names": ["pair"]}, "model '/nowhere': there is no such folder"),
    ],
)
def test_bad_requests_stop_before_a_model_is_loaded_or_anything_written(folder, behaviours, tmp_path, change, said):
    if change.get("source") == "bare":
        change = {**change, "source": str(write_jsonl(tmp_path / "bare.jsonl", [{"query": "How do I fold a boat?"}]))}
    request = {"model": folder, "names": ["direct"], "source": behaviours, "out": tmp_path / "new", **change}
    with pytest.raises(DertaError, match=said):
        attack_command(**request)
    assert not (tmp_path / "new").exists()


def test_a_file_in_place_of_the_folder_is_named(folder, behaviours):
    with pytest.raises(UsageError, match="this is a file"):
        attack_command(folder, ["direct"], behaviours, behaviours)


def test_behaviours_of_other_categories_get_the_default_judge(folder, tmp_path, monkeypatch):
    own = {"query": "How do I fold a boat?"}
    source = str(write_jsonl(tmp_path / "own.jsonl", [asdict(concord(0).behaviours["test"][0]), own]))
    monkeypatch.setattr("derta_lib.judges.corpus.build", lambda: Agreeing())
    path = attack_command(folder, ["autodan"], source, tmp_path / "out", max_new_tokens=4, population=4, steps=9)
    for record in map(json.loads, path.read_text().splitlines()):
        assert record["details"]["success"]
        assert record["details"]["steps_used"] == 1


class Agreeing:
    name = "agreeing"

    def judge(self, items):
        return [Verdict(item.id, True, 1.0, "none", None, self.name) for item in items]


def test_the_attacked_model_named_as_the_attacker_is_the_same_request(folder, behaviours, tmp_path, monkeypatch):
    request = {"source": behaviours, "out": tmp_path / "a", "max_new_tokens": 2, **BUDGETS}
    path = attack_command(folder, ["pair"], **request)
    before = path.read_bytes()
    monkeypatch.setattr("derta_lib.generation.LocalTarget.respond", lambda *_: pytest.fail("asked again"))
    assert attack_command(folder, ["pair"], attacker=folder, **request).read_bytes() == before


def test_behaviours_are_not_written_over_by_responses(folder, behaviours, tmp_path):
    source = tmp_path / "a" / "responses.jsonl"
    source.parent.mkdir()
    shutil.copy(behaviours, source)
    with pytest.raises(UsageError, match="this is the input"):
        attack_command(folder, ["direct"], str(source), tmp_path / "a", max_new_tokens=2)
    assert source.read_text() == Path(behaviours).read_text()


@pytest.mark.parametrize(("name", "helps"), [("pair", "attacker"), ("autodan", "mutator")])
def test_a_model_that_helps_is_the_one_that_was_named(folder, behaviours, tmp_path, monkeypatch, name, helps):
    helper, asked = str(shutil.copytree(folder, tmp_path / "helper")), set()
    respond = LocalTarget.respond

    def watched(target, prompts, max_new_tokens):
        asked.add(target.name)
        return respond(target, prompts, max_new_tokens)

    monkeypatch.setattr(LocalTarget, "respond", watched)
    for given, expected in (({}, {folder}), ({helps: helper}, {folder, helper})):
        asked.clear()
        out = tmp_path / "+".join(["out", *given])
        attack_command(folder, [name], behaviours, out, max_new_tokens=2, **given, **BUDGETS)
        assert asked == expected


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("attacks.run", partial(attack_command, "m", ["direct"], PAPER)),
        ("position", partial(position_command, "m", PAPER)),
    ],
)
def test_the_seed_of_a_command_draws_its_behaviours(tmp_path, monkeypatch, module, command):
    asked = []

    def drawn(source, *, seed=0):
        asked.append((source, seed))
        raise UsageError("enough")

    monkeypatch.setattr(f"derta_lib.{module}.load_behaviours", drawn)
    with pytest.raises(UsageError, match="enough"):
        command(tmp_path / "out", seed=7)
    assert asked == [(PAPER, 7)]
