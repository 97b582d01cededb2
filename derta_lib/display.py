"""How figures, tables and model output appear on a page: self-contained HTML for the book, JupyterLab and Colab."""

import base64
import html
from dataclasses import dataclass

from derta_lib.errors import DertaError

# Control characters (ANSI escapes among them) become their visible symbols; newline and tab stay.
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)} | {127: chr(0x2421)}
_BIDI = {code: f"<U+{code:04X}>" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F)}


@dataclass(frozen=True)
class Shown:
    """HTML to display as the value of a cell, with `text` as what a plain terminal shows."""

    markup: str
    text: str

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self.markup, "text/plain": self.text}


def show_text(text: str, label: str = "") -> Shown:
    """Model output as text, whatever it holds: tags, scripts, MyST, ANSI codes and very long lines.

    Control characters show as their symbols and direction marks by number; nothing is interpreted or left out.
    `label` is shown above, as text too.
    """
    heading = f'<div class="derta-label">{_escaped(label)}</div>' if label else ""
    return Shown(
        f'{heading}<pre class="derta-text mathjax_ignore tex2jax_ignore" tabindex="0" '
        f'style="white-space:pre-wrap;overflow-wrap:anywhere">{_escaped(text)}</pre>',
        f"{label}\n{text}" if label else text,
    )


def show_figure(svg: str, csv: str, name: str, alt: str) -> Shown:
    """An SVG drawing with its alt text and a link to its data; both travel inside the page."""
    if not alt.strip():
        raise DertaError(f"figure '{name}': its label is empty; say what it shows with figure.set_label.")
    return Shown(
        f'<figure class="derta-figure" id="figure-{html.escape(name)}">'
        f'<img style="max-width:100%;height:auto" src="{_data_uri("image/svg+xml", svg)}" alt="{_escaped(alt)}">'
        f"<figcaption>{_csv_link(csv, name)}</figcaption></figure>",
        alt,
    )


def show_table(table: str, csv: str, name: str, caption: str) -> Shown:
    """A table (escaped HTML rows) that scrolls inside itself on a narrow screen, with a link to its data."""
    label = _escaped(caption)
    return Shown(
        f'<figure class="derta-table" id="table-{html.escape(name)}"><figcaption>{label} '
        f"{_csv_link(csv, name)}</figcaption>"
        f'<div style="overflow-x:auto" tabindex="0" role="region" aria-label="{label}">{table}</div></figure>',
        csv,
    )


def visible(text: str) -> str:
    """`text` with control characters as their symbols and direction marks by number."""
    return text.translate(_VISIBLE | _BIDI)


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def _data_uri(mime: str, content: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content.encode()).decode()}"


def _csv_link(csv: str, name: str) -> str:
    return (
        f'<a class="derta-csv" href="{_data_uri("text/csv", csv)}" download="{html.escape(name)}.csv">'
        f'data (CSV)<span class="visually-hidden"> of {html.escape(name)}</span></a>'
    )
