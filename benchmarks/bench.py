"""`derta bench`: training steps and generation, ours against the authors' computation, TRL and plain `generate`.

All in one run: the contenders take turns, figures are medians over rounds, and the machine's matrix peak is measured
between them. Memory is that of a process in which a contender is alone; on a GPU, what a contender has allocated.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks import contenders
from benchmarks.alone import STEPS
from derta_lib import loss, tree
from derta_lib.attacks import build
from derta_lib.corpus import concord
from derta_lib.errors import DertaError, UsageError, check_whole
from derta_lib.experiment import with_twins
from derta_lib.generation import LocalTarget, generate
from derta_lib.models import REFERENCE, load_model, load_tokenizer
from derta_lib.records import check_output, today, write_json
from derta_lib.results import Number, Results
from derta_lib.runs import environment

LENGTHS = (64, 256, 1024)
"""Tokens of r̂ at which the cost per token is measured."""
COUNTS = {"cpu": (4, 8, 16), "cuda": (32, 64, 128)}
"""Triples a micro-batch, for linearity; a GPU is not busy with few."""
ATTACKS = ("direct", "prefilling-16", "completingattack", "selfcipher", "codeattack", "jailbreakchat")
STATIC_BATCH = 25


def seconds(work: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the GPU's queue included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rounds_of(
    tasks: dict[str, Callable[[], Any]], rounds: int, device: str, label: str, warm_up: int = 0
) -> dict[str, list[float]]:
    """Seconds of each task in each round; the tasks take turns, and rounds of warming up are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for number in tqdm(range(-warm_up, rounds), label):
        for name, task in tasks.items():
            elapsed = seconds(task, device)
            if number >= 0:
                taken[name].append(elapsed)
    return taken


def matrix_product(device: str) -> tuple[Callable[[], Any], float]:
    """A matrix product that shows the machine's peak, and its FLOPs."""
    size, times = (8192, 8) if device == "cuda" else (2048, 4)
    a, b = (torch.randn(size, size, dtype=contenders.DTYPE, device=device) for _ in range(2))

    def work() -> None:
        for _ in range(times):
            torch.mm(a, b)

    return work, 2.0 * size**3 * times


def beside_peak(
    tasks: dict[str, Callable[[], Any]], rounds: int, device: str, label: str
) -> tuple[dict[str, list[float]], float]:
    """`rounds_of` after a round of warming up, and the matrix peak in FLOP/s of these very rounds: a shared machine is
    not always as fast.
    """
    product, flops = matrix_product(device)
    taken = rounds_of({**tasks, "matrix product": product}, rounds, device, label, warm_up=1)
    return taken, flops / min(taken["matrix product"])


def training(base: Any, device: str, triples: int, rounds: int) -> tuple[Results, dict[str, list[float]]]:
    """Steps of all contenders in turns: triples/s, tokens/s, share of the matrix peak, and the times themselves."""
    work = contenders.corpus_work(triples)
    needs = {name: contenders.size_of(name, work) for name in contenders.NAMES}
    flops = {name: contenders.flops(base, size) for name, size in needs.items()}
    steps = {name: contenders.make(name, contenders.twin(base), work) for name in contenders.NAMES}
    taken, peak = beside_peak(steps, rounds, device, "training")
    found: Results = {"machine/matrix_peak": Number(peak / 1e9, "GFLOP/s", rounds)}
    for name in contenders.NAMES:
        median = statistics.median(taken[name])
        if name != "trl":  # TRL has no RTO, so its step is not a triple's
            found[f"train/{name}/triples"] = Number(triples / median, "triples/s", rounds)
        found[f"train/{name}/tokens"] = Number(needs[name].tokens / median, "tokens/s", rounds)
        found[f"train/{name}/peak_share"] = Number(flops[name] / median / peak, "rate", rounds)
    for name in ("ours", "ours_fixed"):
        faster = [a / b for a, b in zip(taken["authors"], taken[name], strict=True)]
        found[f"train/{name}/times_authors"] = Number(statistics.median(faster), "×", rounds)
    per_token = [
        (a / needs["trl"].tokens) / (b / needs["ours"].tokens) for a, b in zip(taken["trl"], taken["ours"], strict=True)
    ]
    found["train/ours/times_trl"] = Number(statistics.median(per_token), "×", rounds)
    return found, taken


def scaling(base: Any, device: str, rounds: int) -> tuple[Results, dict[str, list[float]]]:
    """Cost per token from 64 to 1,024 tokens of r̂ (as many tokens a step), and per triple from few to many triples.

    Attention's share is that of its own time, forward and backward, in the same packs and the same rounds.
    """
    loaded = contenders.twin(base)
    step = 2 * contenders.synthetic_tokens(max(LENGTHS))
    works = {f"length-{n}": contenders.synthetic_work(step // contenders.synthetic_tokens(n), n) for n in LENGTHS}
    works |= {f"triples-{n}": contenders.corpus_work(n) for n in COUNTS[device]}
    prepared = contenders.training.prepare(loaded, contenders.RECIPE)
    tasks: dict[str, Callable[[], Any]] = {}
    for name, work in works.items():
        groups = [each.paper for each in work]
        tasks |= {name: contenders.step_on(prepared, groups), f"{name}/attention": attention_on(loaded, groups)}
    taken, peak = beside_peak(tasks, rounds, device, "scaling")
    found: Results = {}
    for name, work in works.items():
        size = contenders.size_of("ours", work)
        tokens = size.tokens
        whole, attention = (statistics.median(taken[task]) for task in (name, f"{name}/attention"))
        found[f"scaling/{name}/ms_per_token"] = Number(1e3 * whole / tokens, "ms", rounds)
        found[f"scaling/{name}/peak_share"] = Number(contenders.flops(base, size) / whole / peak, "rate", rounds)
        found[f"scaling/{name}/attention"] = Number(attention / whole, "rate", rounds)
        found[f"scaling/{name}/rest_per_token"] = Number(1e3 * (whole - attention) / tokens, "ms", rounds)
        if name.startswith("triples"):
            found[f"scaling/{name}/seconds"] = Number(whole, "s", rounds)
    return found, taken


def attention_on(model: Any, groups: Sequence[Sequence[tree.Row]]) -> Callable[[], Any]:
    """Attention alone in a step on these groups: all layers, forward and backward, on random queries, keys, values."""
    attention, config = model.get_decoder().layers[0].self_attn, model.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    packs = tree.parts(groups, contenders.training.side_by_side(model))
    scale = torch.ones((), dtype=model.dtype, device=model.device, requires_grad=True)  # what the backward pass reaches

    def run(packed: tree.Pack) -> torch.Tensor:
        shape = (len(packed.ids), attention.head_dim)
        states = [torch.randn(1, n, *shape, dtype=model.dtype, device=model.device) for n in heads]
        laid = tree.layout(packed, model)
        total = torch.zeros((), dtype=model.dtype, device=model.device)
        for _ in range(config.num_hidden_layers):
            query, key, value = (each * scale for each in states)
            output, _ = tree.tree_attention(attention, query, key, value, None, laid=laid, scaling=attention.scaling)
            total = total + output.sum()
        return total.float().expand(len(packed.sites))

    return lambda: loss.micro_batch_sum(run, packs, [scale])[0].backward()


def memory(model: str, base: Any, device: str, triples: int) -> Results:
    """Peak memory of a few steps of each contender alone: resident set of its process, or allocated on the GPU."""
    found: Results = {}
    for name in contenders.NAMES:
        peak, loaded = allocated(name, base, triples) if device == "cuda" else resident(name, model, triples)
        found[f"train/{name}/peak_memory"] = Number(peak / 2**20, "MiB", 1)
        found[f"train/{name}/over_model"] = Number((peak - loaded) / 2**20, "MiB", 1)
        gc.collect()  # what the contender has left on the GPU
    return found


def resident(name: str, model: str, triples: int) -> tuple[int, int]:
    """Bytes that a contender alone in its process holds at most, and those with its model loaded."""
    command = [sys.executable, "-m", "benchmarks.alone", name, model, str(triples)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise DertaError(f"The memory of '{name}' could not be measured: {done.stderr.strip().splitlines()[-1]}.")
    told = json.loads(done.stdout.splitlines()[-1])
    return told["peak"], told["loaded"]


def allocated(name: str, base: Any, triples: int) -> tuple[int, int]:
    """As `resident`, of the GPU's memory."""
    step = contenders.make(name, contenders.twin(base), contenders.corpus_work(triples))
    torch.cuda.reset_peak_memory_stats()
    loaded = torch.cuda.memory_allocated()
    for _ in range(STEPS):
        step()
    return torch.cuda.max_memory_allocated(), loaded


def attack_prompts(target: LocalTarget, crafts: int) -> list[list[int]]:
    """Prompt ids of six attacks on the test split's first harmful crafts and their benign twins, attack by attack.

    PAIR's and AutoDAN's prompts are written by the models, so direct requests and prefilling stand in for them.
    """
    corpus = concord(0)
    asked = with_twins(corpus.behaviours["test"], crafts)
    options = {"max_new_tokens": 1, "cut": target.chat.cut, "demonstrations": corpus.triples[:3], "k": 3}
    attacks = [build(name, **options) for name in ATTACKS]  # type: ignore[arg-type]
    return [target.prompt_ids(one.prompt(b, 0)) for one in attacks for b in asked]  # type: ignore[attr-defined]


def static_batches(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, stops: set[int]) -> list[list[int]]:
    """The usual way: batches of 25 in the order given, padded at the left, through `generate`."""
    answers = []
    pad = min(stops)
    for start in range(0, len(prompts), STATIC_BATCH):
        batch = prompts[start : start + STATIC_BATCH]
        length = max(map(len, batch))
        ids = torch.tensor([[*[pad] * (length - len(p)), *p] for p in batch], device=model.device)
        mask = torch.tensor([[*[0] * (length - len(p)), *[1] * len(p)] for p in batch], device=model.device)
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(stops),
        )
        for row in made[:, length:].tolist():
            answers.append(row[: next((i for i, token in enumerate(row) if token in stops), len(row))])
    return answers


def generation(
    model: str, device: str, rounds: int, crafts: int, new_tokens: int
) -> tuple[Results, dict[str, list[float]]]:
    """Tokens/s of greedy answers to the attack prompts, ours against static batches, and what the prompts share.

    By default the real suite: 16 crafts and their twins under six attacks (192 prompts), 48 new tokens each. A GPU,
    whose first round takes longer, warms up.
    """
    plain = load_model(model).to(device)
    target = LocalTarget(load_model(model).to(device), load_tokenizer(model), model)
    prompts = attack_prompts(target, crafts)
    answers: dict[str, list[list[int]]] = {}

    def with_ours() -> None:
        answers["ours"] = generate(target.model, prompts, new_tokens, target.stops)

    def static() -> None:
        answers["static"] = static_batches(plain, prompts, new_tokens, target.stops)

    with torch.inference_mode():
        tasks = {"static": static, "ours": with_ours}
        taken = rounds_of(tasks, rounds, device, "generation", warm_up=int(device == "cuda"))
    found: Results = {}
    for name, times in taken.items():
        made = sum(len(answer) + (len(answer) < new_tokens) for answer in answers[name])
        found[f"generate/{name}/tokens"] = Number(made / statistics.median(times), "tokens/s", rounds)
    faster = statistics.median(a / b for a, b in zip(taken["static"], taken["ours"], strict=True))
    found["generate/ours/times_static"] = Number(faster, "×", rounds)
    alone = sum(map(len, prompts))
    together = len(tree.pack([[tree.Row(tuple(p))] for p in prompts]).ids)
    found["generate/prompts/shared"] = Number(1 - together / alone, "rate", len(prompts))
    same = sum(a == b for a, b in zip(answers["ours"], answers["static"], strict=True))
    found["generate/ours/same_answers"] = Number(same / len(prompts), "rate", len(prompts))
    return found, taken


def bench(
    out: Path,
    *,
    model: str = REFERENCE,
    device: str = "cpu",
    triples: int = 8,
    rounds: int = 3,
    crafts: int = 16,
    new_tokens: int = 48,
) -> Results:
    """Measure all of it, print a table, and write `out`: numbers, every round's seconds, machine, date, request.

    Training: steps of `triples` triples (8 have as many tokens as a micro-batch of the book), `rounds` rounds; scaling
    takes three times as many, for its differences are smaller than what a shared machine varies by.
    Generation: six attacks on the test split's first `crafts` crafts and their twins, `new_tokens` tokens an answer; on
    a CPU, where a round takes over a minute, without warming up.

    `device` is 'cpu' or 'cuda'; `model` may be 'llama3-8b' (random weights) beside what other commands take, and
    then generation is left out. Raises UsageError for a device that is not there.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"--device {device}: it is not here; give cpu, or cuda on a machine with an NVIDIA GPU.")
    check_whole("--rounds", rounds, 1)
    check_whole("--triples", triples, 1)
    check_output(out)
    request = {"model": model, "device": device, "triples": triples, "rounds": rounds}
    base = contenders.base_model(model, device)
    found = memory(model, base, device, triples)
    parts = {"train": training(base, device, triples, rounds)}
    gc.collect()
    parts["scaling"] = scaling(base, device, 3 * rounds)
    if model != contenders.LLAMA3_8B:
        parts["generate"] = generation(model, device, rounds, crafts, new_tokens)
        request |= {"crafts": crafts, "new_tokens": new_tokens}
    times: dict[str, list[float]] = {}
    for part, (numbers, taken) in parts.items():
        found |= numbers
        times |= {f"{part}/{name}": each for name, each in taken.items()}
    write_json(
        out,
        {
            "date": today(),
            "machine": environment(),
            "load": os.getloadavg()[0],
            "request": request,
            "numbers": {key: vars(number) for key, number in found.items()},
            "seconds": times,
        },
    )
    table = pd.DataFrame([(key, str(number)) for key, number in found.items()], columns=["figure", "value"])
    print(table.to_string(index=False))
    return found
