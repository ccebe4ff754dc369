"""The token view of a run's page: each sampled token, coloured by what the algorithm made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policylab.report.completions import spaced
from policylab.report.html import Html, join, tag
from policylab.runs.token_records import read_records, recorded

#: Tokens on the page, about; of more records, evenly spaced iterations are shown.
TOKENS = 30_000
#: By its name on the page: a column of a record, and the one that is subtracted.
MEASURES = {
    "advantage": ("advantages", None),
    "KL to the reference": ("logprobs", "ref_logprobs"),
    "log-prob change": ("new_logprobs", "logprobs"),
    "value": ("values", None),
    "entropy": ("entropy", None),
    "log-prob": ("logprobs", None),
}


def token_records(run_folder: Path) -> list[dict[str, Any]]:
    """The recorded iterations with their samples, for the page's script."""
    files = recorded(run_folder)
    if not files:
        return []
    *_, last = files
    tokens = sum(len(record["tokens"]) for record in read_records(files[last]))
    shown = spaced(list(files), max(2, TOKENS // max(tokens, 1)))
    return [
        {"iteration": iteration, "samples": [for_page(record) for record in read_records(files[iteration])]}
        for iteration in shown
    ]


def for_page(record: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with the measures that its record allows."""
    measures = {
        name: difference(record[column], None if minus is None else record[minus])
        for name, (column, minus) in MEASURES.items()
        if column in record and (minus is None or minus in record)
    }
    same = {name: record[name] for name in ("prompt", "reward", "kept", "ended", "text", "chosen")}
    return same | {"measures": measures}


def difference(values: list[float | None], minus: list[float | None] | None) -> list[float | None]:
    """Token by token; None where either is not known."""
    if minus is None:
        return values
    pairs = zip(values, minus, strict=True)
    return [None if a is None or b is None else float(f"{a - b:.4g}") for a, b in pairs]


def tokens_section(run_folder: Path) -> Html:
    """The place that the page's script fills; empty without records."""
    if not recorded(run_folder):
        return Html()
    note = (
        "The first training samples of recorded iterations. Orange is above zero, blue below; the scale is that of all "
        "iterations shown. The KL is log p/q of the token, whose sum over a completion is the sampled KL; the log-prob "
        "change is that by the update of this iteration. A token's values: pointer, or a sample and the arrow keys."
    )
    return join(
        [
            tag("p", note, class_="note"),
            tag("div", id="token-view"),
            tag("noscript", "This view needs JavaScript."),
        ]
    )
