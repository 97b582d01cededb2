"""Grading of GSM8K (Cobbe et al., 2021) and MMLU (Hendrycks et al., 2021) responses against the reference answer.

A response from which no answer can be read is None; what that is worth, the table says that counts it
(`release_tables.helpfulness`). The rules see no reference answer, but they were written with the authors' responses at
hand and compared with the paper's accuracies: `last_is_right` is the plain reading beside them.
"""

import re
from decimal import Decimal

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
_STATED_NUMBER = re.compile(
    r"(?:####|\bfinal answer\b|\banswer(?: is|:)|\\boxed)[^\n\d]{0,40}?(" + _NUMBER.pattern + ")", re.I
)
_SUM = re.compile(r"(?:\s*[-+*/×÷]\s*\$?(?:" + _NUMBER.pattern + r"))+\s*=\s*\$?(" + _NUMBER.pattern + ")")


def final_number(text: str, question: str = "") -> Decimal | None:
    """The number a solution settles on, None when it has none.

    The one it states ("#### 7", "the answer is 7" or "3 + 4 = 7", boxed), else one of the last sentence with a number:
    behind its last "=", not in brackets ("120 minutes (2 hours)"), and rather not a number that the question gave
    ("42 dollars for 6 hours").
    """
    if stated := list(_STATED_NUMBER.finditer(text)):
        total = _SUM.match(text, stated[-1].end())
        return _decimal((total or stated[-1])[1])
    plain = re.sub(r"\((?!\d+\))[^()]*\)", " ", text)
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n", plain) if _NUMBER.search(part)]
    if not sentences:
        numbers = _NUMBER.findall(text)
        return _decimal(numbers[-1]) if numbers else None
    end = sentences[-1].rpartition("=")[2]
    numbers = [_decimal(found) for found in _NUMBER.findall(end) or _NUMBER.findall(sentences[-1])]
    given = {_decimal(found) for found in _NUMBER.findall(question)}
    fresh = [number for number in numbers if number not in given]
    return fresh[-1] if fresh else numbers[0]


def grade_gsm8k(response: str, answer: str, question: str) -> bool | None:
    """Whether the number that the response settles on equals the one after "####" in the reference solution."""
    given = final_number(response, question)
    return None if given is None else given == final_number(answer)


def last_is_right(task: str, response: str, answer: str) -> bool:
    """Whether the last number (GSM8K) or the last letter in brackets (MMLU) of a response is the answer."""
    if task == "GSM8K":
        numbers = _NUMBER.findall(response)
        return bool(numbers) and _decimal(numbers[-1]) == final_number(answer)
    return _BRACKETED.findall(response)[-1:] == [_letter(answer)]


def _letter(answer: str) -> str:
    return answer.strip().strip("-()").upper()


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


_OPTION = re.compile(r"^\s*-?\s*\(?([A-J])\)\s*(.*?)\s*$", re.MULTILINE)
_STATED = re.compile(
    r"(?i:(?:answer|option|choice)(?:\s+\w+){0,6}?\s*(?:is|:|would be|should be)\s*:?\s*(?:option\s*)?)"
    r"[\"'*(\-\s]*([A-J]\b(?![’'])|[a-j](?=\)|[.\"'*]*\s*$))",  # "a" is a word as well
    re.MULTILINE,
)
_BRACKETED = re.compile(r"\(([A-J])\)")
_BARE = re.compile(r"^\W*(?:option\s+)?([A-J])(?:[).:]|\s*$)", re.IGNORECASE)


def chosen_option(response: str, question: str) -> str | None:
    """The option letter a response settles on, None when it names none of the question's options.

    Tried in turn: the last letter stated as the answer ("the answer is (B)"), a response that opens with a letter,
    the last bracketed letter, and the one option whose words the end of the response repeats.
    """
    options = dict(_OPTION.findall(question))
    if stated := [letter.upper() for letter in _STATED.findall(response) if letter.upper() in options]:
        return stated[-1]
    if (bare := _BARE.match(response)) and bare[1].upper() in options and (len(response) < 4 or bare[1].isupper()):
        return bare[1].upper()
    if bracketed := [letter for letter in _BRACKETED.findall(response) if letter in options]:
        return bracketed[-1]
    # by wording: the option that is named last, the longer one when one contains another
    text = _plain(response)
    ends = {
        letter: (text.rfind(f" {words} ") + len(words), len(words))
        for letter, option in options.items()
        if (words := _plain(option).strip()) and f" {words} " in text
    }
    return max(ends, key=lambda letter: ends[letter]) if ends else None


def grade_mmlu(response: str, answer: str, question: str) -> bool | None:
    """Whether the option that the response settles on is the reference letter."""
    given = chosen_option(response, question)
    return None if given is None else given == _letter(answer)


def _plain(text: str) -> str:
    return " " + re.sub(r"[^\w.%$*/^+=-]+", " ", text.casefold()).strip(". ") + " "
