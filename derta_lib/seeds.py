"""Seeds as repeats: every component of the paper trained and attacked once for each of several seeds.

`derta seeds` makes the kept file anew; what a stopped run of it had made is found in the cache.
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from derta_lib.errors import DertaError, UsageError
from derta_lib.evaluation import KINDS, kind, refuses_twin
from derta_lib.records import check_output, read_json, today, write_json
from derta_lib.results import Number
from derta_lib.stats import difference, repeats

KEPT = Path(__file__).with_name("kept_seeds.json")
OUTCOMES = {name: ("kinds", str(number)) for number, name in enumerate(KINDS)} | {"twin refused": ("twins", "1")}
"""What can be counted: the column of the records, and the digit that stands for it there."""
NOTEBOOK = "05_components"
"""The notebook whose parameters are the budget."""
SETTINGS = ("steps", "learning_rate", "behaviours", "max_new_tokens")
LISTS = ("components", "attacks")
THREADS = 1
"""Of each worker."""


@dataclass(frozen=True)
class Seeds:
    """A kept file: when and where it was made, with which budget, and one record a seed, method and attack.

    A record's `kinds` (places in `evaluation.KINDS`) and `twins` (1 for a refused one) are strings of a digit a craft,
    in the corpus's order.
    """

    date: str
    machine: Mapping[str, Any]
    request: Mapping[str, Any]
    records: pd.DataFrame

    @property
    def says(self) -> str:
        """The provenance in a sentence."""
        budget, machine = self.request, self.machine
        return (
            f"Kept on {self.date}, made on {machine['gpu'] or machine['cpu']} in {machine['precision']} with "
            f"torch {machine['versions']['torch']}, finished at commit {str(machine['git']['sha'])[:7]}: "
            f"{self.records.seed.nunique()} seeds, {budget['steps']} steps at {budget['learning_rate']:g}, "
            f"{budget['behaviours']} held-out crafts and their twins, {budget['max_new_tokens']} new tokens."
        )

    def rate(self, method: str, attacks: Sequence[str], outcome: str) -> Number:
        """A method's rate of one of the OUTCOMES over all seeds and attacks; n counts responses."""
        return repeats(list(self._by_seed(method, attacks, outcome).itertuples(index=False, name=None)))

    def _by_seed(self, method: str, attacks: Sequence[str], outcome: str) -> pd.DataFrame:
        """A row a seed: k of n responses under the attacks have the outcome."""
        of = self.records[(self.records.method == method) & self.records.attack.isin(attacks)]
        column, digit = OUTCOMES[outcome]
        said = of.groupby("seed")[column].agg("".join)
        return pd.DataFrame({"k": said.map(lambda each: each.count(digit)), "n": said.map(len)})

    def rates(self, outcome: str) -> pd.DataFrame:
        """A rate over the seeds for each method and attack: columns method, attack, value, low, high, n, number."""
        rows = []
        for method, attack in dict.fromkeys(zip(self.records.method, self.records.attack, strict=True)):
            number = self.rate(method, [attack], outcome)
            rows.append((method, attack, number.value, number.low, number.high, number.n, number))
        return pd.DataFrame(rows, columns=["method", "attack", "value", "low", "high", "n", "number"])

    def change(self, method: str, attacks: Sequence[str], outcome: str) -> Number | None:
        """Points by which a method's rate under `attacks` differs from vanilla's; n is the method's own. None where no
        such attack was made. The interval is by seed (`stats.difference`), since DPO goes on from its seed's vanilla.
        """
        if not self.records.attack.isin(attacks).any():
            return None
        own, other = (self._by_seed(name, attacks, outcome) for name in (method, "vanilla"))
        return replace(difference(own.k / own.n, other.k / other.n, list(own.index)), n=int(own.n.sum()))


def read_seeds(path: Path = KEPT) -> Seeds:
    """The kept figures, or those of another file that `derta seeds` has written."""
    kept = read_json(path)
    return Seeds(kept["date"], kept["machine"], kept["request"], pd.DataFrame(kept["records"]))


def measure(methods: Sequence[str], seed: int, budget: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Train and attack the methods with one seed, in order; one record a method and attack."""
    from derta_lib.experiment import experiment

    study = experiment({**budget, "seed": seed})
    records = []
    for method in methods:
        frame = study.responses(study.checkpoint(method), list(budget["attacks"]))
        for attack, of in frame.groupby("attack", sort=False):
            said = "".join(str(KINDS.index(each)) for each in kind(of))
            twins = "".join(str(int(each)) for each in refuses_twin(of))
            records.append({"seed": seed, "method": method, "attack": attack, "kinds": said, "twins": twins})
    return records


def make_seeds(out: Path, root: Path, profile: str, seeds: int, workers: int) -> Seeds:
    """Measure the components of a profile with the seeds 0..seeds−1, `workers` processes at once; write the file `out`.

    `root` is the checkout. DPO starts from the vanilla checkpoint of its seed, so one process makes both. Raises
    UsageError for an unknown profile, a mistyped name or value in it, components without vanilla, and for less than one
    seed or worker.
    """
    import torch

    from derta_lib.experiment import DPO
    from derta_lib.params import read_profile, resolve
    from derta_lib.runs import check_name, environment

    if seeds < 1 or workers < 1:
        raise UsageError(f"--seeds {seeds} --workers {workers}: give whole numbers from 1 on.")
    if not (root / "notebooks").is_dir():
        raise UsageError(f"{root} is not a checkout of the companion (it has no notebooks); run this command in one.")
    check_output(out)
    check_name("profile", profile)
    chosen = read_profile(root / "notebooks" / "profiles" / f"{profile}.yaml")
    parameters = resolve(sorted((root / "notebooks").glob("*.ipynb")), chosen, {})[NOTEBOOK]
    budget: dict[str, Any] = {name: parameters[name] for name in ("model", "data", *SETTINGS, *LISTS)}
    components = list(budget["components"])
    if "vanilla" not in components:
        raise UsageError(f"profile '{profile}': its components lack vanilla, which the others are compared with.")
    chains = [[name] for name in components if name not in ("vanilla", DPO) or DPO not in components]
    if DPO in components:
        chains.insert(0, ["vanilla", DPO])  # first, since it takes longest
    machine = {**environment(), "threads": THREADS}
    records: list[dict[str, Any]] = []
    # a process a task: what a training has taken of the memory goes back with it
    spawn, threads = multiprocessing.get_context("spawn"), (THREADS,)
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, threads, max_tasks_per_child=1) as pool:
        running = [pool.submit(measure, chain, seed, budget) for chain in chains for seed in range(seeds)]
        try:
            for done in tqdm(as_completed(running), "trainings", len(running)):
                records.extend(done.result())
        except BrokenProcessPool:
            raise DertaError(
                "A training's process was ended from outside, most likely for want of memory; give fewer --workers and "
                "run again, which goes on where it was."
            ) from None
        except BaseException:  # a failed or stopped run does not wait for those that have not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    records.sort(key=lambda record: (components.index(record["method"]), record["seed"]))  # stable: attacks stay put
    kept = {"date": today(), "machine": machine, "request": {**budget, "seeds": seeds}, "records": records}
    write_json(out, kept)
    return read_seeds(out)
