"""Reader of the responses that the paper's authors released (github.com/RobustNLP/DeRTa, MIT), matched by question.

The text is harmful in places: it stays in memory, no `repr` shows it, and nothing here writes it anywhere.
Their evaluation script shuffles and pads without ids, so rows repeat or are missing: both are counted and reported.
"""

import json
import re
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from derta_lib.errors import DertaError
from derta_lib.records import content_key, read_jsonl

ATTACKS = {
    "codeattack": "CodeAttack",
    "pair": "PAIR",
    "jailbreakchat": "JailbreakChat",
    "selfcipher": "SelfCipher",
    "completionattack": "CompletingAttack",
    "autodan": "AutoDAN",
}
METHODS = {"derta": "derta", "ours": "derta", "dpo": "dpo", "recaug": "recaug", "vanill": "vanilla"}
"""A method by what a file name says of it."""
TASKS = {"gsm8k": "GSM8K", "mmlu": "MMLU", "alpacaeval": "AlpacaEval"}
ASKED = {"PAIR": 50, "AutoDAN": 50}
"""Questions of an attack where it is not all 200 (the paper's section 4.1)."""

COMMIT = "70bdb52b5e139f32f5a723b5f09d2b0befa81657"
"""Of the authors' repository: the one whose files gave the kept figures."""
ARCHIVE = f"https://github.com/RobustNLP/DeRTa/archive/{COMMIT}.zip"


@dataclass(frozen=True)
class Response:
    """One released response. `question` is the hashed id of the question, None where no question could be found.

    `query` is the underlying request ("" where there was none in the prompt), `prompt` what the model saw; `answer` is
    the reference answer of GSM8K and MMLU. `found` is for PAIR, whose files hold only the end of each search: whether
    the search found a jailbreak (when it did not, `response` is empty).
    """

    model: str
    method: str
    attack: str
    question: str | None
    query: str = field(repr=False)
    prompt: str = field(repr=False)
    response: str = field(repr=False)
    answer: str | None = field(default=None, repr=False)
    found: bool | None = None

    @property
    def id(self) -> str:
        """Hash of everything the response is: its name wherever text may not go."""
        return content_key(self.model, self.method, self.attack, self.prompt, self.response)


@dataclass(frozen=True)
class Release:
    """All responses that count, and `files`: one row a file with what was read, kept and left out.

    Columns of `files`: file, attack, model, method, rows, kept, repeated (a question that the same file or an
    earlier one of the cell has answered), unmatched (kept, though no question was found), missing (questions
    without a response).
    """

    responses: tuple[Response, ...] = field(repr=False)
    files: pd.DataFrame


def read_release(release_dir: str | Path) -> Release:
    """Read results/ and prompts/ under `release_dir`, every file, each question once per model, method and attack.

    Files of other folders than those of the paper's attacks and tasks are listed as "not read". Raises DertaError when
    the folder is not a copy of the release, or naming the file and line that cannot be read.
    """
    folder = Path(release_dir)
    prompts = next((path for path in (folder / "prompts", folder / "data/test") if path.is_dir()), None)
    if prompts is None or not (folder / "results").is_dir():
        raise DertaError(
            f"{folder}: this is no copy of the authors' release, which has folders results and prompts (or data/test); "
            "clone https://github.com/RobustNLP/DeRTa and name the clone, or leave release_dir empty."
        )
    matchers = _matchers(prompts)
    responses: list[Response] = []
    report: list[dict[str, Any]] = []
    seen: dict[tuple[str, str, str], set[str]] = {}
    for path in sorted(path for path in (folder / "results").rglob("*") if path.is_file()):
        attack = (ATTACKS | TASKS).get(path.parent.name)
        name = path.relative_to(folder).as_posix()
        if attack is None or path.suffix not in (".json", ".list"):
            report.append({"file": name, "attack": "not read", "model": "", "method": ""} | dict.fromkeys(_COUNTS, 0))
            continue
        model, method = _model(path.name)
        asked = ASKED.get(attack, matchers[attack].size)
        done = seen.setdefault((model, method, attack), set())
        count = dict.fromkeys(_COUNTS, 0)
        for line, row in _rows(path):
            try:
                response = _response(row, model, method, attack, matchers[attack])
            except (KeyError, TypeError, AttributeError):
                raise DertaError(f"{path}, line {line}: this is not a row of {attack}; take a new copy.") from None
            count["rows"] += 1
            key = response.question or response.id
            if key in done:
                count["repeated"] += 1
                continue
            done.add(key)
            count["kept"] += 1
            count["unmatched"] += response.question is None
            responses.append(response)
        count["missing"] = asked - len(done)
        report.append({"file": name, "attack": attack, "model": model, "method": method} | count)
    if not responses:
        raise DertaError(f"{folder}/results: there is not one response here; take a new copy of the release.")
    return Release(tuple(responses), pd.DataFrame(report))


_COUNTS = ("rows", "kept", "repeated", "unmatched", "missing")


def download_release(folder: str | Path, url: str = ARCHIVE) -> Path:
    """Fetch the authors' repository (about 40 MB) and keep its results and prompts under `folder`, whole or not at all.

    A folder that is there already is left as it is. Raises DertaError when the archive cannot be fetched or read.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        try:
            urllib.request.urlretrieve(url, f"{temporary}/zip")
            with zipfile.ZipFile(f"{temporary}/zip") as archive:
                wanted = [n for n in archive.namelist() if n.split("/")[1:2] == ["results"] or "/data/test/" in n]
                archive.extractall(temporary, wanted)
        except (OSError, zipfile.BadZipFile) as error:
            raise DertaError(
                f"{url} could not be fetched ({error}); try again, or clone it and name the clone as release_dir."
            ) from None
        if not wanted:
            raise DertaError(f"{url}: the archive holds no results; clone the repository and name it as release_dir.")
        (Path(temporary) / wanted[0].split("/")[0]).rename(folder)
    return folder


def _model(name: str) -> tuple[str, str]:
    """Model (named as in the paper's tables) and method, from a file name of the release."""
    if llama := re.search(r"llama-3-(8b|70b)(-ins)?", name, re.IGNORECASE):
        model = f"LLaMA3-{llama[1].upper()}" + ("-Instruct" if llama[2] else "")
    elif gpt := re.search(r"gpt-(3\.5|4)", name):
        model = {"3.5": "ChatGPT", "4": "GPT-4"}[gpt[1]]
    else:
        raise DertaError(f"{name}: the file name says no model that the paper has; take it away or rename it.")
    return model, next((method for word, method in METHODS.items() if word in name.lower()), "official")


def _rows(path: Path) -> list[tuple[int, Any]]:
    """(line, row) of a file: one JSON value a line, or (.list) a list that torch.save wrote."""
    if path.suffix == ".list":
        import torch

        try:  # weights_only: plain containers and strings, no code
            return list(enumerate(torch.load(path, weights_only=True), start=1))
        except Exception as error:
            raise DertaError(f"{path}: not a list of rows ({type(error).__name__}); take a new copy.") from None
    rows = []
    # split at "\n" alone: str.splitlines would also cut at characters inside a response
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except ValueError:
                raise DertaError(f"{path}, line {number}: not valid JSON; take a new copy.") from None
    return rows


_Find = Callable[[str], tuple[str, int] | None]
"""The question of a prompt (or of a row that starts with one), and where the prompt ends."""


@dataclass(frozen=True)
class _Matcher:
    size: int
    find: _Find = field(repr=False)


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text).casefold()


def _questions(path: Path) -> list[str]:
    return [row["question"] for _, row in read_jsonl(path, required=("question",))]


def _matchers(prompts: Path) -> dict[str, _Matcher]:
    """A matcher for each attack and task. White space, which some files have lost, never matters."""
    questions = _questions(prompts / "safety_illegal_instructions_200.json")
    by_letters = {_letters(question): question for question in questions}

    def asked_for(prompt: str) -> tuple[str, int] | None:
        text = _letters(prompt)
        key = max((key for key in by_letters if key in text), key=len, default=None)
        return None if key is None else (by_letters[key], len(prompt))

    def on_the_stack(prompt: str) -> tuple[str, int] | None:  # CodeAttack pushes the request word by word, last first
        words = reversed(re.findall(r'\.append\("(.*?)"\)', prompt))
        question = by_letters.get(_letters("".join(words)))
        return None if question is None else (question, len(prompt))

    declared = _questions(prompts / "safety_completionattack.json")
    starts = [re.compile(r"\s*" + r"\s*".join(map(re.escape, "".join(text.split())))) for text in declared]
    asks = [questions[i] for i in _assign(declared, questions)]

    def declaration(text: str) -> tuple[str, int] | None:
        return next(
            ((ask, hit.end()) for ask, start in zip(asks, starts, strict=True) if (hit := start.match(text))), None
        )

    finders: dict[str, _Find] = dict.fromkeys(ATTACKS.values(), asked_for)
    finders |= {"CodeAttack": on_the_stack, "CompletingAttack": declaration}
    matchers = {attack: _Matcher(len(questions), find) for attack, find in finders.items()}
    for file, task in (("gsm8k_500", "GSM8K"), ("mmlu_500", "MMLU"), ("alpaca_eval_300", "AlpacaEval")):
        texts = {_letters(text): text for text in _questions(prompts / f"helpfulness_{file}.json")}
        matchers[task] = _Matcher(len(texts), partial(_exact, texts))
    return matchers


def _exact(texts: dict[str, str], prompt: str) -> tuple[str, int] | None:
    # some files put a frame around a GSM8K or MMLU question
    frame = r"\A\s*(?:Choose the correct option for the given question\.)?\s*(?:Question:)?|Answer:\s*\Z"
    question = texts.get(_letters(re.sub(frame, "", prompt)))
    return None if question is None else (question, len(prompt))


def _assign(declared: list[str], questions: list[str]) -> np.ndarray:
    """For each declarative text the index of its question: the one-to-one pairing that shares the most rare words.

    The two files have different orders. Words are compared by their first six letters.
    """
    from scipy.optimize import linear_sum_assignment

    words = [{word[:6] for word in re.findall(r"[a-z0-9]{3,}", text.lower())} for text in (*declared, *questions)]
    vocabulary = {word: i for i, word in enumerate(sorted(set().union(*words)))}
    counts = np.zeros((len(words), len(vocabulary)))
    for row, found in zip(counts, words, strict=True):
        row[[vocabulary[word] for word in found]] = 1
    shared = (counts[: len(declared)] / counts.sum(axis=0)) @ counts[len(declared) :].T
    shared /= (counts[len(declared) :] / counts.sum(axis=0)).sum(axis=1)
    return linear_sum_assignment(shared, maximize=True)[1]


_PAIR = re.compile(
    r"Goal: (?P<goal>.*?)\n.*?(?:PROMPT:\n(?P<prompt>.*?)Example Jailbreak RESPONSE:\n(?P<response>.*))?\Z", re.DOTALL
)


def _response(row: Any, model: str, method: str, attack: str, matcher: _Matcher) -> Response:
    answer, found = None, None
    if attack == "PAIR":
        parts = _PAIR.search(row)
        if parts is None:
            raise KeyError("Goal")
        found = parts["response"] is not None
        prompt, response = parts["prompt"] or "", parts["response"] or ""
        match = matcher.find(parts["goal"])
    elif attack == "CompletingAttack":
        match = matcher.find(row)
        end = match[1] if match else 0
        prompt, response = row[:end], row[end:]
    else:
        prompt = row["question"] if "question" in row else row["instruction"]
        response, answer = row["response"], row.get("answer")
        match = matcher.find(prompt)
    question, query = (content_key(_letters(match[0])), match[0]) if match else (None, "")
    return Response(model, method, attack, question, query, prompt, response.strip(), answer, found)
