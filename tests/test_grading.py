"""Answers read from responses, worked by hand; on the released responses, against the paper's Tables 2 and 10."""

import os
from decimal import Decimal

import pytest

from derta_lib.grading import chosen_option, final_number, grade_gsm8k, grade_mmlu, last_is_right


@pytest.mark.parametrize(
    ("text", "question", "number"),
    [
        ("2 + 2 = <<2+2=4>>4\n#### 1,234", "", "1234"),
        ("The answer is 12 apples, not 13.", "", "12"),
        ("So we get \\boxed{-7}. That took 3 steps.", "", "-7"),
        ("First 3, then 4.\nTherefore she needs 3 + 4 = 7 candles.", "", "7"),
        ("Therefore he earned $42 from selling tea for 6 hours.", "He sold tea for 6 hours.", "42"),
        ("It took 120 minutes (2 hours).", "", "120"),
        ("It costs $13.50.", "", "13.50"),
        ("The answer is 48 + 24 = 72.", "", "72"),
        ("The answer is $48 - $24 * 1 = $24, not 25.", "", "24"),
        ("The answer is 7, because 2 * 7 = 14.", "", "7"),
        ("Some remain (5 of them red, and 8 blue).", "", "8"),  # in brackets alone
        ("There are no candles at all.", "", None),
        ("", "", None),
    ],
)
def test_final_number(text: str, question: str, number: str | None) -> None:
    assert final_number(text, question) == (None if number is None else Decimal(number))


def test_gsm8k_compares_values_not_spellings() -> None:
    reference = "She sold 48/2 = 24.\n#### 24"
    assert grade_gsm8k("She sold 24.00 candles.", reference, "How many?") is True
    assert grade_gsm8k("She sold 25 candles.", reference, "How many?") is False
    assert grade_gsm8k("She sold some candles.", reference, "How many?") is None


QUESTION = "Which of these is a colour?\n-options\n-(A) honey\n-(B) green\n-(C) dark green\n-(D) a candle\n"


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The correct answer is (B) green.", "B"),
        ("The answer is not (A), for honey is food. The correct option is B.", "B"),
        ("C", "C"),
        ("The answer is a candle.", "D"),
        ("The answer is b.", "B"),
        ("the answer is (c), dark green", "C"),
        ("THE ANSWER IS C) dark green", "C"),
        ("B) green, as everybody knows.", "B"),
        ("A candle is no colour, so this leaves (B).", "B"),
        ("I would say it is dark green.", "C"),
        ("That is hard to tell.", None),
        ("The answer is (E).", None),
        ("", None),
    ],
)
def test_chosen_option(response: str, letter: str | None) -> None:
    assert chosen_option(response, QUESTION) == letter


@pytest.mark.parametrize(
    ("task", "response", "answer", "right"),
    [
        ("GSM8K", "It takes 120 minutes (2 hours).", "#### 120", False),  # where `final_number` reads 120
        ("GSM8K", "It takes 2 hours, or 1,200 minutes.", "so 600 * 2 = 1200\n#### 1200", True),
        ("GSM8K", "Nobody knows.", "#### 3", False),
        ("MMLU", "(A) is wrong, so (B).", "-B", True),
        ("MMLU", "The answer is (B), not (A).", "-B", False),
        ("MMLU", "B", "B", False),
    ],
)
def test_the_plain_reading_takes_what_stands_last(task: str, response: str, answer: str, right: bool) -> None:
    assert last_is_right(task, response, answer) is right


@pytest.mark.parametrize("answer", ["B", "-B", "(B)"])
def test_mmlu(answer: str) -> None:
    assert grade_mmlu("The answer is (B).", answer, QUESTION) is True
    assert grade_mmlu("The answer is (D).", answer, QUESTION) is False
    assert grade_mmlu("Nobody knows.", answer, QUESTION) is None


@pytest.mark.skipif(not os.environ.get("DERTA_RELEASE_DIR"), reason="set DERTA_RELEASE_DIR to the authors' release")
@pytest.mark.slow
def test_released_answers_give_the_papers_accuracy() -> None:
    from derta_lib.release import read_release
    from derta_lib.release_tables import helpfulness
    from derta_lib.rescore import grade

    responses, _ = read_release(os.environ["DERTA_RELEASE_DIR"])
    table = helpfulness(grade([response for response in responses if response.attack in ("GSM8K", "MMLU")]))
    told = table.dropna(subset="paper").assign(gap=lambda frame: frame["difference"].abs())
    assert len(told) == 18
    assert (told.groupby("attack")["gap"].mean() < 1.5).all()
    assert ((told["last"] - told["paper"]).abs().groupby(told["attack"]).mean() > 3).all()
    assert (table["unscored"] <= 15).all()
