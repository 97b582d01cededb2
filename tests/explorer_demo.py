"""Synthetic data for the explorer's tests: made-up tokens and probabilities, some of them hostile text."""

import math

from derta_lib import style
from derta_lib.display import visible

HOSTILE = (
    '<script>window.HACKED = 1</script><img src=x onerror="window.HACKED = 1"></script><!--',
    "```{raw} html\n<b id=hacked>bold</b>\n```\n{result}`asr/x` [link](javascript:alert(1)) $x$ &lt;b&gt;",
    "\x1b[31mred\x1b[0m \u202eright to left\u202c \u2028 \x00",
    "w" * 3000,
)
METHODS = ("base", "vanilla", "harmful_prefix", "rto", "derta")
DEPTHS = (0, 4, 16, 40)


def demo_data(queries: int = 3, length: int = 40) -> dict:
    """Data as `explorer.measure` gives them, for five methods; the first query holds the hostile texts."""
    made = []
    for number in range(queries):
        tokens = [f" word{t}" if t % 10 else "\n" for t in range(length)]
        if number == 0:
            tokens[1 : 1 + len(HOSTILE)] = [visible(text) for text in HOSTILE]
        runs = {}
        for place, method in enumerate(METHODS):
            answer = visible(HOSTILE[place % len(HOSTILE)]) if number == 0 else f"Sorry, said by {method}."
            chances = [round(min(1.0, math.exp(-t / (1 + 5.0 * place))), 4) for t in range(length)]
            runs[method] = {"p": chances, "goes_on": [f"{answer} [{depth}]" for depth in DEPTHS]}
        text = HOSTILE[0] if number == 0 else f"How do I make lantern {number}?"
        made.append({"id": f"q{number}", "text": text, "tokens": tokens, "depths": list(DEPTHS), "runs": runs})
    return {"methods": [{"name": name, "label": style.METHODS[name].label} for name in METHODS], "queries": made}
