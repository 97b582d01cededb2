"""The command line: the library's verbs, errors in one sentence, exit codes 0 (ok), 1 (the work failed), 2 (usage)."""

import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
from safetensors import SafetensorError

from derta_lib.errors import DertaError, UsageError, first_line
from derta_lib.judges import DEFAULT, NAMES
from derta_lib.runs import project_root

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Model = Annotated[str, typer.Option(help='"reference" (embedded), a hub id, a local folder or a checkpoint.')]
Behaviours = Annotated[str, typer.Option(help="concord, do-not-answer+harmbench, or a CSV or JSONL file.")]
Seed = Annotated[int, typer.Option(help="Seed of data, training and sampling.")]
File = Annotated[Path, typer.Argument(help="A JSONL file.")]


@cli.command()
def book(
    profile: Annotated[str, typer.Option(help="A parameter file of notebooks/profiles.")] = "cpu",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="name=value for a notebook parameter; repeatable.")
    ] = None,
    name: Annotated[str, typer.Option(help="The run's folder under runs/; the profile's name by default.")] = "",
) -> None:
    """Execute the notebooks with checked parameters and build the pages."""
    from derta_lib.book import build_book

    start = build_book(project_root(), profile, set_ or [], name or profile)
    print(f"The book is at {start}")


@cli.command()
def compare(
    first: str,
    second: str,
    fail_on: Annotated[
        list[str] | None, typer.Option(help="Exit with 1 when this metric got worse; repeatable.")
    ] = None,
) -> None:
    """Make a page of the differences between two runs (names under runs/)."""
    from derta_lib import compare as runs

    folders = project_root() / "runs" / first, project_root() / "runs" / second
    changes = runs.compare(*folders)
    failed = runs.worse(changes, fail_on or [])
    for change in changes:
        if change.sign:
            print("  ".join(runs.row(change)))
    print(runs.summary(changes))
    print(f"The page is at {runs.write_page(*folders, changes)}")
    if failed:
        raise DertaError(
            f"{second} got worse than {first} in {', '.join(change.key for change in failed)} "
            "(tested among the results of these metrics alone)."
        )


@cli.command()
def train(
    method: Annotated[str, typer.Option(help="vanilla, harmful_prefix, rto, derta or recaug.")] = "derta",
    model: Model = "reference",
    triples: Annotated[
        Path | None, typer.Option(help="JSONL of id, query, safe, harmful; the corpus otherwise.")
    ] = None,
    pairs: Annotated[Path | None, typer.Option(help="JSONL of id, query, response; the corpus otherwise.")] = None,
    preset: Annotated[
        str, typer.Option(help="fixed, or as the authors' code: paper (full parameters) or paper-lora.")
    ] = "fixed",
    steps: int = 40,
    learning_rate: float = 1e-3,
    lora_rank: Annotated[int, typer.Option(help="0 trains all parameters.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens of a row; what is longer is cut, and counted.")] = 512,
    seed: Seed = 0,
) -> None:
    """Train a model and print its checkpoint folder, which every --model takes; a stopped run is resumed."""
    from derta_lib import supervision, training
    from derta_lib.corpus import concord
    from derta_lib.data import Pair, Triple, read_records
    from derta_lib.models import checkpoint_card

    corpus = concord(seed)
    recipe = training.Recipe(
        method=method,
        preset=supervision.preset(preset),
        steps=steps,
        learning_rate=learning_rate,
        lora_rank=lora_rank,
        lora_alpha=2 * max(1, lora_rank),  # without LoRA it counts for nothing
        max_length=max_length,
        seed=seed,
    )
    safety = read_records(Triple, triples) if triples else corpus.triples
    helpful = read_records(Pair, pairs) if pairs else corpus.pairs
    folder = training.train(model, safety, helpful, recipe)
    for what, count in checkpoint_card(str(folder))["cut"].items():
        print(f"derta: {count} {what}", file=sys.stderr)
    print(folder)


@cli.command()
def attack(
    attacks: Annotated[str, typer.Option(help="Names separated by commas, such as direct,prefilling-16,pair.")],
    out: Annotated[Path, typer.Option(help="Folder for responses.jsonl; what is there already is not made again.")],
    model: Model = "reference",
    behaviours: Behaviours = "concord",
    attacker: Annotated[str, typer.Option(help="Model that writes PAIR's prompts; the attacked one by default.")] = "",
    mutator: Annotated[str, typer.Option(help="Model that rewords AutoDAN's prompts; synonyms alone by default.")] = "",
    templates: Annotated[str, typer.Option(help="JSONL of JailbreakChat templates that hold {query}.")] = "",
    k: Annotated[int, typer.Option(help="SelfCipher's demonstrations.")] = 5,
    max_new_tokens: int = 128,
    streams: Annotated[int, typer.Option(help="PAIR's streams.")] = 20,
    iterations: Annotated[int, typer.Option(help="PAIR's iterations.")] = 3,
    population: Annotated[int, typer.Option(help="AutoDAN's population.")] = 256,
    steps: Annotated[int, typer.Option(help="AutoDAN's steps.")] = 100,
    seed: Seed = 0,
) -> None:
    """Attack a model: one JSON line a response, resumed where it was stopped."""
    from derta_lib.attacks.run import attack_command

    path = attack_command(
        model,
        [name.strip() for name in attacks.split(",")],
        behaviours,
        out,
        seed=seed,
        max_new_tokens=max_new_tokens,
        attacker=attacker,
        mutator=mutator,
        templates=templates,
        k=k,
        streams=streams,
        iterations=iterations,
        population=population,
        steps=steps,
    )
    print(f"The responses are in {path}")


@cli.command()
def judge(
    file: File,
    out: Annotated[Path, typer.Option(help="Where the verdicts go, one line a line.")],
    judge: Annotated[str, typer.Option(help=f"{', '.join(NAMES)} (corpus: exact, for Concord alone).")] = DEFAULT,
) -> None:
    """Judge responses: id, query, response and optionally prompt and continues in, verdicts out; resumed if stopped."""
    from derta_lib.judges.files import judge_file

    counts = judge_file(file, out, judge)
    print(f"{counts['n']} responses judged: {counts['unsafe']} unsafe, {counts['unscored']} unscored; see {out}")


@cli.command()
def position(
    out: Annotated[Path, typer.Option(help="JSONL file for the first refusals and P(refusal) along r̂.")],
    model: Model = "reference",
    behaviours: Behaviours = "concord",
    max_new_tokens: int = 64,
    seed: Seed = 0,
) -> None:
    """Where a model refuses, and how likely it is to at every place of a harmful response; resumed if stopped."""
    from derta_lib.position import position_command

    early = position_command(model, behaviours, out, max_new_tokens=max_new_tokens, seed=seed)
    print(f"Refusals that start within the first five tokens: {early or 'nothing was refused'}; see {out}")


@cli.command()
def seeds(
    out: Annotated[Path, typer.Option(help="JSON file for outcomes, machine, budget and date.")],
    profile: Annotated[str, typer.Option(help="Profile of notebooks/profiles whose budget is taken.")] = "seeds",
    seeds: Annotated[int, typer.Option(help="Trainings of each component: seeds 0, 1, ...")] = 5,
    workers: Annotated[int, typer.Option(help="Trainings at once.")] = 1,
) -> None:
    """Train and attack every component with several seeds, for intervals over trainings."""
    from derta_lib.seeds import make_seeds

    made = make_seeds(out, project_root(), profile, seeds, workers)
    print(f"{made.says} See {out}")


@cli.command()
def bench(
    out: Annotated[Path, typer.Option(help="JSON file for numbers, times, machine and date.")] = Path("bench.json"),
    model: Annotated[
        str, typer.Option(help='As elsewhere, or "llama3-8b": that shape with random weights.')
    ] = "reference",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    triples: Annotated[int, typer.Option(help="Triples a step.")] = 8,
    rounds: Annotated[int, typer.Option(help="Rounds in which the contenders take turns.")] = 3,
) -> None:
    """Measure training steps and generation against the authors' computation, TRL and plain generate."""
    root = project_root()
    if not (root / "benchmarks" / "bench.py").exists():
        raise UsageError("derta bench needs the repository's benchmarks folder; run it inside a checkout.")
    sys.path.insert(0, str(root))
    from benchmarks.bench import bench as run

    run(out, model=model, device=device, triples=triples, rounds=rounds)
    print(f"Numbers, times and machine are in {out}")


def app() -> None:
    """Entry point of `derta`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what it has begun ends, too
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        cli()
    except (DertaError, ImportError, OSError, RuntimeError, SafetensorError) as error:
        if not (said := _sentence(error)):
            raise
        print(f"derta: {said}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, DertaError) else 1)


def _sentence(error: Exception) -> str:
    """What the command line says of an error that its user can mend; "" for another."""
    if isinstance(error, DertaError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        extras = "derta-lib[book] for pages, derta-lib[dpo] for DPO, derta-lib[dev] for all"
        return f"the package '{error.name}' is missing; install {extras}."
    if isinstance(error, ImportError):  # a package that another one finds too old
        return f"{error}."
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}."
    if "No space left" in str(error) or "file write failed" in str(error):  # safetensors' words, and torch's
        return "the disk is full, so the weights could not be written; make room, or name another place (DERTA_CACHE)."
    if "home directory" in str(error):
        return f"{error} Set HOME, or DERTA_CACHE where a cache is wanted, or write the folder out."
    if "out of memory" in str(error):
        return f"{first_line(error)}. Take shorter texts (--max-length, --max-new-tokens) or a smaller model."
    return ""


if __name__ == "__main__":
    app()
