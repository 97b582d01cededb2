"""Results of a run: named numbers, each with its n and its interval, in one file."""

from dataclasses import asdict, dataclass
from pathlib import Path

from derta_lib.errors import DertaError
from derta_lib.records import read_json, write_json


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

    def __str__(self) -> str:
        percent = self.unit == "rate"
        scale, digits, suffix = (100, 1, " %") if percent else (1, 2, f" {self.unit}" if self.unit else "")
        text = f"{self.value * scale:.{digits}f}{suffix}"
        if self.low is not None and self.high is not None:
            text += f" [{self.low * scale:.{digits}f}, {self.high * scale:.{digits}f}]"
        return text + (f", n = {self.n}" if self.n is not None else "")


Results = dict[str, Number]
"""Numbers by key; a key is a path such as `asr/derta/prefilling-8`."""


def save(path: Path | str, results: Results) -> Path:
    return write_json(path, {key: asdict(number) for key, number in results.items()})


def load(path: Path | str) -> Results:
    """Read a results file; raises DertaError naming the key whose entry is not a number record."""
    numbers: Results = {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise DertaError(f"{path}: this is no results file; make the run again.")
    for key, fields in found.items():
        try:
            numbers[key] = Number(**fields)
        except TypeError:
            raise DertaError(f"{path}: the entry '{key}' is not a number record; make the run again.") from None
    return numbers
