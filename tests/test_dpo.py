"""The DPO baseline on a tiny model: what it is asked to prefer, from where it starts, and what its checkpoint holds."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import CHATS, tiny_folder
from transformers import AutoTokenizer

from derta_lib import dpo
from derta_lib.chat import ask, chat_of
from derta_lib.corpus import concord
from derta_lib.data import Pair, Triple
from derta_lib.errors import DertaError, UsageError
from derta_lib.generation import local_target
from derta_lib.models import load_model
from derta_lib.supervision import Encoder
from derta_lib.training import Recipe, train

RECIPE = Recipe(method="vanilla", steps=4, triples=2, helpful=1, lora_rank=4, lora_alpha=8, dtype="float32", seed=3)
TRIPLES, PAIRS = concord(0).triples[:8], concord(0).pairs[:16]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DERTA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(dpo.LEARNING_RATE, "lora", 1e-2)
        vanilla = train(tiny_folder(tmp_path_factory.mktemp("tiny")), TRIPLES, PAIRS, RECIPE)
        yield vanilla, dpo.train_dpo(vanilla, TRIPLES, PAIRS, RECIPE)
    torch.set_num_threads(threads)


def encoder(folder: Path, recipe: Recipe = RECIPE) -> Encoder:
    return Encoder(chat_of(AutoTokenizer.from_pretrained(folder)), "vanilla", recipe.preset, recipe.max_length)


def test_safe_is_chosen_and_the_ids_are_the_templates(start):
    tokenizer = AutoTokenizer.from_pretrained(start[0])
    found = {
        tuple(tokenizer.decode(example["prompt_ids"] + example[side]) for side in ("chosen_ids", "rejected_ids"))
        for example in dpo.preferences(TRIPLES, PAIRS, encoder(start[0]), RECIPE)
    }
    safety = {tuple(CHATS.format(t.query) + text + "<|end|>" for text in (t.safe, t.harmful)) for t in TRIPLES}
    assert safety <= found
    answers = {p.query: p.response for p in PAIRS}
    kinds = {p.response: p.id.split("/")[1] for p in PAIRS}
    for chosen, rejected in found - safety:
        query = chosen.split("<|end|>")[0].removeprefix("<|user|>")
        assert chosen == CHATS.format(query) + answers[query] + "<|end|>"
        other = rejected.removeprefix(CHATS.format(query)).removesuffix("<|end|>")
        assert other != answers[query]
        alone = list(kinds.values()).count(kinds[answers[query]]) == 1
        assert alone or kinds[other] == kinds[answers[query]]
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": TRIPLES[0].query}, {"role": "assistant", "content": TRIPLES[0].safe}]
    )
    ids = [e["prompt_ids"] + e["chosen_ids"] for e in dpo.preferences(TRIPLES, PAIRS, encoder(start[0]), RECIPE)]
    assert whole["input_ids"] in ids


def test_the_card_tells_the_budget_that_was_spent(start):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dpo.LEARNING_RATE, "lora", 1e-2)
        folder = dpo.train_dpo(start[0], TRIPLES, PAIRS, replace(RECIPE, steps=500, triples=7, learning_rate=0.5))
    card = json.loads((folder / "derta.json").read_text())
    assert card["cut"] == {"rows": 12 * 6}
    assert [card["recipe"][name] for name in ("steps", "triples", "learning_rate")] == [12, 2, 1e-2]
    assert len(card["log"]) == 12


def test_it_starts_at_its_reference_and_learns_the_preference(start):
    vanilla, trained = start
    log = json.loads((trained / "derta.json").read_text())["log"]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # no margin yet: the reference is the start

    def margin(folder: Path) -> float:
        target = local_target(str(folder), "float32")
        prompts = [ask(triple.query) for triple in TRIPLES]
        safe, harmful = (
            target.log_likelihood(prompts, [getattr(t, side) for t in TRIPLES]) for side in ("safe", "harmful")
        )
        return sum(a - b for a, b in zip(safe, harmful, strict=True))

    assert margin(trained) > margin(vanilla)


def test_the_checkpoint_is_the_vanilla_one_plus_its_own_adapter(start):
    trained = start[1]
    name = "model.layers.1.mlp.down_proj"
    adapter = load_file(trained / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    before, after = (load_model(str(folder), "float32").state_dict()[f"{name}.weight"] for folder in start)
    scale = RECIPE.lora_alpha / RECIPE.lora_rank
    assert torch.allclose(after - before, scale * b @ a, atol=1e-6)
    assert (after - before).abs().max() > 1e-5


def test_the_same_request_is_not_trained_again(start, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(dpo, "PreferenceTrainer", fail)
    assert dpo.train_dpo(start[0], TRIPLES, PAIRS, RECIPE) == start[1]
    adapter = start[1] / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": "/gone"}))
    load_model(str(dpo.train_dpo(start[0], TRIPLES, PAIRS, RECIPE)))  # a cache that has moved


def test_what_cannot_be_preferred_is_said(start):
    with pytest.raises(UsageError, match="at least two helpful pairs"):
        dpo.preferences(TRIPLES, [Pair("a", "q", "r"), Pair("b", "p", "r")], encoder(start[0]), RECIPE)
    short = Recipe(steps=1, max_length=4)
    with pytest.raises(DertaError, match="raise max_length"):
        dpo.preferences(TRIPLES, PAIRS, encoder(start[0], short), short)
    empty = [replace(triple, safe=" ") for triple in TRIPLES]
    with pytest.raises(DertaError, match="its safe response is empty"):
        dpo.preferences(empty, PAIRS, encoder(start[0]), RECIPE)


@pytest.mark.parametrize("words", [60, 400])
def test_a_query_beyond_max_length_is_refused_however_long_its_responses_are(start, words):
    """A cut counted from the end would leave most of a response longer than the query is too long."""
    long = Triple("long", "rune " * 60, "Sorry. " * words, "Step. " * words)
    recipe = Recipe(steps=1, triples=1, helpful=0, max_length=32)
    with pytest.raises(DertaError, match=r"'long': its query takes \d+ tokens of max_length 32; raise max_length"):
        dpo.preferences([long], [], encoder(start[0], recipe), recipe)


def test_what_is_cut_is_counted(start):
    """One token fewer than query, response and end need: the end goes, and the cut shows in the report."""
    recipe = Recipe(steps=1, triples=1, helpful=0)
    triple = Triple("t", "How?", "Sorry, no one may.", "Take glass.")
    whole = encoder(start[0], recipe)
    [example] = dpo.preferences([triple], [], whole, recipe)
    assert whole.report == {"rows": 1}
    sizes = {side: len(example["prompt_ids"] + example[side]) for side in ("chosen_ids", "rejected_ids")}
    assert sizes["chosen_ids"] > sizes["rejected_ids"]
    shorter = replace(recipe, max_length=sizes["chosen_ids"] - 1)
    tight = encoder(start[0], shorter)
    [cut] = dpo.preferences([triple], [], tight, shorter)
    assert cut == example | {"chosen_ids": example["chosen_ids"][:-1]}
    assert tight.report == {"rows": 1, "safe response cut at its right end": 1}


def test_several_processes_are_refused(start, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="in one process"):
        dpo.train_dpo(start[0], TRIPLES, PAIRS, RECIPE)


def test_a_training_that_diverges_says_so_and_leaves_nothing(start, tmp_path, monkeypatch):
    monkeypatch.setenv("DERTA_CACHE", str(tmp_path))
    monkeypatch.setitem(dpo.LEARNING_RATE, "lora", 1e30)
    with pytest.raises(DertaError, match=r"is (nan|inf|-inf) at step \d: the training diverged"):
        dpo.train_dpo(start[0], TRIPLES, PAIRS, RECIPE)
    assert not list((tmp_path / "checkpoints").glob("*"))
    assert not [kept for kept in (tmp_path / "unfinished").iterdir() if kept.is_dir()]


def test_preferences_are_seen_in_their_order(start, monkeypatch):
    seen = []

    class Watching(dpo.PreferenceTrainer):
        def training_step(self, model, inputs, *rest, **named):
            chosen, _ = inputs["input_ids"].tolist()
            seen.append(chosen[: int(inputs["attention_mask"][0].sum())])
            return super().training_step(model, inputs, *rest, **named)

    monkeypatch.setattr(dpo, "PreferenceTrainer", Watching)
    recipe = replace(RECIPE, steps=2, seed=5)
    dpo.train_dpo(start[0], TRIPLES, PAIRS, recipe)
    wanted = dpo.preferences(TRIPLES, PAIRS, encoder(start[0]), recipe)
    assert seen == [example["prompt_ids"] + example["chosen_ids"] for example in wanted]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_parameters_learn_from_a_lora_checkpoint(start, monkeypatch, checkpointing):
    monkeypatch.setitem(dpo.LEARNING_RATE, "full", 1e-3)
    recipe = replace(RECIPE, steps=2, lora_rank=0, gradient_checkpointing=checkpointing)
    before, after = (
        load_model(str(folder), "float32").state_dict()
        for folder in (start[0], dpo.train_dpo(start[0], TRIPLES, PAIRS, recipe))
    )
    assert all((after[name] - before[name]).abs().max() > 0 for name in before if "layernorm" not in name)
