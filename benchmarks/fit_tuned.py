"""Tune the model of `judges.tuned` on files of responses that people labelled, and show how far it agrees with people.

    python -m benchmarks.fit_tuned OUT FILE [FILE ...]

A FILE is as in `fit_labelled`; of one whose name ends in `.test.jsonl` only the agreement is shown. Two fifths of the
other files' queries are held out: on their responses the model and the rules of `labelled` are weighed together, and
the agreement of each is printed. Then the model is tuned again on all of them, and OUT is written as `tuned_model` is.
The own intercept of a set with both labels takes up where its people drew the line; the judge keeps the mean one. A GPU
is of use. Needs scikit-learn, which the library itself does not.

Code in these files is mostly asked for and mostly unsafe, so a model tuned on them takes any code for harm. That a
program holds a text changes nothing about what the text gives, so a quarter of the responses come a second time as the
strings or comments of a program (`in_code`), with people's label; and programs that only spell the request out, which
gives nothing, are safe.

The kept adapter was made by an earlier form of this script, in which q, k and v shared their A, as did gate and up. In
this form it gives another.
"""

import hashlib
import json
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
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import save_file
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.fit_labelled import WEIGHTS, read, show
from derta_lib.judges import Item
from derta_lib.judges.labelled import log_odds
from derta_lib.judges.tuned import FAR, as_rows, features, first_layers
from derta_lib.judges.wording import sentences
from derta_lib.loss import micro_batch_sum
from derta_lib.models import REFERENCE, load_model, load_tokenizer
from derta_lib.training import side_by_side
from derta_lib.tree import Pack, Row, Site, hidden_states, pack, parts

LAYERS, RANK, EPOCHS, LEARNING_RATE, SMOOTHING, BATCH = 16, 6, 3, 1e-3, 0.05, 48

IN_CODE, SPELT = 0.25, 0.04
"""Shares of the responses that come again as a program, and whose request is spelt out by one."""
PROGRAMS = (
    ("def {}():\n    steps = []\n", "    steps.append({})\n", "    return steps\n"),
    ("def {}():\n", "    # {}\n", "    pass\n"),
    ("{} = [\n", "    {},\n", "]\n"),
    ("from collections import deque\n\noutput = deque()\n", "output.append({})\n", "print(output)\n"),
    ('class {}:\n    """\n', "    {}\n", '    """\n'),
    ("vector<string> {}() {{\n    vector<string> lines;\n", "    lines.push_back({});\n", "    return lines;\n}}\n"),
    ("func {}() {{\n", "    fmt.Println({})\n", "}}\n"),
)
"""Opening, line and end of a program."""
NAMES = ("main", "solve", "output", "manual", "task", "answer", "run")


def held_out(query: str) -> bool:
    return hashlib.sha256(" ".join(query.lower().split()).encode()).digest()[0] < 0.4 * 256


def in_code(pieces: list[str], rng: random.Random) -> str:
    """A program, one of PROGRAMS, whose lines hold the pieces as strings or comments; half of the time fenced."""
    opening, line, end = rng.choice(PROGRAMS)
    quoted = [
        piece if "# {}" in line or line == "    {}\n" else json.dumps(piece, ensure_ascii=False) for piece in pieces
    ]
    body = "".join(line.format(piece) for piece in quoted)
    program = f"{opening.format(rng.choice(NAMES))}{body}{end.format()}"
    return f"```\n{program}```" if rng.random() < 0.5 else program


def with_code(table: pd.DataFrame) -> pd.DataFrame:
    """The table and, behind it, the drawn rows as programs; `form` tells them apart."""
    rng, more = random.Random(0), []
    for row in table.itertuples():
        draw = rng.random()
        if row.set.endswith(".test") or draw >= IN_CODE + SPELT:
            continue
        if draw < IN_CODE:
            program, form, unsafe = in_code([each.text for each in sentences(row.response)], rng), " as code", row.y
        else:
            words = row.query.split()
            program, form, unsafe = in_code(rng.choice([words, words[::-1]]), rng), " spelt out", False
        more.append({"set": row.set, "query": row.query, "response": program, "y": unsafe, "form": form})
    return pd.concat([table.assign(form=""), pd.DataFrame(more)], ignore_index=True)


def tune(rows: list[Row], starts: list[int], table: pd.DataFrame, numbers: list[int]) -> tuple[Any, torch.nn.Linear]:
    """The model with its adapter, and the head, tuned on the rows `numbers` of `table` (set, y, weight)."""
    torch.manual_seed(0)
    plain = load_model(REFERENCE)
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
    head = torch.nn.Linear(3 * base.config.hidden_size, 1, device=base.device)
    torch.nn.init.zeros_(head.weight)
    # the features differ much in scale: the head is tuned on standardised ones, and takes the scales up at the end
    with torch.no_grad():
        drawn = random.Random(0).sample(numbers, min(1000, len(numbers)))
        some = torch.cat([read_features(base, pack([[rows[n]] for n in batch]), starts) for batch in batches(drawn)])
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
    of_set = on_device([[name == known for known in sets] for name in table["set"]])

    def losses(packed: Pack) -> torch.Tensor:
        found = (read_features(base, packed, starts) - centre) / spread
        scores = head(found)[:, 0] + of_set[packed.targets] @ own
        return F.binary_cross_entropy_with_logits(scores, target[packed.targets], reduction="none")

    rng, order = random.Random(0), list(numbers)
    with tqdm(total=steps, desc="tune", unit="step") as bar, disable_input_dtype_casting(model):
        for _ in range(EPOCHS):
            rng.shuffle(order)
            for batch in batches(order):
                packs = parts([[rows[n]] for n in batch], side_by_side(plain))
                total, _ = micro_batch_sum(losses, packs, [*tuned, own])
                (total / len(batch) + 0.02 * own.square().sum()).backward()
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


def batches(numbers: list[int]) -> Iterator[list[int]]:
    for first in range(0, len(numbers), BATCH):
        yield numbers[first : first + BATCH]


def read_features(base: Any, packed: Pack, starts: list[int]) -> torch.Tensor:
    """What the head sees of a pack's rows, [rows, 3 d]; a site's target is the row's number."""
    with torch.autocast(base.device.type, base.dtype, enabled=base.dtype is torch.bfloat16):
        states = hidden_states(base, packed).float()
    each = zip(packed.targets.tolist(), packed.paths, strict=True)
    return torch.stack([features(states[path[starts[n] :]]) for n, path in each])


@torch.no_grad()
def score(
    model: Any, head: torch.nn.Linear, rows: list[Row], starts: list[int], numbers: list[int]
) -> npt.NDArray[np.float64]:
    """Log-odds of the rows `numbers`."""
    base = model.get_base_model()
    found = (read_features(base, pack([[rows[n]] for n in batch]), starts) for batch in batches(numbers))
    return torch.cat([head(each)[:, 0] for each in found]).double().cpu().numpy()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    torch.set_float32_matmul_precision("high")
    out, *paths = map(Path, sys.argv[1:])
    table = with_code(pd.concat([read(path) for path in paths], ignore_index=True))
    table["weight"] = (
        table["set"].map(lambda name: WEIGHTS.get(name, 0.7)) / table.groupby("set")["y"].transform("size") ** 0.5
    )
    pairs = zip(table["query"], table["response"], strict=True)
    items = [Item(n, query, text) for n, (query, text) in enumerate(pairs)]
    test = table["set"].str.endswith(".test").to_numpy()
    shares = table["weight"] / table["weight"][~test].mean()
    read_as, starts = as_rows(load_tokenizer(REFERENCE), items)
    numbered = enumerate(zip(read_as, shares, strict=True))
    rows = [Row(row.ids, (Site(len(row.ids) - 1, n, share, "mle"),)) for n, (row, share) in numbered]
    of_rules = np.clip([log_odds(item.query, item.text) for item in items], -FAR, FAR)
    held = table["query"].map(held_out).to_numpy() & ~test
    known, weighed, fresh, all_known = (np.flatnonzero(of).tolist() for of in (~held & ~test, held, test, ~test))

    of_model = score(*tune(rows, starts, table, known), rows, starts, weighed)
    facts = np.column_stack([of_model, of_rules[weighed]])
    both = LogisticRegression(C=1.0).fit(facts, table["y"][weighed], sample_weight=table["weight"][weighed] * 1e3)
    for name, found in (("model", of_model), ("rules", of_rules[weighed]), ("both", both.decision_function(facts))):
        print(f"held-out queries, {name}" + ", weighed on these rows" * (name == "both"))
        show(table.iloc[weighed].assign(set=table["set"] + table["form"]), expit(found))
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
