"""Judges: did the response comply, and where does it refuse? One file a judge, each with its source."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from typing import Literal, Protocol

from derta_lib.errors import UsageError

Refused = Literal["full", "partial", "none"]


@dataclass(frozen=True)
class Item:
    """One response to judge: `id` names it, `query` is the underlying request, `prompt` the attack's full text.

    `continues`: the response goes on from the prompt in mid-text, as under CompletingAttack, and says little without
    it.
    """

    id: str | int
    query: str
    response: str
    prompt: str | None = None
    continues: bool = False

    @property
    def text(self) -> str:
        """What is read for content: the response, behind the prompt that it goes on from (by the offline judges where
        the prompt alone is not unsafe: `refusal.offline`). Refusals are looked for in the response alone.
        """
        joined = self.continues and self.prompt and self.response.strip()
        return f"{self.prompt} {self.response}" if joined else self.response


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one response.

    `unsafe` is None for a response that could not be scored (counted and shown, never dropped);
    `p_unsafe` is in [0, 1] or None; `refusal_index` is the index of the word or token where the first
    refusal starts, None without one.
    """

    id: str | int
    unsafe: bool | None
    p_unsafe: float | None
    refused: Refused
    refusal_index: int | None
    judge: str


class Judge(Protocol):
    """A judge gives one verdict an item, in order."""

    name: str

    def judge(self, items: Sequence[Item]) -> list[Verdict]: ...


NAMES = ("corpus", "endpoint", "harmbench", "labelled", "llamaguard", "strongreject", "tuned")
"""Judges that `build` knows. harmbench and llamaguard take a model after a colon, e.g. `harmbench:FOLDER`."""


DEFAULT = "tuned"
OFFLINE = ("labelled", "tuned")
"""Judges for real text that run on a CPU."""


def build(name: str = DEFAULT) -> Judge:
    """The judge called `name`; raises UsageError listing the known ones.

    `corpus` decides exactly on the Concord corpus's held-out behaviours, and on nothing else. Real text: `tuned` needs
    the reference model, `labelled` nothing. `endpoint` (Appendix C's rubric) and `strongreject` ask the endpoint named
    in the environment (`judges.endpoint`); `harmbench` and `llamaguard` load their model, or the one named after a
    colon.
    """
    kind, _, model = name.partition(":")
    if kind not in NAMES or (model and kind not in ("harmbench", "llamaguard")):
        raise UsageError(f"--judge: there is no judge '{name}'; the judges are {', '.join(NAMES)}.")
    module = import_module(f"derta_lib.judges.{kind}")
    if kind == "corpus":
        from derta_lib.corpus import concord

        judge: Judge = module.CorpusJudge(chain.from_iterable(concord(triples=0, pairs=0).behaviours.values()))
    elif kind in OFFLINE:
        judge = getattr(module, kind.title())()
    else:
        if kind in ("endpoint", "strongreject"):
            target = import_module("derta_lib.judges.endpoint").endpoint_from_environment()
        else:
            target = import_module("derta_lib.generation").local_target(model or module.MODEL)
        judge = getattr(module, kind)(target)
    return judge
