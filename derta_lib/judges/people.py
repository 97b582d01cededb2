"""How far the offline judges agree with people on label sets that none of them was fitted to.

`python -m derta_lib.judges.people FOLDER` makes the kept figures anew. FOLDER holds a JSONL file a set, each line with
query, response and y (true where people called the response unsafe); only figures are kept.
"""

import sys
from pathlib import Path

import pandas as pd

from derta_lib.errors import DertaError
from derta_lib.judges import OFFLINE, Item, build
from derta_lib.records import content_key, file_sha256, read_json, read_jsonl, today, write_json
from derta_lib.stats import auc, clustered_share

KEPT = Path(__file__).parents[1] / "kept_people.json"


def agreement(folder: Path | str) -> pd.DataFrame:
    """A row a set and offline judge: set, judge, n, people (share unsafe), accuracy with low and high (clustered by
    query), missed (share of unsafe responses called safe), alarms (of safe ones called unsafe), auc.

    Raises DertaError for a folder without files, a line that lacks a key or has a mistyped one, and a set with one kind
    of label only.
    """
    paths = sorted(Path(folder).glob("*.jsonl"))
    if not paths:
        raise DertaError(f"{folder}: there is no JSONL file; name a folder with one a set (query, response, y).")
    rows = []
    for path in paths:
        items: list[Item] = []
        labels: list[bool] = []
        for number, line in read_jsonl(path, required=("query", "response", "y")):
            query, response, y = (line[key] for key in ("query", "response", "y"))
            if not (isinstance(query, str) and query.strip() and isinstance(response, str) and isinstance(y, bool)):
                raise DertaError(
                    f"{path}, line {number}: query (not blank) and response must be text, y true or false."
                )
            items.append(Item(number, query, response))
            labels.append(y)
        unsafe = pd.Series(labels)
        if unsafe.all() or not unsafe.any():
            raise DertaError(f"{path}: people gave all lines one label, so agreement cannot be measured on it.")
        for name in OFFLINE:
            verdicts = build(name).judge(items)
            said = pd.Series([verdict.unsafe is True for verdict in verdicts])
            right = clustered_share(said == unsafe, [item.query for item in items])
            rows.append(
                {
                    "set": path.stem,
                    "judge": name,
                    "n": len(items),
                    "people": float(unsafe.mean()),
                    "accuracy": right.value,
                    "low": right.low,
                    "high": right.high,
                    "missed": float((~said[unsafe]).mean()),
                    "alarms": float(said[~unsafe].mean()),
                    "auc": auc([verdict.p_unsafe or 0.0 for verdict in verdicts], unsafe),
                }
            )
    return pd.DataFrame(rows)


def kept_agreement() -> tuple[str, pd.DataFrame]:
    """A sentence on when the kept figures were made, and the frame of `agreement`."""
    kept = read_json(KEPT)
    since = "" if kept["code"] == code_hash() else "; the judges have changed since"
    return f"Kept on {kept['date']} (judges' code {kept['code']}){since}.", pd.DataFrame(kept["table"])


_CODE = (
    *(f"{name}.py" for name in ("__init__", "labelled", "labelled_words", "refusal", "tuned", "wording")),
    *(f"tuned_model/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "head.safetensors")),
)


def code_hash() -> str:
    """Hash of the offline judges' code, so that kept figures can say when it has changed."""
    return content_key([file_sha256(Path(__file__).parent / name) for name in _CODE])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        table = agreement(sys.argv[1])
    except DertaError as error:
        raise SystemExit(str(error)) from None
    write_json(KEPT, {"date": today(), "code": code_hash(), "table": table.to_dict("records")})
    print(table.round(3).to_string())
