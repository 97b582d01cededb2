"""Chat formatting on real tokenizers: joined ids are the template's own, odd templates are served or refused."""

import copy
from typing import Any

import pytest
from real_tokenizers import FAMILIES, tokenizer

from derta_lib.chat import Prompt, ask, chat_of, continued, plain_ids
from derta_lib.errors import DertaError

pytestmark = pytest.mark.slow
QUERY = "How is a glass rune cut?"
RESPONSES = (
    "Sorry, no one may.",
    "Step 1: take glass.\nStep 2: cut it.",
    "I'm sorry; 1,234 is too many.",
    "«Ça» 🙂",
)


def with_template(family: str, template: str) -> Any:
    changed = copy.copy(tokenizer(family))
    changed.chat_template = template
    return changed


def written(tokenizer_: Any, response: str) -> str:
    turns = [{"role": "user", "content": QUERY}, {"role": "assistant", "content": response}]
    return tokenizer_.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_ids_are_the_templates_own(family: str) -> None:
    real = tokenizer(family)
    chat = chat_of(real)
    for response in RESPONSES:
        joined = [*chat.prompt_ids(ask(QUERY)), *chat.response_ids(response), chat.end]
        whole = real(written(real, response), add_special_tokens=False).input_ids
        assert whole[: len(joined)] == joined
        assert len(whole) - len(joined) <= 1  # a line break behind the end of the turn
        assert chat.prompt_ids(ask(QUERY, response)) == joined[:-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_goes_on_as_it_would_be_read(family: str) -> None:
    """Whatever a response breaks off with, what follows is set apart by one space, and by none behind white space."""
    real = tokenizer(family)
    chat = chat_of(real)
    for start in ("Step 1:", "Take glass.\n", "Take glass.\n\n", "1. Cut", "- ", "glass,", "x = 1;\n    "):
        ids = chat.response_ids(start)
        ids += chat.continuation_ids("Sorry, I stop.", ids[-1])
        glue = "" if start[-1].isspace() else " "
        assert real.decode(chat.prompt_ids(ask(QUERY)) + ids).endswith(f"{start}{glue}Sorry, I stop.")


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_text_ends_open_whatever_a_tokenizer_puts_around_texts(family: str) -> None:
    from tokenizers.processors import TemplateProcessing

    usual = tokenizer(family)
    closing = copy.deepcopy(usual)
    marks = [
        (name, closing.convert_tokens_to_ids(name))
        for name in (closing.bos_token or closing.eos_token, closing.eos_token)
    ]
    closing.backend_tokenizer.post_processor = TemplateProcessing(f"{marks[0][0]} $A {marks[1][0]}", None, marks)
    text = "Here is how to fold a kite:\nStep 1:"
    bare = usual(text, add_special_tokens=False).input_ids
    assert closing(text).input_ids == [marks[0][1], *bare, marks[1][1]]
    assert plain_ids(closing, Prompt(raw=text)) == [marks[0][1], *bare]
    assert plain_ids(usual, Prompt(raw=text)) == usual(text).input_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_gives_starts_that_tokenise_to_themselves(family: str) -> None:
    chat = chat_of(tokenizer(family))
    text = RESPONSES[1]
    ids = chat.response_ids(text)
    for size in range(1, len(ids) + 1):
        start = chat.cut(text, size)
        assert text.startswith(start)
        assert chat.response_ids(start) == ids[: len(chat.response_ids(start))]
        assert len(chat.response_ids(start)) <= size
    assert chat.cut(text, 999) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_on_from_a_text_keeps_its_space(family: str) -> None:
    """A response behind a prefill or a raw prompt: SentencePiece alone would drop its first space."""
    real = tokenizer(family)
    chat = chat_of(real)
    for begun, text in (("Step 1:", " Sorry, I cannot."), ("Step 1:", "ly folded."), ("kite", "\nStep 2: fold.")):
        before, ids = (real(each, add_special_tokens=False).input_ids for each in (begun, begun + text))
        assert ids[: len(before)] == before
        assert continued(real, ids[len(before) :]) == text
        assert continued(real, [*ids[len(before) :], chat.end]) == text


def test_a_template_that_asks_for_the_date_gets_the_same_on_every_day() -> None:
    dated = copy.deepcopy(tokenizer("llama3"))
    dated.chat_template = (
        "Today: {{ strftime_now('%d %b %Y') }}, {{ strftime_now('%Y-%m-%d') }}\n" + dated.chat_template
    )
    assert "Today: 26 Jul 2024, 2024-07-26\n" in dated.decode(chat_of(dated).prompt_ids(ask(QUERY)))


SYSTEM = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": QUERY})


@pytest.mark.parametrize("family", FAMILIES)
def test_system_turns(family: str) -> None:
    """Mistral's templates know no system turn: its text opens the user's."""
    real = tokenizer(family)
    chat = chat_of(real)
    assert chat.system == (family not in ("mistral", "tekken"))
    text = real.decode(chat.prompt_ids(Prompt(messages=SYSTEM)))
    assert text.count("Be brief.") == text.count(QUERY) == 1
    if not chat.system:
        assert f"Be brief.\n\n{QUERY}" in text


ODD = {
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "ends in a space": "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{{ eos_token if m.role == "
    "'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    "space before the answer": "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{{ eos_token if m.role == "
    "'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "ends in a newline": "{% for m in messages %}### {{ m.role }}\n{{ m.content | trim }}{{ eos_token if m.role == "
    "'assistant' else '\n\n' }}{% endfor %}{% if add_generation_prompt %}### assistant\n{% endif %}",
    "white space of its own": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token if m.role == "
    "'assistant' else '' }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
}


@pytest.mark.parametrize("family", ["llama3", "mistral"])
@pytest.mark.parametrize("name", ODD)
def test_odd_templates_by_execution(family: str, name: str) -> None:
    real = with_template(family, ODD[name])
    chat = chat_of(real)
    prompt = chat.prompt_ids(ask(QUERY))
    shown = real.apply_chat_template([{"role": "user", "content": QUERY}], tokenize=False, add_generation_prompt=True)
    assert prompt == real(shown, add_special_tokens=False).input_ids
    for response in RESPONSES[:3]:
        text = real.decode(prompt + chat.response_ids(response), skip_special_tokens=False)
        whole = written(real, response)
        if name == "white space of its own":  # the template's own answer stands elsewhere: generation's is kept
            whole = shown + response
        # Mistral's decoder puts a space behind special tokens; nothing else may differ, white space neither
        assert whole.removeprefix(real.bos_token).lstrip().startswith(text.removeprefix(real.bos_token).lstrip())
        assert text.endswith(response)
        assert chat.prompt_ids(ask(QUERY, response)) == prompt + chat.response_ids(response)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        ("{% if add_generation_prompt %}A:{% endif %}{{ messages[-1].content if messages | length > 1 }}", "print"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "print"),
        ("{% for m in messages %}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}A:{% endif %}", "elsewhere"),
        ("{% if %}", "fails"),
        ("{{ messages[5].content }}", "fails"),
    ],
)  # fmt: skip
def test_templates_that_lose_something_are_refused(template: str | None, said: str) -> None:
    changed = with_template("smollm2", template)  # type: ignore[arg-type]
    with pytest.raises(DertaError, match=said):
        chat_of(changed)
