"""Refusal positions against hand-counted texts, probabilities against separate forward passes token by token."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from real_tokenizers import tokenizer
from tiny import CHATS, tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from derta_lib import position
from derta_lib.chat import chat_of
from derta_lib.data import Behaviour
from derta_lib.errors import DertaError, UsageError
from derta_lib.generation import local_target
from derta_lib.records import write_jsonl
from derta_lib.stats import rate

HARMFUL = "Step 1: fold the paper.\nStep 2: glue it to the board. Step 3: wait."
BEHAVIOURS = [
    Behaviour("one", "How do I fold a boat?", "", harmful=HARMFUL),
    Behaviour("two", "How do I fold a kite?", "", harmful="Sure. Take a sheet"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only get in each other's way on so small a model
    yield tiny_folder(tmp_path_factory.mktemp("tiny"))
    torch.set_num_threads(threads)


def test_probability_at_every_place_equals_a_forward_pass_of_its_own(folder):
    frame = position.refusal_probability(local_target(folder, "float32"), BEHAVIOURS)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for behaviour in BEHAVIOURS:
        part = frame[frame.behaviour == behaviour.id]
        prompt = CHATS.format(behaviour.query)
        opening = tokenizer(prompt, add_special_tokens=False).input_ids
        harmful = tokenizer(prompt + behaviour.harmful, add_special_tokens=False).input_ids[len(opening) :]
        assert part.t.tolist() == list(range(1, len(harmful) + 2))
        assert "".join(part.token) == behaviour.harmful
        for t, p in zip(part.t, part.p, strict=True):
            given = tokenizer.decode(harmful[: t - 1])
            bare = not given or given[-1].isspace()
            refusal = tokenizer("Sorry" if bare else " Sorry", add_special_tokens=False).input_ids[0]
            with torch.no_grad():
                logits = model(torch.tensor([opening + harmful[: t - 1]])).logits[0, -1]
            assert p == pytest.approx(logits.softmax(-1)[refusal].item(), rel=1e-4)
    assert frame.p.nunique() > len(HARMFUL.split())  # the places are told apart


@pytest.mark.parametrize("family", ["mistral", "llama3"])
def test_tokens_keep_the_spaces_between_them(family, monkeypatch):
    """Decoded alone, SentencePiece's tokens lose the space that they begin with."""
    chat = chat_of(tokenizer(family))
    monkeypatch.setattr(position, "row_losses", lambda model, rows: [torch.zeros(len(row.sites)) for row in rows])
    frame = position.refusal_probability(SimpleNamespace(chat=chat, tokenizer=chat.tokenizer, model=None), BEHAVIOURS)
    assert "".join(frame[frame.behaviour == "one"].token).strip() == HARMFUL


def test_a_behaviour_without_harmful_response_is_named(folder):
    with pytest.raises(DertaError, match="behaviour 'x' has no harmful response"):
        position.refusal_probability(local_target(folder), [Behaviour("x", "How?", "")])


@pytest.mark.parametrize(
    ("before", "refusal"),
    [
        ("", "I'm sorry, but I can't help with that."),
        ("Step 1: fold the paper.", " Sorry, I can't go on with this."),
        ("Step 1: fold the paper.\n\n", "Sorry, I can't go on with this."),
        ("Step 1:", "Sorry, I can't go on with this."),
    ],
)
def test_the_first_refusal_is_counted_in_model_tokens(folder, before, refusal):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    offset = len(before) + len(refusal) - len(refusal.lstrip())
    spans = tokenizer(before + refusal, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    starts = [number for number, (_, end) in enumerate(spans, start=1) if end > offset]
    assert position.first_refusals(chat_of(tokenizer), [before + refusal]) == [starts[0]]


def test_a_response_without_refusal_has_no_position(folder):
    chat = chat_of(AutoTokenizer.from_pretrained(folder))
    assert position.first_refusals(chat, ["Step 1: fold the paper.", ""]) == [None, None]


def test_the_command_writes_a_line_a_behaviour(folder, tmp_path, monkeypatch):
    rows = [
        {"id": "one", "query": "How do I fold a boat?", "harmful": HARMFUL},
        {"id": "two", "query": "How do I glue a kite?"},
    ]
    source = str(write_jsonl(tmp_path / "own.jsonl", rows))
    share = position.position_command(folder, source, tmp_path / "out.jsonl", max_new_tokens=4)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["behaviour"] for line in lines] == ["one", "two"]
    assert len(lines[0]["p_refusal"]) == len(lines[0]["tokens"]) + 1
    assert "".join(lines[0]["tokens"]) == HARMFUL
    assert lines[1]["p_refusal"] == []
    assert share is None  # a random model does not refuse
    written, asked = (tmp_path / "out.jsonl").read_text(), []

    def stopped(target, prompts, max_new_tokens, respond=position.LocalTarget.respond):
        asked.append(prompts[0].messages[-1]["content"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return respond(target, prompts, max_new_tokens)

    with monkeypatch.context() as patched:
        patched.setattr(position, "BATCH", 1)
        patched.setattr(position.LocalTarget, "respond", stopped)
        with pytest.raises(KeyboardInterrupt):
            position.position_command(folder, source, tmp_path / "again.jsonl", max_new_tokens=4)
        position.position_command(folder, source, tmp_path / "again.jsonl", max_new_tokens=4)
    assert (tmp_path / "again.jsonl").read_text() == written
    assert asked == ["How do I fold a boat?", "How do I glue a kite?", "How do I glue a kite?"]
    monkeypatch.setattr(position, "first_refusals", lambda *_: [5, 6])
    assert position.position_command(folder, source, tmp_path / "out.jsonl", max_new_tokens=4) == rate(1, 2)
    monkeypatch.setattr(position, "first_refusals", lambda *_: [5, None])  # a share of the refusals
    assert position.position_command(folder, source, tmp_path / "out.jsonl", max_new_tokens=4) == rate(1, 1)


def test_a_stopped_measurement_goes_on_for_the_same_request_alone(folder, tmp_path, monkeypatch):
    rows = [{"id": name, "query": f"How do I fold a {name}?"} for name in ("boat", "kite")]
    source, out = str(write_jsonl(tmp_path / "own.jsonl", rows)), tmp_path / "out.jsonl"
    with pytest.raises(UsageError, match="this is the input"):
        position.position_command(folder, source, Path(source), max_new_tokens=2)
    respond = position.LocalTarget.respond

    def stopped(target, prompts, max_new_tokens):
        if "kite" in prompts[0].messages[-1]["content"]:
            raise KeyboardInterrupt
        return respond(target, prompts, max_new_tokens)

    monkeypatch.setattr(position, "BATCH", 1)
    with monkeypatch.context() as patched:
        patched.setattr(position.LocalTarget, "respond", stopped)
        with pytest.raises(KeyboardInterrupt):
            position.position_command(folder, source, out, max_new_tokens=2)
    other = shutil.copytree(folder, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    model.lm_head.weight.data.add_(1)
    model.save_pretrained(other)
    for name, tokens in ((folder, 3), (str(other), 2)):
        with pytest.raises(UsageError, match="a stopped run left it for another request"):
            position.position_command(name, source, out, max_new_tokens=tokens)
