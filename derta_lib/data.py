"""The records that flow through the library: safety triples, helpful pairs, behaviours to attack with."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from derta_lib.errors import DertaError
from derta_lib.records import read_jsonl


@dataclass(frozen=True)
class Triple:
    """A safety instance (q, r, r̂): harmful query, safe response, harmful response (paper, section 2.2 of version 1)."""

    id: str
    query: str
    safe: str
    harmful: str


@dataclass(frozen=True)
class Pair:
    """A helpful instance: a query and the response to learn."""

    id: str
    query: str
    response: str


@dataclass(frozen=True)
class Behaviour:
    """A request to attack with.

    `declarative` is the text CompletingAttack asks a model to continue; `harmful` a response that gives
    the content, for prefilling ("" where none is known); `benign` marks a twin that ought to be answered; `twin` is the
    id of its counterpart; the corpus's exact judge goes by `category`.
    """

    id: str
    query: str
    declarative: str
    harmful: str = ""
    benign: bool = False
    twin: str = ""
    category: str = ""


Record = TypeVar("Record", Triple, Pair)


def read_records(kind: type[Record], path: Path | str) -> list[Record]:
    """Read a JSONL file of `kind`; a missing, unknown or empty field, one that is not text, or a repeated id names its
    line.
    """
    names = [field.name for field in fields(kind)]
    records: dict[str, Record] = {}
    for number, row in read_jsonl(path, required=names):
        where = f"{path}, line {number}"
        if unknown := sorted(set(row) - set(names)):
            raise DertaError(f"{where}: unknown field '{unknown[0]}'; {kind.__name__} has {', '.join(names)}.")
        if bad := [name for name in names if not isinstance(row[name], str) or not row[name].strip()]:
            raise DertaError(f"{where}: '{bad[0]}' must be text and not empty; mend it or take the line out.")
        if row["id"] in records:
            raise DertaError(f"{where}: the id '{row['id']}' is repeated; ids must be unique.")
        records[row["id"]] = kind(**row)
    return list(records.values())
