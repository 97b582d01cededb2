"""Judging a file: JSONL in, JSONL out, one line a line, nothing written before every line is read."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from derta_lib.errors import DertaError
from derta_lib.judges import DEFAULT, Item, build
from derta_lib.judges.endpoint import Endpoint
from derta_lib.models import model_key
from derta_lib.records import check_output, read_jsonl, write_in_parts

PART = 64
"""Responses judged between two savings of what there is."""


def read_items(path: Path | str) -> list[Item]:
    """The items of a JSONL file: keys id (text or a whole number), query and response, and optionally prompt, all text;
    `continues` (true or false, by default false) says that the response goes on from the prompt in mid-text.

    Other keys are left alone, so that the file `derta attack` writes can be judged as it is. Raises DertaError
    naming file and line for invalid JSON, a blank line, a missing or mistyped key or a repeated id.
    """
    items: list[Item] = []
    seen: dict[str | int, int] = {}
    for number, row in read_jsonl(path, required=("id", "query", "response")):
        where = f"{path}, line {number}"
        if number > len(items) + 1:
            raise DertaError(f"{path}, line {len(items) + 1}: a blank line; each line is a response, so take it out.")
        optional = () if row.get("prompt") is None else ("prompt",)
        if type(row["id"]) not in (str, int):
            raise DertaError(f"{where}: 'id' must be text or a whole number, found {type(row['id']).__name__}.")
        for key in ("query", "response", *optional):
            if not isinstance(row[key], str):
                raise DertaError(f"{where}: '{key}' must be text, found {type(row[key]).__name__}.")
        continues = False if row.get("continues") is None else row["continues"]
        if not isinstance(continues, bool):
            raise DertaError(f"{where}: 'continues' must be true or false, found {type(continues).__name__}.")
        if continues and not row.get("prompt"):
            raise DertaError(f"{where}: 'continues' is true, but there is no 'prompt' that the response goes on from.")
        if row["id"] in seen:
            raise DertaError(
                f"{where}: the id '{row['id']}' stands on line {seen[row['id']]} already; ids must differ."
            )
        seen[row["id"]] = number
        items.append(Item(row["id"], row["query"], row["response"], row.get("prompt"), continues))
    return items


def judge_file(in_path: Path | str, out_path: Path | str, judge_name: str = DEFAULT) -> dict[str, int]:
    """Judge every line of `in_path` and write the verdicts, in order, to `out_path`; goes on where it was stopped.

    Returns counts: n, unsafe, unscored. Raises DertaError for a line that cannot be read, and UsageError for an unknown
    judge, before anything is written.
    """
    items = read_items(in_path)
    check_output(out_path, in_path)
    judge = build(judge_name)
    model = judge_name.partition(":")[2]
    target = getattr(judge, "target", None)
    asked = [target.url, target.name] if isinstance(target, Endpoint) else []

    def verdicts(part: Sequence[Item]) -> Iterator[dict[str, Any]]:
        return map(asdict, judge.judge(part))

    found = write_in_parts(out_path, items, [judge_name, model and model_key(model), asked], verdicts, PART)
    return {
        "n": len(found),
        "unsafe": sum(verdict["unsafe"] is True for verdict in found),
        "unscored": sum(verdict["unsafe"] is None for verdict in found),
    }
