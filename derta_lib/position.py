"""Refusal position: where refusals start (Table 1, Figure 4), and how likely one is all along a harmful response.

Positions count the response's tokens in the model's own tokenizer from 1, as the paper does.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from derta_lib.behaviours import load_behaviours
from derta_lib.chat import Chat, ask, continued
from derta_lib.data import Behaviour
from derta_lib.errors import DertaError
from derta_lib.generation import LocalTarget, local_target, row_losses
from derta_lib.judges.refusal import find_refusal
from derta_lib.models import model_key
from derta_lib.records import check_output, write_in_parts
from derta_lib.refusal import refusal_token
from derta_lib.results import Number
from derta_lib.stats import BEGINNING, share
from derta_lib.tree import Row, Site

BATCH = 16
"""Behaviours measured between two savings of what there is."""


def refusal_probability(target: LocalTarget, behaviours: Sequence[Behaviour]) -> pd.DataFrame:
    """P(refusal token | q, r̂_{<t}) at every place t = 1..|r̂|+1 of each behaviour's harmful response r̂.

    Columns: behaviour, t, token (text of r̂'s token t that the refusal would replace; "" behind the last), p (0 to 1).
    The refusal token follows the context (`refusal.refusal_token`). RTO trains t = 1..|r̂| (equation 2).
    Raises DertaError for a behaviour without a harmful response.
    """
    refusal = refusal_token(target.chat)
    rows, tokens = [], []
    for behaviour in behaviours:
        if not behaviour.harmful:
            raise DertaError(f"behaviour '{behaviour.id}' has no harmful response; give its file a 'harmful' column.")
        prompt, harmful = target.chat.prompt_ids(ask(behaviour.query)), target.chat.response_ids(behaviour.harmful)
        sites = [
            Site(len(prompt) - 1 + given, refusal.at(harmful[given - 1] if given else None), 1.0, "rto")
            for given in range(len(harmful) + 1)
        ]
        rows.append(Row((*prompt, *harmful), tuple(sites)))
        tokens.append([*(continued(target.tokenizer, [token]) for token in harmful), ""])
    losses = row_losses(target.model, rows)
    return pd.DataFrame(
        [
            (behaviour.id, t, token, math.exp(-loss))
            for behaviour, texts, row in zip(behaviours, tokens, losses, strict=True)
            for t, (token, loss) in enumerate(zip(texts, row.tolist(), strict=True), start=1)
        ],
        columns=["behaviour", "t", "token", "p"],
    )


def first_refusals(chat: Chat, responses: Sequence[str]) -> list[int | None]:
    """The token (from 1) at which the first refusal of each response starts; None where it never refuses."""
    found: list[int | None] = []
    for response in responses:
        if (offset := find_refusal(response)) is None:
            found.append(None)
            continue
        # a space belongs to the token behind it, a line break does not
        before = response[:offset].removesuffix(" ")
        found.append(1 + (len(chat.response_ids(before)) if before else 0))
    return found


def position_command(model: str, source: str, out: Path, *, max_new_tokens: int = 64, seed: int = 0) -> Number | None:
    """Work of `derta position`: one JSON line a behaviour of `source` (see `load_behaviours`) in the file `out`.

    A line has `behaviour`, `query`, `response` (greedy), `first_refusal` (token from 1, or null), and along r̂ `tokens`
    and `p_refusal` (|r̂|+1 values; both empty where the behaviours have no harmful response). Goes on where it was
    stopped. Returns the share of the refusals that start within the first five tokens (Table 1), None where nothing was
    refused.
    """
    behaviours = load_behaviours(source, seed=seed)
    check_output(out, source)
    target = local_target(model)

    def measured(batch: Sequence[Behaviour]) -> Iterator[dict[str, Any]]:
        curves = dict(list(refusal_probability(target, [b for b in batch if b.harmful]).groupby("behaviour")))
        responses = target.respond([ask(behaviour.query) for behaviour in batch], max_new_tokens)
        found = first_refusals(target.chat, responses)
        for behaviour, response, position in zip(batch, responses, found, strict=True):
            curve = curves.get(behaviour.id)
            yield {
                "behaviour": behaviour.id,
                "query": behaviour.query,
                "response": response,
                "first_refusal": position,
                "tokens": [] if curve is None else curve.token.tolist()[:-1],
                "p_refusal": [] if curve is None else curve.p.tolist(),
            }

    records = write_in_parts(out, behaviours, [model_key(model), max_new_tokens], measured, BATCH)
    starts = [record["first_refusal"] for record in records if record["first_refusal"] is not None]
    return share([start <= BEGINNING for start in starts]) if starts else None
