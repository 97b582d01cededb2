"""Sphinx extension: `{bench}` shows what `derta bench` measured, from the kept data files `bench_*.json`."""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from derta_lib.records import read_json
from derta_lib.results import Number
from derta_lib.sphinx_results import table

KEPT = Path(__file__).parent
ROWS = {
    "train/authors": "the authors' computation",
    "train/ours": "ours, preset paper-lora: the same sites as the authors'",
    "train/ours_fixed": "ours, preset fixed",
    "train/trl": "TRL's SFTTrainer (MLE rows only)",
    "scaling/length-64": "64 tokens of r̂",
    "scaling/length-256": "256 tokens of r̂",
    "scaling/length-1024": "1,024 tokens of r̂",
    **{f"scaling/triples-{n}": f"{n} triples a step" for n in (4, 8, 16, 32, 64, 128)},
    "generate/static": "generate, static batches of 25",
    "generate/ours": "ours",
    "generate/prompts": "the prompts",
}
"""What `derta bench` measures, in the order of the page."""
COLUMNS = {
    "triples": "triples a second",
    "tokens": "tokens a second",
    "peak_share": "share of the matrix peak",
    "peak_memory": "peak memory",
    "over_model": "of it over the loaded model",
    "times_authors": "times the authors'",
    "times_trl": "times TRL's tokens a second",
    "ms_per_token": "time a token",
    "attention": "attention's share of the time",
    "rest_per_token": "time a token without attention",
    "seconds": "time a step",
    "times_static": "times static batches",
    "shared": "tokens shared",
    "same_answers": "same answers",
}
PARTS = {"train": "A training step", "scaling": "How the cost grows", "generate": "Generation for attacks"}


class Bench(SphinxDirective):
    """`{bench}`: for each kept file its machine and date, and a table a part."""

    def run(self) -> list[nodes.Node]:
        for source in (__file__, KEPT):  # the folder, since a new file shows up too
            self.env.note_dependency(str(source))
        shown: list[nodes.Node] = []
        for path in sorted(KEPT.glob("bench_*.json")):
            self.env.note_dependency(str(path))
            kept = read_json(path)
            shown.append(machine_line(kept))
            for part, title in PARTS.items():
                if any(key.startswith(f"{part}/") for key in kept["numbers"]):
                    shown += [nodes.rubric("", f"{title}: {short(kept)}"), part_table(part, kept["numbers"])]
        return shown or [nodes.paragraph("", "No measurement is kept; derta bench makes one.")]


def short(kept: dict[str, Any]) -> str:
    """Model and machine in a few words, to tell a file's tables from another's."""
    machine = kept["machine"]
    return f"{kept['request']['model']} on {machine['gpu'] or machine['cpu']}, {machine['precision']}"


def machine_line(kept: dict[str, Any]) -> nodes.paragraph:
    """When, how and where it was measured, and the machine's own matrix peak."""
    machine, request = kept["machine"], kept["request"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers"))
    peak = Number(**kept["numbers"]["machine/matrix_peak"])
    asked = " ".join(f"--{name} {request[name]}" for name in ("model", "device", "triples", "rounds"))
    told = (
        f": {machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {versions}, {machine['precision']}; "
        "medians of the rounds, of three times as many for how the cost grows. "
        f"Matrix peak of the machine: {peak.value:,.0f} {peak.unit}."
    )
    how = nodes.literal("", f"derta bench {asked}")
    when = f"Measured on {kept['date']} at commit {machine['git']['sha'][:7]} with "
    return nodes.paragraph("", "", nodes.Text(when), how, nodes.Text(told))


def part_table(part: str, numbers: dict[str, dict[str, Any]]) -> nodes.table:
    """The numbers `part/row/column` as a table."""
    told = {key: Number(**value).parts()["value"] for key, value in numbers.items() if key.startswith(f"{part}/")}
    rows = sorted({key.rpartition("/")[0] for key in told}, key=list(ROWS).index)
    columns = [column for column in COLUMNS if any(f"{row}/{column}" in told for row in rows)]
    body = [[ROWS[row], *(told.get(f"{row}/{column}", "–") for column in columns)] for row in rows]
    return table(["what", *(COLUMNS[column] for column in columns)], body)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("bench", Bench)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
