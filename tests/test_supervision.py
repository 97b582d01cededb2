"""Rows and sites against equation 2 read token by token, the estimator's expectation, and bad input."""

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from plain import loss_of_row
from scipy.stats import chisquare
from tiny import CHATS, tiny_folder

from derta_lib.chat import Chat, chat_of
from derta_lib.data import Pair, Triple
from derta_lib.errors import DertaError, UsageError
from derta_lib.loss import site_losses, weighted_sum
from derta_lib.supervision import METHODS, PRESETS, Encoder, Method, Preset, preset
from derta_lib.tree import pack, use_tree_attention

EQUATION_2 = Preset(keep=1.0, weight=1.0, mean="mle", glued=False, both_at_fork=True)
TRIPLE = Triple("t", "How is a rune cut?", "Sorry, no one may.", "Step 1: take glass.\nStep 2: cut it.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_folder(tmp_path_factory.mktemp("tiny"))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def chat(model: Any) -> Chat:
    return chat_of(model[1])


def test_equation_2_by_brute_force(model: Any) -> None:
    from transformers import AutoModelForCausalLM

    network, tokenizer, folder = model
    served = AutoModelForCausalLM.from_pretrained(folder).eval()
    use_tree_attention(served)
    encoder = Encoder(chat_of(tokenizer), "derta", EQUATION_2, 200)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    query, harmful = ids(CHATS.format(TRIPLE.query)), ids(TRIPLE.harmful)
    sorry = {"": ids("Sorry")[0], " ": ids(" Sorry")[0]}
    contexts = set()
    with torch.no_grad():
        for seed in range(12):
            rows = encoder.rows(TRIPLE, f"s{seed}")
            # k is read off the MLE row: what it holds beyond the query before r sets in
            k = next(k for k in range(len(harmful) + 1) if rows[0].sites[0].position == len(query) - 1 + k)
            contexts.add(k)
            glue = "" if k == 0 or tokenizer.decode(harmful[:k])[-1].isspace() else " "
            safe = ids(glue + TRIPLE.safe) + ids("<|end|>")
            mle = query + harmful[:k] + safe
            objective = sum(
                loss_of_row(network, mle, position, mle[position + 1])
                for position in range(len(query) + k - 1, len(mle) - 1)
            )
            for t in range(1, len(harmful) + 1):
                before = harmful[: t - 1]
                glue = "" if not before or tokenizer.decode(before)[-1].isspace() else " "
                objective += loss_of_row(network, query + before, len(query) + t - 2, sorry[glue])
            packed = pack([rows])
            assert packed.count == len(safe)
            ours = weighted_sum(site_losses(served, packed), packed)
            assert abs(ours.item() / objective.item() - 1) <= 1e-5
    assert len(contexts) > 4


def rto_row(chat: Chat, length: int, k: int, seed: int = 0, **options: Any) -> Any:
    preset = replace(EQUATION_2, **{"keep": 0.15, "weight": 0.3, "both_at_fork": False, **options})
    harmful = range(10, 10 + length)
    return Encoder(chat, "derta", preset, 200).rto((3, 4, 5), harmful, k, random.Random(seed))


@pytest.mark.parametrize(("length", "keep"), [(4, 0.5), (5, 0.15), (6, 1.0), (7, 0.3)])
def test_kept_sites_are_unbiased(chat: Chat, length: int, keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every subset that may be drawn is drawn: the mean over all of them is λ at each site, exactly."""
    k, drawn = 2, []
    population = [t for t in range(length) if t != k]
    size = max(1, round(keep * len(population)))
    for subset in combinations(population, size):

        class Fixed(random.Random):
            def sample(self, items: Any, count: int) -> Any:
                assert (list(items), count) == (population, size)
                return list(subset)  # noqa: B023

        monkeypatch.setattr("random.Random", Fixed)
        drawn.append(rto_row(chat, length, k, keep=keep))
    total: Counter[int] = Counter()
    for row in drawn:
        assert len(row.sites) == size
        for site in row.sites:
            total[site.position - 2] += site.weight
    assert {t: pytest.approx(0.3) for t in population} == {t: weight / len(drawn) for t, weight in total.items()}


def test_draws_are_uniform(chat: Chat) -> None:
    counts = Counter(site.position - 2 for seed in range(2000) for site in rto_row(chat, 9, 4, seed, keep=0.25).sites)
    assert set(counts) == set(range(9)) - {4}
    assert chisquare(list(counts.values())).pvalue > 0.01


def test_no_triple_loses_all_its_sites(chat: Chat) -> None:
    for length in range(1, 8):
        for k in range(length + 1):
            for both in (False, True):
                row = rto_row(chat, length, k, keep=1e-6, both_at_fork=both)
                assert len(row.sites) == 1
                places = 1 if length == 1 else length - (not both and k < length)
                assert row.sites[0].weight == pytest.approx(0.3 * places)


def test_fork_is_left_to_mle_or_has_two_targets(chat: Chat) -> None:
    skipped, both = rto_row(chat, 6, 2, keep=1.0), rto_row(chat, 6, 2, keep=1.0, both_at_fork=True)
    assert [s.position - 2 for s in skipped.sites] == [0, 1, 3, 4, 5]
    assert [s.position - 2 for s in both.sites] == [0, 1, 2, 3, 4, 5]


def test_methods_without_prefix_fork_at_the_start(chat: Chat) -> None:
    """RTO only: MLE speaks at k = 0, so that is the context that RTO leaves out."""
    encoder = Encoder(chat, "rto", replace(PRESETS["fixed"], keep=1.0), 200)
    mle_row, rto_row_ = encoder.rows(TRIPLE, "a")
    fork = mle_row.sites[0].position
    assert [s.position for s in rto_row_.sites] == list(range(fork + 1, len(rto_row_.ids) - 1))


def test_k_is_uniform_from_0_to_the_whole_response(chat: Chat) -> None:
    encoder = Encoder(chat, "derta", PRESETS["fixed"], 200)
    length = len(chat.response_ids(TRIPLE.harmful))
    start = len(encoder.rows(Pair("p", TRIPLE.query, "x"), "")[0].ids) - len(chat.response_ids("x"))
    ks = Counter(encoder.rows(TRIPLE, f"{i}")[0].sites[0].position + 1 - start for i in range(3000))
    assert set(ks) == set(range(length + 1))
    assert chisquare([ks[k] for k in range(length + 1)]).pvalue > 0.01


def test_draws_follow_from_the_seed_alone(chat: Chat) -> None:
    one, two = (Encoder(chat, "derta", PRESETS["fixed"], 200) for _ in range(2))
    two.rows(TRIPLE, "another draw first")
    assert one.rows(TRIPLE, "a") == two.rows(TRIPLE, "a")
    assert any(one.rows(TRIPLE, "a") != one.rows(TRIPLE, f"{i}") for i in range(5))


def test_token_mean_counts_every_site(chat: Chat) -> None:
    """The authors' mean: each site weighs 1 and all are counted; the project's counts MLE sites alone."""
    rows = Encoder(chat, "derta", PRESETS["paper"], 200).rows(TRIPLE, "a")
    assert {s.weight for row in rows for s in row.sites} == {1.0}
    assert [row.count for row in rows] == [len(row.sites) for row in rows]
    rows = Encoder(chat, "derta", PRESETS["fixed"], 200).rows(TRIPLE, "a")
    assert [row.count for row in rows] == [len(rows[0].sites), 0]


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_compositions(chat: Chat, method: str) -> None:
    encoder = Encoder(chat, method, PRESETS["fixed"], 200)
    rows = [encoder.rows(TRIPLE, f"{i}") for i in range(20)]
    tasks = {tuple("+".join(sorted({s.task for s in row.sites})) for row in each) for each in rows}
    assert tasks == ({("mle", "rto")} if METHODS[method].rto else {("mle",)})
    starts = {each[0].sites[0].position for each in rows}
    assert (len(starts) > 1) == METHODS[method].prefix


def test_unknown_method(chat: Chat) -> None:
    with pytest.raises(UsageError, match=r"method .dertaa. is not known; the methods are vanilla, .*, derta"):
        Encoder(chat, "dertaa", PRESETS["fixed"], 200)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"keep": 0.0}, "keep is 0.0"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"weight": -0.5}, "the weight λ is -0.5"),
        ({"weight": float("nan")}, "the weight λ is nan"),
        ({"weight": float("inf")}, "the weight λ is inf"),
        ({"mean": "site"}, "mean 'site' is not known; the means are mle, sites"),
    ],
)
def test_a_preset_that_no_loss_could_have_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(PRESETS["fixed"], **wrong)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(UsageError, match="preset 'papers' is not known; the presets are fixed, paper, paper-lora"):
        preset("papers")
    assert preset("fixed") is PRESETS["fixed"]


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (replace(TRIPLE, harmful=""), "harmful response is empty"),
        (replace(TRIPLE, harmful=" \n"), "harmful response is empty"),
        (replace(TRIPLE, safe=""), "safe response is empty"),
        (Pair("p", "q", " "), "response is empty"),
        (replace(TRIPLE, query="rune " * 300), "max_length 100"),
    ],
)
def test_bad_examples_are_refused_by_name(chat: Chat, example: Any, said: str) -> None:
    with pytest.raises(DertaError, match=said) as error:
        Encoder(chat, "derta", PRESETS["fixed"], 100).rows(example, "a")
    assert f"'{example.id}'" in str(error.value)


def test_long_texts_are_cut_at_their_right_end_and_counted(chat: Chat) -> None:
    long = replace(TRIPLE, harmful=TRIPLE.harmful * 20)
    encoder = Encoder(chat, "derta", PRESETS["fixed"], 100)
    whole = chat.response_ids(long.harmful)
    start = len(encoder.rows(Pair("p", TRIPLE.query, "x"), "")[0].ids) - len(chat.response_ids("x"))
    for seed in range(30):
        mle, rto_ = encoder.rows(long, f"{seed}")
        assert len(mle.ids) <= 100
        assert len(rto_.ids) <= 100
        assert list(rto_.ids[start:]) == whole[: len(rto_.ids) - start]
        assert mle.sites[-1].target == chat.end  # r is whole
    assert encoder.report == {"rows": 31, "harmful response cut at its right end": 30}
    # r longer than its half: cut as well, and then not closed
    both = replace(long, safe=TRIPLE.safe * 30)
    for seed in range(30):
        mle, rto_ = encoder.rows(both, f"{seed}")
        assert len(mle.ids) == 100
        assert mle.sites[-1].target != chat.end
        assert rto_.sites
    assert encoder.report["safe response cut at its right end"] == 30


@pytest.mark.parametrize(("extra", "closed"), [(0, True), (1, False)])
def test_a_cut_pair_is_not_closed(chat: Chat, extra: int, closed: bool) -> None:
    pair = Pair("p", "Hello", "one two three four")
    full = Encoder(chat, "vanilla", PRESETS["fixed"], 500).rows(pair, "")[0]
    encoder = Encoder(chat, "vanilla", PRESETS["fixed"], len(full.ids) - extra)
    row = encoder.rows(pair, "")[0]
    assert len(row.ids) == len(full.ids) - extra
    assert (row.sites[-1].target == chat.end) == closed
    assert [s.target for s in row.sites] == [s.target for s in full.sites][: len(row.sites)]
    assert encoder.report["response cut at its right end"] == extra


def test_a_tokenizer_larger_than_the_head_is_refused(model: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer, _ = model
    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    use_tree_attention(small)
    encoder = Encoder(chat_of(tokenizer), "derta", PRESETS["fixed"], 100)
    with pytest.raises(DertaError, match="100"):
        site_losses(small, pack([encoder.rows(TRIPLE, "a")]))


def test_methods_are_those_of_the_papers_tables() -> None:
    """Table 4: what each adds to vanilla training. Two terms make two instances of a triple, as a baseline sees."""
    told = {
        "vanilla": Method(prefix=False, rto=False, triples=2),
        "vanilla_half": Method(prefix=False, rto=False, triples=1),
        "recaug": Method(prefix=True, rto=False, triples=2),
        "harmful_prefix": Method(prefix=True, rto=False, triples=1),
        "rto": Method(prefix=False, rto=True, triples=1),
        "derta": Method(prefix=True, rto=True, triples=1),
    }
    assert told == METHODS


def test_presets_are_those_of_the_authors_and_of_the_book() -> None:
    """The authors' code keeps 5 % of the targets in full training and all of them with LoRA, and weighs all alike."""
    authors = {"weight": 1.0, "mean": "sites", "glued": True, "both_at_fork": True}
    assert preset("paper") == Preset(keep=0.05, **authors)
    assert preset("paper-lora") == Preset(keep=1.0, **authors)
    assert preset("fixed") == Preset(keep=0.15, weight=0.15, mean="mle", glued=False, both_at_fork=False)


def test_r_stays_whole_behind_all_that_is_left_of_a_long_harmful_response(chat: Chat) -> None:
    """Where it goes on it may take a token more than where it opens a turn."""
    long = replace(TRIPLE, safe="Quit.", harmful=TRIPLE.harmful * 20)
    encoder, grown = Encoder(chat, "derta", PRESETS["fixed"], 40), []
    for seed in range(200):
        mle, rto_ = encoder.rows(long, f"{seed}")
        before = mle.sites[0].position + 1
        if before == len(rto_.ids):  # k is the whole of what is left
            grown.append(len(mle.ids) - before - len(chat.response_ids(long.safe)))
        assert mle.sites[-1].target == chat.end
    assert max(grown) > 0
