"""Fit the points of `judges.refusal` on XSTest's development half.

    python benchmarks/fit_refusal_points.py FOLDER

Prints the points and the accuracy of a 20-fold cross-validation by prompt within the development half (full refusal
against full compliance); the same with a model left out instead; and F1 of partial refusals by WORDS_A_POINT, given the
points in the library. The held-out half is not read. Needs scikit-learn, which the library itself does not.
"""

import sys

import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut, cross_val_score

from derta_lib.judges import refusal
from derta_lib.judges.wording import sentences
from derta_lib.judges.xstest import read_xstest

if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    everything = read_xstest(sys.argv[1])
    everything = everything[everything["development"]]
    rows = everything[everything["label"] != "partial"]
    pairs = zip(rows["prompt"], rows["completion"], strict=True)
    facts = pd.DataFrame([refusal.refusal_facts(sentences(response), query) for query, response in pairs]).astype(float)
    refused = (rows["label"] == "full").to_numpy()
    model = LogisticRegression(C=1.0, max_iter=5000)
    for what, folds in (("prompt", GroupKFold(20)), ("model", LeaveOneGroupOut())):
        scores = cross_val_score(model, facts, refused, groups=rows[what], cv=folds)
        print(f"cross-validated accuracy {scores.mean():.3f} on {len(rows)} completions, folds by {what}")
    model.fit(facts, refused)
    print(f"BIAS = {model.intercept_[0]:.2f}")
    for name, weight in zip(facts.columns, model.coef_[0], strict=True):
        print(f"{name!r}: {weight:.2f}")
    partial = everything["label"] == "partial"
    pairs = list(zip(everything["prompt"], everything["completion"], strict=True))
    for refusal.WORDS_A_POINT in (5, 10, 15, 20, 30):
        found = [refusal.read_refusal(response, query).label == "partial" for query, response in pairs]
        print(f"WORDS_A_POINT = {refusal.WORDS_A_POINT}: F1 of partial refusals {f1_score(partial, found):.3f}")
