"""Results of a run: named numbers, each with its n and its interval, in one file."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from derta_lib.errors import DertaError
from derta_lib.records import read_json


@dataclass(frozen=True)
class Number:
    """A result. `unit` is 'rate' (0 to 1, shown in percent), 'points', 'seconds', 'tokens/s', 'ratio', 'count', ...

    `low` and `high` bound the 95 % interval where there is one; `n` is the number of observations.
    """

    value: float
    unit: str = "rate"
    n: int | None = None
    low: float | None = None
    high: float | None = None

    def parts(self) -> dict[str, str]:
        """As text: `value`, and `interval` and `n` where they are known."""
        scale, digits, suffix = 1, 2, f" {self.unit}" if self.unit else ""
        if self.unit == "rate":
            scale, digits, suffix = 100, 1, " %"
        elif self.unit == "count":
            digits, suffix = 0, ""
        elif self.unit == "points":
            digits = 1
        elif not 0.2 <= abs(self.value) < 1000:
            digits = 0 if abs(self.value) >= 1000 else 3 if self.value else 2
        parts = {"value": f"{self.value * scale:z,.{digits}f}{suffix}"}
        if self.low is not None and self.high is not None:
            parts["interval"] = f"{self.low * scale:z,.{digits}f} to {self.high * scale:z,.{digits}f}"
        return parts if self.n is None else parts | {"n": f"{self.n:,}"}

    def __str__(self) -> str:
        parts = self.parts()
        interval = f" [{parts['interval'].replace(' to ', ', ')}]" if "interval" in parts else ""
        return parts["value"] + interval + (f", n = {self.n}" if "n" in parts else "")


Results = dict[str, Number]
"""Numbers by key; a key is a path such as `asr/derta/prefilling-8`."""


def load(path: Path | str) -> Results:
    """Read a results file; raises DertaError naming the key whose entry is not a number record."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise DertaError(f"{path}: this is no results file; make the run again.")
    if bad := [key for key, fields in found.items() if not _is_number(fields)]:
        raise DertaError(f"{path}: the entry '{bad[0]}' is not a number record; make the run again.")
    return {key: Number(**fields) for key, fields in found.items()}


def _is_number(fields: Any) -> bool:
    """Whether fields are those of a Number, all of them finite, the value in its interval and a rate's from 0 to 1."""
    try:
        number = Number(**fields)
        low, high = (number.value if bound is None else bound for bound in (number.low, number.high))
        in_order = low <= number.value <= high and (number.unit != "rate" or 0 <= low <= high <= 1)
        finite = map(math.isfinite, [low, number.value, high, 0 if number.n is None else number.n])
        return in_order and isinstance(number.unit, str) and all(finite)
    except TypeError:
        return False
