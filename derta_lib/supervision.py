"""Supervision: what a safety triple or a helpful pair asks of the model, as rows of tokens with sites.

Every method of the paper is a composition of two terms (equation 2):

    L(θ) = −E log P(r | q, r̂_{<k}) − λ E Σ_{t=1..|r̂|} log P(sorry | q, r̂_{<t})

`Encoder.mle` is the first, with k uniform in 0..|r̂| (methods with a prefix) or k = 0 (equation 1); `Encoder.rto` the
second.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from derta_lib.chat import Chat, ask
from derta_lib.data import Pair, Triple
from derta_lib.errors import DertaError, UsageError, check_known
from derta_lib.refusal import RefusalToken, bare_refusal_token, refusal_token
from derta_lib.tree import Row, Site


@dataclass(frozen=True)
class Preset:
    """How the two terms are weighed and where the two meet.

    `keep`: share of RTO sites kept, and `weight`: λ. `mean` is the loss's denominator: 'mle' counts MLE sites
    (then kept RTO sites weigh λ / keep: an unbiased estimate of λ times equation 2's sum, but for a fork that MLE has),
    'sites' counts every site with weight 1 (the authors' token mean). `glued` takes the bare refusal token everywhere.
    `both_at_fork` leaves RTO's target at position k, where MLE asks for r's first token: two targets for one
    context. The default gives that context to MLE alone. Raises UsageError for numbers that no loss could have.
    """

    keep: float
    weight: float
    mean: str
    glued: bool
    both_at_fork: bool

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UsageError(f"keep is {self.keep}; it is the share of RTO sites kept, above 0 and at most 1.")
        if not 0 <= self.weight < math.inf:
            raise UsageError(f"the weight λ is {self.weight}; it must be 0 or more and finite.")
        check_known("mean", self.mean, ("mle", "sites"))


PRESETS = {
    "fixed": Preset(keep=0.15, weight=0.15, mean="mle", glued=False, both_at_fork=False),
    "paper": Preset(keep=0.05, weight=1.0, mean="sites", glued=True, both_at_fork=True),
    "paper-lora": Preset(keep=1.0, weight=1.0, mean="sites", glued=True, both_at_fork=True),
}


def preset(name: str) -> Preset:
    """The preset of that name; raises UsageError for an unknown one."""
    check_known("preset", name, PRESETS)
    return PRESETS[name]


@dataclass(frozen=True)
class Method:
    """A composition: MLE with or without a harmful prefix, with or without RTO; `triples` per instance pair."""

    prefix: bool
    rto: bool
    triples: int


METHODS = {
    "vanilla": Method(prefix=False, rto=False, triples=2),
    "vanilla_half": Method(prefix=False, rto=False, triples=1),
    "harmful_prefix": Method(prefix=True, rto=False, triples=1),
    "recaug": Method(prefix=True, rto=False, triples=2),
    "rto": Method(prefix=False, rto=True, triples=1),
    "derta": Method(prefix=True, rto=True, triples=1),
}
"""The paper counts a triple trained with both terms as two instances, so a baseline sees `triples` = 2 where DeRTa sees
one; its ablations drop a term and keep DeRTa's data.
"""


SEAM = 2
"""Tokens by which r may grow where it goes on behind r̂ instead of opening a turn."""


class Encoder:
    """Turns triples and pairs into supervised rows for one tokenizer, counting what had to be cut.

    `max_length` bounds a row. Texts are cut at their right end: r̂ to what r leaves it, but never below half of
    the room behind the prompt, then r; a cut response gets no end token. A row whose prompt alone is too long is
    refused. `report` counts rows, and cuts by kind. Raises UsageError for an unknown method.
    """

    def __init__(self, chat: Chat, method: str, preset: Preset, max_length: int) -> None:
        check_known("method", method, METHODS)
        self.chat, self.method, self.preset, self.max_length = chat, METHODS[method], preset, max_length
        self.refusal: RefusalToken = bare_refusal_token(chat) if preset.glued else refusal_token(chat)
        self.report: Counter[str] = Counter()

    def rows(self, example: Triple | Pair, seed: str) -> list[Row]:
        """Rows of one example; the draws of k and of the kept sites follow from `seed` alone.

        Raises DertaError for an empty r̂ or r, or a query that leaves no room behind it.
        """
        prompt, room = self.prompt(example)
        if isinstance(example, Pair):
            response = self.response("response", example.id, example.response)
            self.count_cut("response", len(response), room)
            return [self._supervised(prompt, response)]
        rng = random.Random(seed)
        harmful = self.response("harmful response", example.id, example.harmful)
        safe = self.response("safe response", example.id, example.safe)
        left = max(room // 2, room - len(safe) - SEAM)
        self.count_cut("harmful response", len(harmful), left)
        harmful = harmful[:left]
        k = rng.randint(0, len(harmful)) if self.method.prefix else 0
        rows = [self.mle(prompt, harmful, k, example.safe)]
        return [*rows, self.rto(prompt, harmful, k, rng)] if self.method.rto else rows

    def mle(self, prompt: Sequence[int], harmful: Sequence[int], k: int, safe: str) -> Row:
        """−log P(r | q, r̂_{<k}) over the tokens of r and its end token; r's ids depend on what it follows."""
        before = (*prompt, *harmful[:k])
        response = self.chat.continuation_ids(safe, harmful[k - 1] if k else None)
        self.count_cut("safe response", len(response), self.max_length - len(before))
        return self._supervised(before, response)

    def rto(self, prompt: Sequence[int], harmful: Sequence[int], k: int, rng: random.Random) -> Row:
        """−log P(sorry | q, r̂_{<t}) for t = 1..|r̂|, on a random share `keep` of the response's own tokens.

        Exactly m = max(1, round(keep · n)) of the n sites are drawn without replacement and weigh λ · n / m, so the
        sum is unbiased and no triple loses all of its sites. For the token mean they weigh λ and add m to the
        denominator. Unless the preset has both at the fork, the context r̂_{<k} is left to MLE, if it is not the only
        one.
        """
        everywhere = range(len(harmful))
        sites = [t for t in everywhere if t != k or self.preset.both_at_fork] or everywhere
        kept = sorted(rng.sample(sites, max(1, round(self.preset.keep * len(sites)))))
        counted = self.preset.mean == "sites"
        weight = self.preset.weight if counted else self.preset.weight * len(sites) / len(kept)
        return Row(
            ids=(*prompt, *harmful),
            sites=tuple(
                Site(len(prompt) - 1 + t, self.refusal.at(harmful[t - 1] if t else None), weight, "rto") for t in kept
            ),
            count=float(len(kept)) if counted else 0.0,
        )

    def _supervised(self, before: Sequence[int], response: Sequence[int]) -> Row:
        """MLE sites over a response and its end token behind `before`; a response cut at `max_length` has no end."""
        room = self.max_length - len(before)
        targets = [*response[:room], self.chat.end] if len(response) <= room else response[:room]
        start = len(before) - 1
        return Row(
            ids=(*before, *response[:room]),
            sites=tuple(Site(start + i, target, 1.0, "mle") for i, target in enumerate(targets)),
            count=float(len(targets)),
        )

    def prompt(self, example: Triple | Pair) -> tuple[tuple[int, ...], int]:
        """Ids of an example's query, counted as a row, and the tokens left behind them.

        Raises DertaError where those are less than two.
        """
        prompt = tuple(self.chat.prompt_ids(ask(example.query)))
        self.report["rows"] += 1
        room = self.max_length - len(prompt)
        if room < 2:
            raise DertaError(
                f"'{example.id}': its query takes {len(prompt)} tokens of max_length {self.max_length}; "
                "raise max_length."
            )
        return prompt, room

    def response(self, what: str, name: str, text: str) -> list[int]:
        """Ids of a response, whole. Raises DertaError for an empty one, by what it is and its example's name."""
        ids = self.chat.response_ids(text) if text.strip() else []
        if not ids:
            raise DertaError(f"'{name}': its {what} is empty; give it text or take it out of the data.")
        return ids

    def count_cut(self, what: str, length: int, room: int) -> None:
        if length > room:
            self.report[f"{what} cut at its right end"] += 1
