"""The refusal explorer: data for a page that needs no kernel and no network.

A notebook calls `write(run.folder, build_data(measure(...)))`, which makes `runs/<name>/explorer.js`. The book's build
copies it to `_static/explorer-data.js` of the staged source, and `book/_static/explorer.js` draws it on the page that
holds the `{explorer}` directive. All texts are put into the page by `textContent`, never as markup.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from derta_lib.data import Behaviour
from derta_lib.display import visible
from derta_lib.errors import DertaError
from derta_lib.records import write_text
from derta_lib.style import METHODS

FIELDS = ("query_id", "query", "tokens", "method", "p_refusal", "continuations")


def measure(
    models: Mapping[str, str], behaviours: Sequence[Behaviour], depths: Sequence[int], max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """A record for each of `models` (method -> checkpoint) and each behaviour.

    A model goes on after those `depths` (tokens of r̂) that r̂ reaches, with `max_new_tokens` tokens. Raises DertaError
    for a behaviour without a harmful response r̂.
    """
    from derta_lib.chat import ask
    from derta_lib.generation import local_target
    from derta_lib.position import refusal_probability

    for method, model in models.items():
        target = local_target(model)
        measured = refusal_probability(target, behaviours)
        curves = [measured[measured.behaviour == b.id].iloc[:-1] for b in behaviours]  # the last place is behind r̂
        reached = [[depth for depth in depths if depth <= len(curve)] for curve in curves]
        starts = [
            ask(b.query, target.chat.cut(b.harmful, d)) for b, of in zip(behaviours, reached, strict=True) for d in of
        ]
        said = iter(target.respond(starts, max_new_tokens))
        for behaviour, curve, of in zip(behaviours, curves, reached, strict=True):
            yield {
                "query_id": behaviour.id,
                "query": behaviour.query,
                "method": method,
                "tokens": curve.token.tolist(),
                "p_refusal": curve.p.tolist(),
                "continuations": {depth: next(said) for depth in of},
            }


def build_data(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Join one record a (query, method) into what the page draws.

    Record: `query_id`; `query`; `tokens`, the harmful response r̂ as texts of its tokens; `method`; `p_refusal`, for
    each t in 0..|r̂|-1 the probability P(refusal token | q, r̂_{<t}) that a refusal starts in place of token t; and
    `continuations`, depth d -> what the model says when it goes on after the first d tokens of r̂.
    Raises DertaError naming the record when a field is missing, lengths differ, a probability is none, a pair is
    repeated, or the methods of one query do not share tokens and depths.
    """
    queries: dict[str, dict[str, Any]] = {}
    for number, record in enumerate(records, start=1):
        where = f"explorer record {number}"
        if missing := [name for name in FIELDS if name not in record]:
            raise DertaError(f"{where}: the field '{missing[0]}' is missing.")
        method, tokens, chances = record["method"], list(record["tokens"]), list(record["p_refusal"])
        if method not in METHODS:
            raise DertaError(f"{where}: the method '{method}' is not known; the methods are {', '.join(METHODS)}.")
        depths = sorted(int(depth) for depth in record["continuations"])
        if not tokens or len(tokens) != len(chances):
            raise DertaError(
                f"{where}: {len(tokens)} tokens but {len(chances)} probabilities; give one for each token."
            )
        if not all(math.isfinite(chance) and 0 <= chance <= 1 for chance in chances):
            raise DertaError(f"{where}: 'p_refusal' holds a value that is not between 0 and 1.")
        if not depths or depths[0] < 0 or depths[-1] > len(tokens):
            raise DertaError(f"{where}: continuations need depths from 0 to {len(tokens)}, found {depths}.")
        entry = {"text": visible(record["query"]), "tokens": [visible(token) for token in tokens], "depths": depths}
        query = queries.setdefault(record["query_id"], {"id": record["query_id"], **entry, "runs": {}})
        if any(query[key] != value for key, value in entry.items()):
            raise DertaError(f"{where}: query, tokens or depths differ from those of another method of the same query.")
        if method in query["runs"]:
            raise DertaError(f"{where}: the query '{record['query_id']}' has a second record for '{method}'.")
        texts = {int(depth): visible(text) for depth, text in record["continuations"].items()}
        query["runs"][method] = {"p": [round(chance, 4) for chance in chances], "goes_on": [texts[d] for d in depths]}
    if not queries:
        raise DertaError("The explorer has no records; run the notebook that measures refusal along harmful responses.")
    names = [name for name in METHODS if any(name in query["runs"] for query in queries.values())]
    return {
        "methods": [{"name": name, "label": METHODS[name].label} for name in names],
        "queries": list(queries.values()),
    }


def script(data: dict[str, Any]) -> str:
    """The data as a script, so that it loads from file:// too; nothing in it can end a <script> or a line."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"window.DERTA_EXPLORER={text};\n"


def write(folder: Path | str, data: dict[str, Any]) -> Path:
    """Write `explorer.js` in a run's folder."""
    return write_text(Path(folder) / "explorer.js", script(data))
