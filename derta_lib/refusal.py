"""The refusal token: derived from tokenizer and context, never a literal id."""

from dataclasses import dataclass

from derta_lib.chat import Chat

REFUSAL = "Sorry"


@dataclass(frozen=True)
class RefusalToken:
    """First token of the refusal word in each context in which a response can break off.

    `start`: at the start of the assistant's turn; `after_space`: behind white space; `after_text`: behind
    anything else, where the word comes with its space. Where a tokenizer splits the word, RTO targets the first piece,
    and MLE with a prefix teaches how it goes on; without a prefix (method `rto`) nothing does in mid-response.
    """

    chat: Chat
    start: int
    after_space: int
    after_text: int

    def at(self, previous: int | None) -> int:
        """The refusal token behind the token `previous` of a response (None: at its start)."""
        if previous is None:
            return self.start
        return self.after_space if self.chat.ends_in_space(previous) else self.after_text


def refusal_token(chat: Chat, word: str = REFUSAL) -> RefusalToken:
    """The `fixed` rule: the token follows the context, so that a refusal is never glued to the text before it."""
    newline, period = (chat.tokenizer(text, add_special_tokens=False).input_ids[-1] for text in ("\n", "."))
    return RefusalToken(
        chat=chat,
        start=chat.continuation_ids(word, None)[0],
        after_space=chat.continuation_ids(word, newline)[0],
        after_text=chat.continuation_ids(word, period)[0],
    )


def bare_refusal_token(chat: Chat) -> RefusalToken:
    """The authors' rule: the token of the bare word in every context (id 19701 for LLaMA-3)."""
    token = chat.continuation_ids(REFUSAL, None)[0]
    return RefusalToken(chat, token, token, token)
