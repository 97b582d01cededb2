"""Tune the model of `judges.tuned` on files of responses that people labelled, and show how far it agrees with people.

    python -m benchmarks.fit_tuned OUT FILE [FILE ...]

A FILE is as in `fit_labelled`. Two fifths of the queries of each set are held out: on their responses the model and the
rules of `labelled` are weighed together, and the agreement of each is printed. OUT is written as `tuned_model` is. A
set's own intercept takes up where its people drew the line; the judge keeps the mean one. A GPU is of use. The adapter
that is kept was made by an earlier form of this script, in which q, k and v shared their A, as did gate and up, and the
head saw standardised features; with the three weights settled, it was tuned again on all responses. Needs scikit-learn,
which the library itself does not.
"""

import hashlib
import math
import random
import sys
from pathlib import Path

import numpy as np
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
from derta_lib.tree import hidden_states, pack

LAYERS, RANK, EPOCHS, LEARNING_RATE, SMOOTHING, BATCH = 16, 6, 3, 1e-3, 0.05, 48


def held_out(query: str) -> bool:
    return hashlib.sha256(" ".join(query.lower().split()).encode()).digest()[0] < 0.4 * 256


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    out, *paths = map(Path, sys.argv[1:])
    table = pd.concat([read(path) for path in paths], ignore_index=True)
    sets = list(dict.fromkeys(table["set"]))
    weight = table["set"].map(lambda name: WEIGHTS.get(name, 0.7)) / table.groupby("set")["y"].transform("size") ** 0.5
    items = [
        Item(str(n), query, text) for n, (query, text) in enumerate(zip(table["query"], table["response"], strict=True))
    ]
    rows, starts = as_rows(load_tokenizer(REFERENCE), items)
    held = table["query"].map(held_out).to_numpy()

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
    own = torch.nn.Parameter(torch.zeros(len(sets), device=base.device))

    def scores(numbers: list[int]) -> torch.Tensor:
        packed = pack([[rows[n]] for n in numbers])
        states = hidden_states(base, packed).float()
        said = [features(states[path[starts[n] :]]) for n, path in zip(numbers, packed.paths, strict=True)]
        return head(torch.stack(said))[:, 0]

    tuned = [*(p for p in model.parameters() if p.requires_grad), *head.parameters()]
    optimizer = torch.optim.AdamW([{"params": tuned}, {"params": [own], "lr": 10 * LEARNING_RATE}], LEARNING_RATE)
    numbers = [int(n) for n in np.flatnonzero(~held)]
    steps = EPOCHS * math.ceil(len(numbers) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [LEARNING_RATE, 10 * LEARNING_RATE], steps, pct_start=0.06
    )
    target = torch.tensor(
        table["y"].to_numpy() * (1 - SMOOTHING) + SMOOTHING / 2, dtype=torch.float, device=base.device
    )
    counts = torch.tensor(weight.to_numpy() / weight[~held].mean(), dtype=torch.float, device=base.device)
    of_set = torch.tensor([sets.index(name) for name in table["set"]], device=base.device)
    rng = random.Random(0)
    for _ in tqdm(range(EPOCHS), "epochs"):
        rng.shuffle(numbers)
        for start in tqdm(range(0, len(numbers), BATCH), "steps", leave=False):
            batch = numbers[start : start + BATCH]
            losses = F.binary_cross_entropy_with_logits(
                scores(batch) + own[of_set[batch]], target[batch], counts[batch], reduction="mean"
            )
            (losses + 0.02 * own.square().sum()).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    with torch.no_grad():
        head.bias += own.mean()
        places = [int(n) for n in np.flatnonzero(held)]
        of_model = torch.cat([scores(places[i : i + BATCH]) for i in range(0, len(places), BATCH)]).cpu().numpy()
    of_rules = np.clip([log_odds(items[n].query, items[n].response) for n in places], -FAR, FAR)
    both = LogisticRegression(C=1.0).fit(
        np.column_stack([of_model, of_rules]), table["y"][held], sample_weight=weight[held] / weight[held].mean()
    )
    together = both.intercept_[0] + np.column_stack([of_model, of_rules]) @ both.coef_[0]
    for name, score in (("model", of_model), ("rules", of_rules), ("both, weighed on these rows", together)):
        print(name)
        show(table[held], expit(score))
    print(f"BIAS, MODEL, RULES = {both.intercept_[0]:.2f}, {both.coef_[0][0]:.2f}, {both.coef_[0][1]:.2f}")
    model.peft_config["default"].base_model_name_or_path = REFERENCE
    model.half().save_pretrained(out)
    save_file({"weight": head.weight[0].half().detach(), "bias": head.bias.half().detach()}, out / "head.safetensors")
