"""Chat formatting, in one place: every prompt and response becomes token ids here, by the tokenizer's own template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from derta_lib.errors import DertaError, first_line

PROBE_SYSTEM = "Probe rules"
PROBE_QUERY = "Probe question"
PROBE_ANSWER = "Probe answer"
ONE_DAY = (
    "{% macro strftime_now(form) %}{{ form | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%m', '07') | replace('%Y', '2024') }}{% endmacro %}"
)
"""For a template that asks for today's date (Llama 3.2's): the day that it falls back to, so that a prompt is the same
on every day.
"""


Message = dict[str, str]
"""A turn: its `role` and its `content`."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked to continue.

    A chat (`messages`, with `prefill` as the part of the assistant's answer that is already written), or
    raw text without any chat format (`raw`, for CompletingAttack). Exactly one of `messages` and `raw` is set.
    Messages that end in an answer are a whole conversation, for a template that asks about it (Llama Guard's).
    """

    messages: tuple[Message, ...] = ()
    prefill: str = ""
    raw: str | None = None


def ask(query: str, prefill: str = "") -> Prompt:
    """A single user turn."""
    return Prompt(messages=({"role": "user", "content": query},), prefill=prefill)


@dataclass(frozen=True)
class Chat:
    """How one tokenizer writes a chat, found by executing its template (`chat_of`).

    `lead` is the white space the template puts before an answer, `opening` the text of a generation prompt,
    `end` the id that closes the assistant's turn; `system` tells whether the template prints a system turn (where
    it does not, the system text opens the first user turn).
    Ids are joined, never tokenised again: prompt ids + response ids + end.
    """

    tokenizer: Any
    opening: str
    lead: str
    end: int
    system: bool

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of all that stands before the continuation of a chat."""
        turns = list(prompt.messages)
        if turns[0]["role"] == "system" and not self.system:
            rules, first, *rest = turns
            turns = [{**first, "content": f"{rules['content']}\n\n{first['content']}"}, *rest]
        ids = self._ids(written(self.tokenizer, turns))
        return ids + self.response_ids(prompt.prefill) if prompt.prefill else ids

    def response_ids(self, text: str) -> list[int]:
        """Ids of the assistant's text at the start of its turn, without the end token."""
        merged = self._behind_space if self.opening[-1:].isspace() else self._ids
        return self._after(self.opening, self.lead + text) or merged(text)

    def continuation_ids(self, text: str, previous: int | None) -> list[int]:
        """Ids of `text` as it goes on after the token `previous` (None: at the start of the turn).

        After white space the text follows as it is, after anything else behind a space.
        """
        if previous is None:
            return self.response_ids(text)
        if self.ends_in_space(previous):
            return self._behind_space(text)
        return self._after(".", f" {text}") or self._ids(f" {text}")

    def ends_in_space(self, token: int) -> bool:
        anchor = self._ids(".")
        return self.tokenizer.decode([*anchor, token])[-1:].isspace()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _after(self, anchor: str, text: str) -> list[int]:
        """Ids that `text` adds behind `anchor`; empty when the two merge at the seam."""
        before, both = self._ids(anchor), self._ids(anchor + text)
        return both[len(before) :] if both[: len(before)] == before else []

    def _behind_space(self, text: str) -> list[int]:
        """Ids of `text` behind white space; alone, SentencePiece would give it one more."""
        return self._after("\n", text) or self._ids(text)

    def cut(self, text: str, tokens: int) -> str:
        """The longest start of a response of at most `tokens` tokens that is tokenised to itself."""
        ids = self.response_ids(text)
        for size in range(min(tokens, len(ids)), 0, -1):
            start = self.tokenizer.decode(ids[:size]).removeprefix(self.lead)
            if text.startswith(start) and self.response_ids(start) == ids[:size]:
                return start
        return ""


def written(tokenizer: Any, turns: Sequence[Message], open_answer: bool = True) -> str:
    """The text of `turns` by a tokenizer's own template, and of an answer's opening behind them unless told not to.

    Raises DertaError for a tokenizer without a template, and for a template that fails.
    """
    name = _name(tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise DertaError(
            f"The tokenizer of '{name}' has no chat template; "
            "set tokenizer.chat_template or use an instruction-tuned model."
        )
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = ONE_DAY + template
        return tokenizer.apply_chat_template(
            list(turns), chat_template=template, tokenize=False, add_generation_prompt=open_answer
        )
    except Exception as error:  # a template is a program, and raises what it likes
        raise DertaError(f"The chat template of '{name}' fails ({first_line(error)}); mend the template.") from None


def plain_ids(tokenizer: Any, prompt: Prompt) -> list[int] | None:
    """Ids of a prompt that opens no answer of a chat: raw text, or a whole conversation; None for any other."""
    if prompt.raw is not None:
        whole, bare = (tokenizer(prompt.raw, add_special_tokens=special).input_ids for special in (True, False))
        starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
        # without what the tokenizer puts behind a text, such as its end: the model is to go on
        return whole[: next(starts, 0) + len(bare)]
    if prompt.messages[-1]["role"] == "assistant":
        return tokenizer(written(tokenizer, prompt.messages), add_special_tokens=False).input_ids
    return None


def continued(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids that go on from other text, without special tokens. Alone, some tokenizers' would lose the space
    that they begin with.
    """
    before = tokenizer(".", add_special_tokens=False).input_ids
    return tokenizer.decode([*before, *ids], skip_special_tokens=True).removeprefix(tokenizer.decode(before))


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def chat_of(tokenizer: Any) -> Chat:
    """Find out how a tokenizer writes a chat by executing its template, as TRL does.

    Raises DertaError for a tokenizer without a template, or whose template loses the query or the answer, or
    writes an answer elsewhere than behind its generation prompt.
    """
    name = _name(tokenizer)
    rules = {"role": "system", "content": PROBE_SYSTEM}
    user, answer = {"role": "user", "content": PROBE_QUERY}, {"role": "assistant", "content": PROBE_ANSWER}
    opening, whole = written(tokenizer, [user]), written(tokenizer, [user, answer], open_answer=False)
    if PROBE_QUERY not in opening or PROBE_ANSWER not in whole:
        raise DertaError(f"The chat template of '{name}' does not print what it is given; mend the template.")
    before, tail = whole.split(PROBE_ANSWER, 1)
    if before.startswith(opening):
        lead = before[len(opening) :]
    elif before.rstrip() == opening.rstrip():
        lead = ""  # the generation prompt ends in white space that the template puts nowhere else
    else:
        raise DertaError(
            f"The chat template of '{name}' writes an answer elsewhere than behind its generation prompt, "
            "so training and generation would see different contexts; mend the template."
        )
    if lead.strip():
        raise DertaError(f"The chat template of '{name}' puts {lead!r} before an answer; mend the template.")
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    closing = [token for token in tokenizer(tail, add_special_tokens=False).input_ids if token in special]
    end = closing[0] if closing else tokenizer.eos_token_id
    if end is None:
        raise DertaError(f"The tokenizer of '{name}' has no end-of-turn token; set tokenizer.eos_token.")
    try:
        system = PROBE_SYSTEM in written(tokenizer, [rules, user], open_answer=False)
    except DertaError:  # it refuses such a turn
        system = False
    return Chat(tokenizer, opening, lead, end, system)
