"""Reader of the responses that the paper's authors released (github.com/RobustNLP/DeRTa, MIT), matched by question.

The text is harmful in places: it stays in memory, no `repr` shows it, and nothing here writes it anywhere.
Their evaluation script shuffles and pads without ids, so rows repeat or are missing: both are counted and reported.
"""

import json
import re
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

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
"""Questions of an attack where it is not all 200 (the paper's section 3.1, version 1)."""

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


def read_release(release_dir: str | Path) -> tuple[list[Response], pd.DataFrame]:
    """All responses under `release_dir`, each question once per model, method and attack; and a report, a row a file.

    Columns of the report: file, attack ("not read" for one of another folder than those of the paper's attacks and
    tasks), model, method, rows, kept, repeated (a question that the same file or an earlier one of the cell has
    answered), unmatched (kept, though no question was found), missing (questions without a response). Raises
    DertaError when the folder is not a copy of the release, or naming the file and line that cannot be read.
    """
    folder = Path(release_dir)
    prompts = next((path for path in (folder / "prompts", folder / "data/test") if path.is_dir()), None)
    if prompts is None or not (folder / "results").is_dir():
        raise DertaError(
            f"{folder}: this is no copy of the authors' release, which has folders results and prompts (or data/test); "
            "clone https://github.com/RobustNLP/DeRTa and name the clone, or leave release_dir empty."
        )
    questions, opening = _questions(prompts)
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
        done = seen.setdefault((model, method, attack), set())
        count = dict.fromkeys(_COUNTS, 0)
        for line, row in _rows(path):
            try:
                response = _response(row, model, method, attack, questions[attack], opening)
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
        count["missing"] = ASKED.get(attack, len(questions[attack])) - len(done)
        report.append({"file": name, "attack": attack, "model": model, "method": method} | count)
    if not responses:
        raise DertaError(f"{folder}/results: there is not one response here; take a new copy of the release.")
    return responses, pd.DataFrame(report)


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


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text).casefold()


def _questions(prompts: Path) -> tuple[dict[str, dict[str, str]], re.Pattern[str]]:
    """The questions of each attack and task, by the letters that ask for them, and how CompletingAttack's prompts read.

    White space, which some files have lost, never matters.
    """

    def read(name: str) -> list[str]:
        return [row["question"] for _, row in read_jsonl(prompts / f"{name}.json", required=("question",))]

    asked, declared = read("safety_illegal_instructions_200"), read("safety_completionattack")
    by_letters = {_letters(question): question for question in asked}
    questions = dict.fromkeys(ATTACKS.values(), by_letters)
    pairs = zip(map(_letters, declared), _assign(declared, asked), strict=True)
    questions["CompletingAttack"] = {letters: asked[place] for letters, place in pairs}
    for file, task in (("gsm8k_500", "GSM8K"), ("mmlu_500", "MMLU"), ("alpaca_eval_300", "AlpacaEval")):
        questions[task] = {_letters(question): question for question in read(f"helpfulness_{file}")}
    starts = (r"\s*" + r"\s*".join(map(re.escape, "".join(text.split()))) for text in declared)
    return questions, re.compile("|".join(starts))


def _assign(declared: list[str], questions: list[str]) -> np.ndarray:
    """For each declarative text the index of its question: the one-to-one pairing that shares the most rare words.

    The two files have different orders. Words are compared by their first six letters.
    """
    words = pd.Series([*declared, *questions]).str.lower().str.findall(r"([a-z0-9]{3,6})[a-z0-9]*")
    held = words.str.join(" ").str.get_dummies(" ").to_numpy()
    ours, theirs = held[: len(declared)], held[len(declared) :]
    shared = (ours / held.sum(axis=0)) @ theirs.T / (theirs / held.sum(axis=0)).sum(axis=1)
    return linear_sum_assignment(shared, maximize=True)[1]


_PAIR = re.compile(
    r"Goal: (?P<goal>.*?)\n.*?(?:PROMPT:\n(?P<prompt>.*?)Example Jailbreak RESPONSE:\n(?P<response>.*))?\Z", re.DOTALL
)


def _response(
    row: Any, model: str, method: str, attack: str, questions: dict[str, str], opening: re.Pattern[str]
) -> Response:
    answer, found = None, None
    if attack == "PAIR":
        parts = _PAIR.search(row)
        if parts is None:
            raise KeyError("Goal")
        found = parts["response"] is not None
        asks, prompt, response = parts["goal"], parts["prompt"] or "", parts["response"] or ""
    elif attack == "CompletingAttack":
        begun = opening.match(row)
        asks = prompt = begun[0] if begun else ""
        response = row[len(prompt) :]
    else:
        asks = prompt = row["question"] if "question" in row else row["instruction"]
        response, answer = row["response"], row.get("answer")
    if attack == "CodeAttack":  # it pushes the request word by word, last first
        asks = "".join(reversed(re.findall(r'\.append\("(.*?)"\)', prompt)))
    letters = _letters(asks)
    query = questions.get(max((key for key in questions if key in letters), key=len, default=""), "")
    question = content_key(_letters(query)) if query else None
    return Response(model, method, attack, question, query, prompt, response.strip(), answer, found)
