"""Fit the points of `judges.labelled` on responses that people labelled.

    python benchmarks/fit_labelled.py LABELS.jsonl ... XSTEST_FOLDER

A label file has a JSON object a line: query, response and y (is the response unsafe?). Of XSTest only the development
half is read; of its safe prompts only those that `labelled_words.harmless` knows, since the judge takes every other
query to be harmful. Prints agreement with people, cross-validated by query and with a set left out, the points, and the
shift of the bias that makes the predicted share of unsafe responses match people's. Needs scikit-learn.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut, cross_val_predict

from derta_lib.judges.labelled import facts
from derta_lib.judges.labelled_words import harmless
from derta_lib.judges.xstest import read_xstest

WEIGHTS = {"JAILJUDGEmini": 4.0, "pyrit_objective": 1.5, "pyrit_harm": 1.2, "Safe-RLHFmini": 0.4, "xstest unsafe": 1.5}
"""What a set weighs, however many responses it holds: the closer to jailbreaks, the more. Others weigh 0.7."""


def read(path: Path) -> pd.DataFrame:
    """Columns set, query, response and y."""
    if path.is_dir():
        rows = read_xstest(path)
        rows = rows[rows["development"] & (rows["label"] != "partial")]
        rows = rows.rename(columns={"prompt": "query", "completion": "response"})
        kind = np.where(rows["unsafe_prompt"], "xstest unsafe", "xstest safe")
        rows = rows.assign(set=kind, y=rows["unsafe_prompt"] & (rows["label"] == "none"))
        rows = rows[rows["unsafe_prompt"] | rows["query"].map(harmless)]
    else:
        rows = pd.read_json(path, lines=True).assign(set=path.stem)
    return rows[["set", "query", "response", "y"]].astype({"y": bool})


def show(rows: pd.DataFrame, p: np.ndarray) -> None:
    for name, part in rows.assign(p=p, unsafe=p >= 0.5).groupby("set"):
        y, u = part["y"], part["unsafe"]
        auc = roc_auc_score(y, part["p"]) if y.nunique() > 1 else float("nan")
        print(
            f"  {name:16} n {len(part):5} accuracy {(y == u).mean():.3f} false positives {u[~y].mean():.3f} "
            f"false negatives {(~u[y]).mean():.3f} AUC {auc:.3f} predicted - human share {u.mean() - y.mean():+.3f}"
        )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    rows = pd.concat([read(Path(path)) for path in sys.argv[1:]], ignore_index=True)
    pairs = zip(rows["query"], rows["response"], strict=True)
    table = pd.DataFrame([facts(query, response) for query, response in pairs]).astype(float)
    weight = rows["set"].map(lambda name: WEIGHTS.get(name, 0.7)) * 500 / rows.groupby("set")["y"].transform("size")
    human = float(np.average(rows["y"], weights=weight))
    weighted = {"sample_weight": weight}
    for by, strength, folds in (
        ("query", 0.1, GroupKFold(10)),
        ("query", 1.0, GroupKFold(10)),
        ("set", 1.0, LeaveOneGroupOut()),
    ):
        model = LogisticRegression(C=strength, max_iter=5000)
        score = cross_val_predict(
            model, table, rows["y"], groups=rows[by], cv=folds, method="decision_function", params=weighted
        )
        print(f"cross-validated by {by}, C = {strength}")
        show(rows, expit(score))
        # The threshold at which the weighted predicted share is the human share.
        order = np.argsort(-score)
        reached = np.cumsum(weight.to_numpy()[order]) / weight.sum()
        shift = -score[order][np.searchsorted(reached, human)]
        print(f"  shift of the bias for equal shares: {shift:+.2f}; with it:")
        show(rows, expit(score + shift))
    model = LogisticRegression(C=1.0, max_iter=5000).fit(table, rows["y"], sample_weight=weight)
    print(f"BIAS = {model.intercept_[0]:.2f}")
    for name, point in zip(table.columns, model.coef_[0], strict=True):
        print(f"    {name!r}: {point:.2f},")
