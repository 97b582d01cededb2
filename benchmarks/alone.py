"""Peak memory of one contender in a process of its own, on a CPU: `python -m benchmarks.alone NAME MODEL TRIPLES`."""

import json
import resource
import sys

from benchmarks import contenders

STEPS = 3
"""The first leaves memory that the next may not be able to use again: a training needs more than one step does."""


def peak() -> int:
    """Bytes resident at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    name, model, triples = sys.argv[1:]
    work = contenders.corpus_work(int(triples))
    step = contenders.make(name, contenders.base_model(model, "cpu"), work)
    loaded = peak()
    for _ in range(STEPS):
        step()
    print(json.dumps({"peak": peak(), "loaded": loaded}))
