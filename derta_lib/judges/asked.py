"""Judges that ask a model: what they share. A file each holds the judge's prompt and how its answer is read."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from derta_lib.chat import Prompt, ask
from derta_lib.judges import Item, Verdict
from derta_lib.judges.refusal import scored
from derta_lib.target import Target

_TAG = re.compile(r"<(?=/?\s*(?:request|response)\s*>)", re.IGNORECASE)


def ask_about(item: Item, rules: str) -> Prompt:
    """`rules` and the item between tags, which its own texts can neither open nor close."""
    query, response = (_TAG.sub("< ", text) for text in (item.query, item.text))
    return ask(f"{rules}\n<request>\n{query}\n</request>\n\n<response>\n{response}\n</response>")


@dataclass(frozen=True)
class AskedJudge:
    """Puts `prompt(item)` to `target` and reads the answer with `parse`: a p_unsafe in [0, 1], or None.

    An answer that cannot be parsed, and an item with an empty query (which is not asked), are unscored.
    """

    name: str
    target: Target
    prompt: Callable[[Item], Prompt]
    parse: Callable[[str], float | None]
    max_new_tokens: int

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        asked = [item for item in items if item.query.strip()]
        answers = iter(self.target.respond([self.prompt(item) for item in asked], self.max_new_tokens))
        return [scored(item, self.parse(next(answers)) if item.query.strip() else None, self.name) for item in items]
