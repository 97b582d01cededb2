"""The refusal explorer: data for a page that needs no kernel and no network.

A notebook calls `write(run.folder, measure(...))`, which makes `runs/<name>/explorer.js`. The book's build
copies it to `_static/explorer-data.js` of the staged source, and `book/_static/explorer.js` draws it on the page that
holds the `{explorer}` directive. All texts are put into the page by `textContent`, never as markup.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from derta_lib.data import Behaviour
from derta_lib.display import visible
from derta_lib.records import write_text
from derta_lib.style import METHODS


def measure(
    models: Mapping[str, str], behaviours: Sequence[Behaviour], depths: Sequence[int], max_new_tokens: int
) -> dict[str, Any]:
    """What the page draws, for `models` (method -> checkpoint) and behaviours: their harmful responses r̂, and for each
    method P(refusal token | q, r̂_{<t}) at every t and what it says after those `depths` (tokens of r̂) that r̂ reaches.

    The models share a tokenizer. Raises DertaError for a behaviour without r̂.
    """
    from derta_lib.chat import ask
    from derta_lib.generation import local_target
    from derta_lib.position import refusal_probability

    queries: dict[str, dict[str, Any]] = {}
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
            query = {"id": behaviour.id, "text": visible(behaviour.query), "depths": of, "runs": {}}
            query["tokens"] = [visible(token) for token in curve.token]
            queries.setdefault(behaviour.id, query)["runs"][method] = {
                "p": curve.p.round(4).tolist(),
                "goes_on": [visible(next(said)) for _ in of],
            }
    names = [name for name in METHODS if name in models]
    return {
        "methods": [{"name": name, "label": METHODS[name].label} for name in names],
        "queries": list(queries.values()),
    }


def write(folder: Path | str, data: dict[str, Any]) -> Path:
    """Write `explorer.js` in a run's folder: a script, so that it loads from file:// too.

    Nothing in it can end a <script> or a line.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return write_text(Path(folder) / "explorer.js", f"window.DERTA_EXPLORER={text};\n")
