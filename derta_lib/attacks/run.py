"""From attacks and behaviours to a file of responses: one JSON line a response, resumed where it was stopped."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from derta_lib.attacks import build, check, check_once, jailbreakchat, prefilling
from derta_lib.attacks.base import Attack, Attempt, SingleTurn, prompt_text, run_together
from derta_lib.behaviours import load_behaviours
from derta_lib.data import Behaviour
from derta_lib.errors import UsageError
from derta_lib.judges.corpus import judge_of
from derta_lib.models import model_key
from derta_lib.records import append_jsonl, check_output, content_key, resume_jsonl, write_jsonl
from derta_lib.runs import versions
from derta_lib.target import Target


def attack(
    behaviours: Sequence[Behaviour],
    attacks: Sequence[Attack],
    target: Target,
    out: Path | str,
    *,
    seed: int,
    target_key: str,
    helper_keys: Mapping[str, str] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Attack `target` with every attack on every behaviour; returns the records of the JSONL file `out`, in order.

    A record has `id`, `attack`, `access`, `behaviour`, `benign`, `query`, `prompt` (readable text), `continues` (the
    response goes on from a raw prompt), `prefill`, `prompt_hash`, `response`, `seed`, `model`, `versions` and `details`
    (what the attack tells of itself, budgets among it). Its id is a key of content: the attack's fingerprint (prompt or
    parameters, `max_new_tokens`), the behaviour, the seed and `target_key`, which must change with the weights of the
    target (`models.model_key`); `helper_keys` has those of a model that helps, by the attack's name.

    The prompts of single-turn attacks go to the target together, since many decode faster at once. Each response is
    appended as soon as it is there. Run again, records that are there are not made again; the file ends up the same in
    fp32, while in bf16 a near-tie may fall the other way among other neighbours. A search (PAIR, AutoDAN) that was
    stopped half-way starts afresh. Raises UsageError for a repeated attack or behaviour, and for a file that holds
    records of another request.
    """
    if len({behaviour.id for behaviour in behaviours}) < len(behaviours):
        raise UsageError("behaviours: an id occurs more than once; give every behaviour its own.")
    check_once([one.name for one in attacks])
    ids = {
        (one.name, b.id): content_key(
            one.fingerprint(b, seed), b.id, b.query, b.benign, seed, target_key, helper_keys.get(one.name)
        )
        for one in attacks
        for b in behaviours
    }
    out = Path(out)
    kept = resume_jsonl(out, required=("behaviour", "response"))
    if foreign := kept.keys() - ids.values():
        raise UsageError(
            f"{out}: it holds {len(foreign)} responses of another request; name a new folder or delete it."
        )
    about = {"seed": seed, "model": target.name, "versions": versions()}
    left = [(one, b) for one in attacks for b in behaviours if ids[one.name, b.id] not in kept]
    # disable=None: a bar on a terminal, and nothing in a notebook's pages or a log file
    bar = tqdm(_attempts(left, target, seed), "attacks", len(left), leave=False, unit="response", disable=None)
    write_jsonl(out, kept.values())  # a torn last line goes, and a line that stands twice
    for one, attempt in bar:
        bar.set_description(one.name)
        record = _record(ids[one.name, attempt.behaviour.id], one, attempt) | about
        append_jsonl(out, record)
        kept[record["id"]] = record
    assert len(kept) == len(ids)
    records = [kept[key] for key in ids.values()]
    write_jsonl(out, records)  # in order, and whole even if another run has begun the file anew meanwhile
    return records


def _attempts(left: Sequence[tuple[Attack, Behaviour]], target: Target, seed: int) -> Iterator[tuple[Attack, Attempt]]:
    """An attempt for each pair: those of single-turn attacks together, then each search by itself."""
    yield from run_together([(one, b) for one, b in left if isinstance(one, SingleTurn)], target, seed=seed)
    for one in {one.name: one for one, _ in left if not isinstance(one, SingleTurn)}.values():
        for attempt in one.run([b for other, b in left if other is one], target, seed=seed):
            yield one, attempt


def attack_command(
    model: str,
    names: Sequence[str],
    source: str,
    out: Path | str,
    *,
    seed: int = 0,
    max_new_tokens: int = 128,
    attacker: str = "",
    mutator: str = "",
    templates: str = "",
    **budgets: int,
) -> Path:
    """`derta attack`: attack the model of that name with the attacks `names` on the behaviours of `source`.

    Writes `out`/responses.jsonl (`attack` says how) and returns its path. `attacker` (of pair, by default the attacked
    model itself) and `mutator` (of autodan, by default none) are names of models; `templates` is a file for
    jailbreakchat; `budgets` are those of `attacks.build` (k, streams, iterations, population, ...). Where all
    behaviours are of the corpus's categories they are judged exactly, else by the default judge. Names and files are
    checked before any model is loaded.
    """
    from derta_lib.corpus import concord
    from derta_lib.generation import local_target

    check(names, max_new_tokens=max_new_tokens, **budgets)
    if Path(out).is_file():
        raise UsageError(f"{out}: this is a file; name a folder for the responses.")
    behaviours = load_behaviours(source, seed=seed)
    pool = jailbreakchat.read_templates(templates) if templates else jailbreakchat.TEMPLATES
    for name in names:
        if name.startswith("prefilling"):
            for behaviour in behaviours:
                prefilling.harmful(name, behaviour)
    helping = {"pair": attacker if attacker != model else "", "autodan": mutator}
    helping = {name: helper for name, helper in helping.items() if helper and name in names}
    key, keys = model_key(model), {name: model_key(helper) for name, helper in helping.items()}
    path = Path(out) / "responses.jsonl"
    check_output(path, source)
    target = local_target(model)
    targets = {model: target} | {name: local_target(name) for name in {*helping.values()} - {model}}
    judge = judge_of(behaviours)
    demonstrations = concord(seed, pairs=0).triples
    chosen = [
        build(
            name,
            max_new_tokens=max_new_tokens,
            cut=target.cut,
            demonstrations=demonstrations,
            templates=pool,
            attacker=targets[helping.get("pair", model)],
            mutator=targets[helping["autodan"]] if "autodan" in helping else None,
            judge=judge,
            **budgets,
        )
        for name in names
    ]
    attack(behaviours, chosen, target, path, seed=seed, target_key=key, helper_keys=keys)
    return path


def _record(key: str, one: Attack, attempt: Attempt) -> dict[str, Any]:
    return {
        "id": key,
        "attack": one.name,
        "access": one.access,
        "behaviour": attempt.behaviour.id,
        "benign": attempt.behaviour.benign,
        "query": attempt.behaviour.query,
        "prompt": prompt_text(attempt.prompt),
        "continues": attempt.prompt.raw is not None,
        "prefill": attempt.prompt.prefill,
        "prompt_hash": content_key(asdict(attempt.prompt)),
        "response": attempt.response,
        "details": attempt.details,
    }
