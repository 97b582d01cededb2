"""Tune the model of `judges.tuned` on files of responses that people labelled, and show how far it agrees with people.

    python -m benchmarks.fit_tuned OUT FILE [FILE ...]

A FILE is as in `fit_labelled`; of one whose name ends in `.test.jsonl` only the agreement is shown. Two fifths of the
other files' queries are held out: on their responses the model and the rules of `labelled` are weighed together, and
the agreement of each is printed. Then the model is tuned again on all of them, and OUT is written as `tuned_model` is.
The own intercept of a set with both labels takes up where its people drew the line; the judge keeps the mean one. A GPU
is of use. Needs scikit-learn, which the library itself does not.

The kept adapter was made by an earlier form of this script, in which q, k and v shared their A, as did gate and up. In
this form it gives another.
"""

import hashlib
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.fit_labelled import WEIGHTS, read, show
from derta_lib.judges import Item
from derta_lib.judges.labelled import log_odds
from derta_lib.judges.tuned import FAR, as_rows, features, first_layers
from derta_lib.models import REFERENCE, load_model, load_tokenizer
from derta_lib.tree import Row, hidden_states, pack

LAYERS, RANK, EPOCHS, LEARNING_RATE, SMOOTHING, DROPOUT, BATCH = 16, 6, 3, 1e-3, 0.05, 0.1, 48


def held_out(query: str) -> bool:
    return hashlib.sha256(" ".join(query.lower().split()).encode()).digest()[0] < 0.4 * 256


def tune(rows: list[Row], starts: list[int], table: pd.DataFrame, numbers: list[int]) -> tuple[Any, torch.nn.Linear]:
    """The model with its adapter, and the head, tuned on the rows `numbers` of `table` (set, y, weight)."""
    torch.manual_seed(0)
    plain = load_model(REFERENCE, "float32")
    linear = (name for name, module in plain.get_decoder().named_modules() if isinstance(module, torch.nn.Linear))
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=sorted({name.rpartition(".")[-1] for name in linear}),
        layers_to_transform=list(range(LAYERS)),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(plain, config)
    base = first_layers(model.get_base_model(), LAYERS)
    head = torch.nn.Linear(3 * base.config.hidden_size, 1).to(base.device)
    torch.nn.init.zeros_(head.weight)
    # the features differ much in scale: the head is tuned on standardised ones, and takes the scales up at the end
    with torch.no_grad():
        drawn = random.Random(0).sample(numbers, min(1000, len(numbers)))
        some = torch.cat(list(read_features(base, rows, starts, drawn)))
    centre, spread = some.mean(0), some.std(0) + 1e-3

    both = table.iloc[numbers].groupby("set")["y"].nunique()
    sets = list(both.index[both > 1])
    own = torch.nn.Parameter(torch.zeros(len(sets), device=base.device))
    tuned = [*(p for p in model.parameters() if p.requires_grad), *head.parameters()]
    optimizer = torch.optim.AdamW([{"params": tuned}, {"params": [own], "lr": 10 * LEARNING_RATE}], LEARNING_RATE)
    steps = EPOCHS * math.ceil(len(numbers) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [LEARNING_RATE, 10 * LEARNING_RATE], steps, pct_start=0.06
    )

    def on_device(values: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.float, device=base.device)

    target = on_device(table["y"] * (1 - SMOOTHING) + SMOOTHING / 2)
    counts = on_device(table["weight"] / table["weight"].iloc[numbers].mean())
    of_set = on_device([[name == known for known in sets] for name in table["set"]])
    rng, order = random.Random(0), list(numbers)
    with tqdm(total=steps, desc="tune", unit="step") as bar:
        for _ in range(EPOCHS):
            rng.shuffle(order)
            for start in range(0, len(order), BATCH):
                batch = order[start : start + BATCH]
                found = (next(read_features(base, rows, starts, batch)) - centre) / spread
                scores = head(F.dropout(found, DROPOUT))[:, 0] + of_set[batch] @ own
                losses = F.binary_cross_entropy_with_logits(scores, target[batch], counts[batch])
                (losses + 0.02 * own.square().sum()).backward()
                torch.nn.utils.clip_grad_norm_(tuned, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
    with torch.no_grad():
        head.bias += own.sum() / max(1, len(sets))
        head.weight /= spread
        head.bias -= head.weight @ centre
    return model, head


def read_features(base: Any, rows: list[Row], starts: list[int], numbers: list[int]) -> Iterator[torch.Tensor]:
    """What the head sees of the rows `numbers`, a batch at a time, [BATCH, 3 d]."""
    for first in range(0, len(numbers), BATCH):
        batch = numbers[first : first + BATCH]
        packed = pack([[rows[n]] for n in batch])
        states = hidden_states(base, packed).float()
        yield torch.stack([features(states[at[starts[n] :]]) for n, at in zip(batch, packed.paths, strict=True)])


@torch.no_grad()
def score(
    model: Any, head: torch.nn.Linear, rows: list[Row], starts: list[int], numbers: list[int]
) -> npt.NDArray[np.float64]:
    """Log-odds of the rows `numbers`."""
    found = read_features(model.get_base_model(), rows, starts, numbers)
    return torch.cat([head(each)[:, 0] for each in found]).double().cpu().numpy()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    torch.set_float32_matmul_precision("high")
    out, *paths = map(Path, sys.argv[1:])
    table = pd.concat([read(path) for path in paths], ignore_index=True)
    table["weight"] = (
        table["set"].map(lambda name: WEIGHTS.get(name, 0.7)) / table.groupby("set")["y"].transform("size") ** 0.5
    )
    pairs = zip(table["query"], table["response"], strict=True)
    items = [Item(n, query, text) for n, (query, text) in enumerate(pairs)]
    rows, starts = as_rows(load_tokenizer(REFERENCE), items)
    of_rules = np.clip([log_odds(item.query, item.text) for item in items], -FAR, FAR)
    test = table["set"].str.endswith(".test").to_numpy()
    held = table["query"].map(held_out).to_numpy() & ~test
    known, weighed, fresh, all_known = (np.flatnonzero(of).tolist() for of in (~held & ~test, held, test, ~test))

    of_model = score(*tune(rows, starts, table, known), rows, starts, weighed)
    facts = np.column_stack([of_model, of_rules[weighed]])
    both = LogisticRegression(C=1.0).fit(facts, table["y"][weighed], sample_weight=table["weight"][weighed] * 1e3)
    for name, found in (("model", of_model), ("rules", of_rules[weighed]), ("both", both.decision_function(facts))):
        print(f"held-out queries, {name}" + ", weighed on these rows" * (name == "both"))
        show(table.iloc[weighed], expit(found))
    print(f"BIAS, MODEL, RULES = {both.intercept_[0]:.2f}, {both.coef_[0][0]:.2f}, {both.coef_[0][1]:.2f}")

    model, head = tune(rows, starts, table, all_known)
    if fresh:
        of_model = score(model, head, rows, starts, fresh)
        facts = np.column_stack([of_model, of_rules[fresh]])
        for name, found in (("model", of_model), ("both", both.decision_function(facts))):
            print(f"sets that nothing was fitted to, {name}")
            show(table.iloc[fresh], expit(found))
    model.peft_config["default"].base_model_name_or_path = REFERENCE
    model.half().save_pretrained(out)
    save_file({"weight": head.weight[0].half().detach(), "bias": head.bias.half().detach()}, out / "head.safetensors")
