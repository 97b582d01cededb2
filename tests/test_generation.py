"""Generation and likelihoods against transformers' own generate and a plain forward, prompt by prompt in fp32."""

import copy
import random
from collections import Counter
from typing import Any

import pytest
import torch
from plain import VOCABULARY, loss_of_row, tiny
from tiny import tiny_folder

from derta_lib import cache, generation
from derta_lib.cache import plan_bins
from derta_lib.chat import Prompt, ask, chat_of
from derta_lib.errors import DertaError, UsageError
from derta_lib.generation import LocalTarget, generate, row_losses
from derta_lib.tree import Row, Site, use_tree_attention


def prompts() -> list[list[int]]:
    """Different lengths, shared starts, one inside another, one twice."""
    rng = random.Random(0)

    def some(count: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(count)]

    shared = some(9)
    made = [some(1), some(3), shared, shared + some(4), some(17), shared + some(11), some(6)]
    return [*made, made[3]]


def wanted(model: Any, ids: list[int], new: int, stops: set[int]) -> list[int]:
    made = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=sorted(stops) or None,
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    return made[: next((i for i, token in enumerate(made) if token in stops), len(made))]


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("mistral", "eager"), ("gemma2", None)],
)
def test_same_tokens_as_generate(family: str, attention: str | None) -> None:
    plain, model = tiny(family, attention), tiny(family, attention)
    use_tree_attention(model)
    free = [wanted(plain, ids, 14, set()) for ids in prompts()]
    assert generate(model, prompts(), 14, set()) == free
    stops = {free[1][4], free[4][0], free[5][8]}  # rows leave at their start, in the middle, and never
    stopped = [wanted(plain, ids, 14, stops) for ids in prompts()]
    assert len({len(answer) for answer in stopped}) > 1
    assert generate(model, prompts(), 14, stops) == stopped


def test_a_model_that_computes_nan_is_refused() -> None:
    """Its answers would be empty, and look safe."""
    model = tiny("llama")
    use_tree_attention(model)
    with torch.no_grad():
        model.get_decoder().norm.weight[3] = torch.nan
    for ask_it in (
        lambda: generate(model, prompts(), 4, set()),
        lambda: row_losses(model, [Row((5, 6, 7), (Site(1, 7, 1.0, "mle"),))]),
        lambda: list(generation.row_states(model, [Row((5, 6, 7))])),
    ):
        with pytest.raises(DertaError, match="'llama' computes NaN"):
            ask_it()


def test_a_token_that_the_model_lacks_is_named() -> None:
    model = tiny("llama")
    use_tree_attention(model)
    with pytest.raises(DertaError, match=f"Token id {VOCABULARY} lies outside the model's embeddings"):
        generate(model, [[5, VOCABULARY]], 4, set())


def test_small_batches_and_packs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mistral")
    use_tree_attention(model)
    whole = generate(model, prompts(), 8, set())
    monkeypatch.setattr(generation, "CACHE_TOKENS", 60)
    monkeypatch.setattr(generation, "PACK_TOKENS", 12)
    assert generate(model, prompts(), 8, set()) == whole
    assert generate(model, [], 8, set()) == []


def families_of_prompts() -> list[list[int]]:
    """Long shared starts, none at all, one prompt many times, lengths from 1 to 90; out of order."""
    rng = random.Random(1)

    def some(count: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(count)]

    long, middle = some(60), some(25)
    made = [*(long + some(rng.randrange(9)) for _ in range(6)), *(middle + some(30) for _ in range(3))]
    made += [*(some(rng.randrange(1, 9)) for _ in range(6)), some(90), some(40), some(41), some(39), *[some(5)] * 4]
    rng.shuffle(made)
    return made


def test_bins_share_starts_and_have_like_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SLACK", 8)
    monkeypatch.setattr(cache, "SHORT", 20)
    asked = families_of_prompts()
    bins = plan_bins(asked, 2048, 100)
    assert sorted(number for plan in bins for number in plan.prompts) == list(range(len(asked)))
    for plan in bins:
        held = [asked[number] for number in plan.prompts]
        assert all(tuple(ids[: len(plan.shared)]) == plan.shared for ids in held)
        assert plan.longest == max(map(len, held))
    kinds = [(len(plan.prompts), len(plan.shared) > 20, plan.columns) for plan in bins]
    assert any(many >= 6 and shared and columns < 160 for many, shared, columns in kinds)  # the long start
    assert any(many >= 6 and not shared and columns < 120 for many, shared, columns in kinds)  # short prompts
    assert any(many == 1 for many, *_ in kinds)
    assert all(not plan.shared or len(plan.shared) >= 20 for plan in bins)
    assert sum(plan.columns for plan in bins) < sum(map(len, asked)) / 1.5
    assert max(len(plan.prompts) for plan in plan_bins(asked, 2048, 3)) == 3


@pytest.mark.parametrize(("slack", "short"), [(0, 0), (8, 20), (8, 64), (10_000, 0)])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", None), ("mistral", None), ("qwen2", "eager"), ("gemma2", None), ("granite", None)],
)
def test_bins_of_every_kind_decode_as_generate_does(
    family: str, attention: str | None, slack: int, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt to a bin, bins as they come, all in one; rows of a bin end at different steps, and room is added."""
    monkeypatch.setattr(cache, "SLACK", slack)
    monkeypatch.setattr(cache, "SHORT", short)
    monkeypatch.setattr(cache, "ROOM", 3)
    plain, model = tiny(family, attention), tiny(family, attention)
    use_tree_attention(model)
    asked = families_of_prompts()
    free = [wanted(plain, ids, 12, set()) for ids in asked]
    assert generate(model, asked, 12, set()) == free
    common = Counter(token for answer in free for token in answer).most_common()
    stops = {common[0][0], common[len(common) // 2][0]}
    stopped = [wanted(plain, ids, 12, stops) for ids in asked]
    assert len({len(answer) for answer in stopped}) > 2
    assert generate(model, asked, 12, stops) == stopped


def test_bfloat16_goes_through_the_same_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """And chooses tokens that are likeliest in fp32, or all but so."""
    monkeypatch.setattr(cache, "SLACK", 8)
    model = tiny("mistral").bfloat16()
    use_tree_attention(model)
    answers = generate(model, families_of_prompts(), 12, set())
    assert [len(answer) for answer in answers] == [12] * len(answers)
    plain = tiny("mistral").bfloat16().float()
    short = []  # how far each token's logit is from the largest in fp32, in standard deviations over the vocabulary
    for ids, answer in zip(families_of_prompts(), answers, strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        short.append((logits.max(1).values - chosen) / logits.std(1))
    assert torch.cat(short).max() < 0.1


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_row_losses_equal_plain_forward(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PACK_TOKENS", 20)
    plain, model = tiny(family), tiny(family)
    use_tree_attention(model)
    rows = [Row(tuple(ids), tuple(Site(i, (7 * i) % 50 + 3, 1.0, "mle") for i in range(len(ids)))) for ids in prompts()]
    with torch.no_grad():
        expected = [[loss_of_row(plain, list(r.ids), s.position, s.target).item() for s in r.sites] for r in rows]
    for found, each in zip(row_losses(model, rows), expected, strict=True):
        torch.testing.assert_close(found.tolist(), each, rtol=1e-5, atol=1e-5)


def test_a_model_may_name_several_ends(loaded: tuple[Any, Any, LocalTarget], monkeypatch: pytest.MonkeyPatch) -> None:
    """The template's end of turn, and the end tokens of the model's own file: one (or none) or a list of them."""
    _, tokenizer, target = loaded
    for named, expected in ((None, {2}), (5, {2, 5}), ([5, 7], {2, 5, 7})):
        monkeypatch.setattr(target.model.generation_config, "eos_token_id", named)
        assert LocalTarget(target.model, tokenizer, "tiny").stops == expected


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, LocalTarget]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_folder(tmp_path_factory.mktemp("tiny"))
    plain, model = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return plain, tokenizer, LocalTarget(model, tokenizer, "tiny")


def test_responses_are_the_template_continued(loaded: tuple[Any, Any, LocalTarget]) -> None:
    plain, tokenizer, target = loaded
    asked = [ask("How is a rune cut?"), ask("How is a rune cut?", "Step 1:"), Prompt(raw="Step 1: take")]
    for prompt, answer in zip(asked, target.respond(asked, 6), strict=True):
        if prompt.raw is not None:
            text = prompt.raw
        else:
            text = f"<|user|>{prompt.messages[0]['content']}<|end|><|assistant|>{prompt.prefill}"
        made = wanted(plain, tokenizer(text, add_special_tokens=False).input_ids, 6, target.stops)
        assert answer == tokenizer.decode(made, skip_special_tokens=True)


def test_log_likelihood_is_the_mean_over_the_continuation(loaded: tuple[Any, Any, LocalTarget]) -> None:
    plain, tokenizer, target = loaded
    cases = [
        (ask("How?"), "Step 1: take glass", "<|user|>How?<|end|><|assistant|>", "Step 1: take glass"),
        (ask("How?", "Sure:"), "take glass", "<|user|>How?<|end|><|assistant|>Sure:", " take glass"),
        (Prompt(raw="Step 1:\n"), "take", "Step 1:\n", "take"),
    ]
    found = target.log_likelihood([prompt for prompt, *_ in cases], [text for _, text, *_ in cases])
    for value, (_, _, before, after) in zip(found, cases, strict=True):
        first, rest = (tokenizer(text, add_special_tokens=False).input_ids for text in (before, after))
        ids = first + rest
        with torch.no_grad():
            losses = [loss_of_row(plain, ids, i, ids[i + 1]).item() for i in range(len(first) - 1, len(ids) - 1)]
        assert value == pytest.approx(-sum(losses) / len(losses), rel=1e-5)


def test_an_empty_continuation_has_no_likelihood(loaded: tuple[Any, Any, LocalTarget]) -> None:
    with pytest.raises(UsageError, match="empty"):
        loaded[2].log_likelihood([ask("How?")], [""])


def test_an_empty_prompt_is_a_sentence() -> None:
    with pytest.raises(DertaError, match="no tokens"):
        generate(tiny("llama"), [[3, 4], []], 2, set())


def test_a_template_that_writes_before_an_answer_or_never_ends_it_is_refused(
    loaded: tuple[Any, Any, LocalTarget],
) -> None:
    begun = "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %} (thinks){% endif %} {{ m.content }}\n"
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.chat_template = begun + "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(DertaError, match=r"puts ' \(thinks\) ' before an answer"):
        chat_of(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(" (thinks)", "")
    assert chat_of(tokenizer).end == tokenizer.eos_token_id  # the template writes no end of its own
    tokenizer.eos_token = None
    with pytest.raises(DertaError, match="no end-of-turn token"):
        chat_of(tokenizer)
