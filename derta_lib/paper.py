"""The paper's published figures (Yuan et al., ACL 2025), read from the CSV files beside this module.

Values are percentages as printed. Each file's first line, a comment, says where it stands in the paper.
"""

from pathlib import Path

import pandas as pd

from derta_lib.errors import UsageError

BLACK_BOX = ("CodeAttack", "PAIR", "JailbreakChat", "SelfCipher")
WHITE_BOX = ("CompletingAttack", "AutoDAN")
ATTACKS = (*BLACK_BOX, *WHITE_BOX)
GROUPS = {"black-box": BLACK_BOX, "white-box": WHITE_BOX, "attacks": ATTACKS, "wrappers": ("direct", *ATTACKS)}
"""Attacks whose average a claim may name; `wrappers` are the ways in which a request is put."""
HELPFULNESS = ("GSM8K", "MMLU", "AlpacaEval")

WORDS = {
    "vanilla-": "vanilla on half of the data",
    "vanilla-+harmful_prefix": "harmful prefix",
    "vanilla-+rto": "RTO only",
    "derta_variants": "DeRTa's variants",
    "black_box_avg": "black-box average",
    "white_box_avg": "white-box average",
}
"""Names in the paper's CSV files that need words."""


def table(name: str) -> pd.DataFrame:
    """One of the paper's tables, such as "table4_components"; raises UsageError listing the known names."""
    folder = Path(__file__).with_name("paper")
    known = sorted(path.stem for path in folder.glob("*.csv"))
    if name not in known:
        raise UsageError(f"There is no table '{name}' of the paper here; the known ones are {', '.join(known)}.")
    return pd.read_csv(folder / f"{name}.csv", comment="#")


def main_results() -> pd.DataFrame:
    """Tables 2 and 10 and Figure 5's DPO row: model, method, measure, table, `paper` (percent); blanks left out."""
    wide = table("table2_main_results").rename(columns={"family": "model"})
    wide["table"] = "Table " + wide["table"].astype(str)
    dpo = table("figure5_dpo").query("method == 'dpo'").assign(model="LLaMA3-70B", table="Figure 5")
    rows = pd.concat([wide, dpo]).melt(["table", "model", "method"], var_name="measure", value_name="paper")
    return rows.dropna(subset="paper").reset_index(drop=True)


def arithmetic_checks() -> pd.DataFrame:
    """Averages that the paper states, recomputed from its tables: model, method, `check`, stated, computed, `agrees`.

    A mean agrees when it rounds to what is stated (both in percent, one decimal).
    """
    rates = main_results().query("measure in @ATTACKS").rename(columns={"paper": "rate"})
    rates = rates[rates["table"] != "Figure 5"]
    means = rates.groupby(["model", "method"])["rate"].mean()
    text, sizes = table("text_averages").set_index("model"), table("figure6_model_size").set_index("model")
    rows = []
    for model in text.index:
        before = "vanilla" if (model, "vanilla") in means.index else "official"
        rows += [
            (model, before, "the text, from Table 2's row", text.before[model], means[model, before]),
            (model, "derta", "the text, from Table 2's row", text.after[model], means[model, "derta"]),
        ]
    for model in ("Mistral-7B", "LLaMA3-8B"):
        rows += [
            (model, method, "Figure 6, from Table 10's five attacks", sizes[method][model], means[model, method])
            for method in ("vanilla", "derta")
        ]
    frame = pd.DataFrame(rows, columns=["model", "method", "check", "stated", "computed"])
    frame["agrees"] = (frame["computed"] - frame["stated"]).abs() <= 0.05 + 1e-9
    return frame
