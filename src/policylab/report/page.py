"""``report.html``: all that is on record of a run, on one page without anything from the network."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from policylab.errors import counted
from policylab.report.charts import Chart, charts, figure
from policylab.report.completions import samples_section
from policylab.report.html import Html, fold, join, table, tag
from policylab.report.read import Run, read_run
from policylab.report.tokens import token_records, tokens_section
from policylab.runs.figures import duration, headlines, number
from policylab.runs.folder import write_atomically
from policylab.runs.parents import policy_in_words
from policylab.runs.samples_file import read_samples
from policylab.runs.status import DONE, FAILED, read_status, state_of
from policylab.runs.words import leaves, override_key

log = logging.getLogger(__name__)

PAGE = "report.html"
#: Warnings that are shown at once.
WARNINGS = 20
TEMPLATE = Path(__file__).with_name("page.html")
#: An entry of ``train.log``: its time, its level, who wrote it, and its text.
ENTRY = re.compile(r"^\[([\d: ,-]+) (WARNING|ERROR|CRITICAL) ([\w.]+)\] (.*?)(?=^\[\d{4}-|\Z)", re.M | re.S)
#: What ``env.json`` holds and the page shows elsewhere.
SHOWN_ELSEWHERE = ("parents", "overrides", "earlier_sessions", "command")


def try_to_write_page(run_folder: Path, state: str) -> bool:
    """Writes the page at the end of a run. An error is one warning: the run is done all the same.

    Args:
        state: how the run ends, which its status does not say yet.

    Returns:
        Whether it was written.
    """
    try:
        write_page(run_folder, run_folder / PAGE, state)
    except Exception as error:
        log.warning("could not write %s: %s: %s", PAGE, type(error).__name__, error)
        return False
    return True


def write_page(run_folder: Path, out: Path, state: str | None = None) -> None:
    """Writes the page of a run.

    Raises:
        UserError: when the folder is not that of a run.
    """
    write_atomically(out, render(read_run(run_folder), state).encode(errors="replace").decode())


def render(run: Run, state: str | None = None) -> str:
    """The page of a run."""
    environment = run.folder / "env.json"
    recorded = json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else {}
    drawn, other = charts(run.curves)
    sections = {
        "Summary": summary_section(run, recorded, state),
        "Curves": curves_section(drawn, other),
        "Warnings": warnings_section(run.folder),
        "Samples": samples_section(read_samples(run.folder)),
        "Tokens": tokens_section(run.folder),
        "Config": config_section(run.config, recorded.get("overrides", [])),
        "Environment": environment_section(recorded),
    }
    there = {title: content for title, content in sections.items() if content}
    name = "-".join(filter(None, run.names[:2])) or run.folder.name
    data = {
        "charts": [chart.data() for chart in [*drawn, *other]],
        "tokens": token_records(run.folder),
    }
    values = {
        "title": tag("title", f"{name}, {run.folder.name}"),
        "heading": tag("h1", f"{name} ", tag("small", run.folder.name)),
        "links": join(tag("a", title, href=f"#{title.lower()}") for title in there),
        "body": join(
            tag("section", tag("h2", title), content, id=title.lower()) for title, content in there.items()
        ),
        "data": embedded(data),
    }
    return filled(TEMPLATE.read_text(encoding="utf-8"), values)


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its values, and the hashes of its own style and script: the browser runs no others."""
    hashes = {
        name: sha256(inside) for name, inside in re.findall(r"<(style|script)>(.*?)</\1>", template, re.S)
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: {**hashes, **values}[match[1]], template)


def sha256(text: str) -> str:
    """The hash of a text, for a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def embedded(data: Any) -> str:
    """JSON for a script element, which no text in it can end."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# -- sections --------------------------------------------------------------------------------------------


def summary_section(run: Run, recorded: Mapping[str, Any], state: str | None) -> Html:
    """State, names, times, the main metrics, and where the run comes from."""
    status = read_status(run.folder)
    state = state or state_of(run.folder)
    algo, model, task = run.names
    done, planned = status.get("iteration"), status.get("iterations")
    seconds = run.summary.get("wall_seconds", status.get("wall_seconds"))
    facts = {
        "state": tag("b", state, class_={DONE: "good", FAILED: "bad"}.get(state, "middling")),
        "task": task,
        "algorithm": algo,
        "model": model,
        "seed": str(run.config.get("seed", "")),
        "iterations": f"{done} of {planned}" if done is not None and done != planned else str(planned or ""),
        "time": duration(seconds) if seconds is not None else "",
        "tokens sampled": f"{status['tokens_sampled']:,}" if status.get("tokens_sampled") else "",
        "started": str(status.get("started") or "").replace("T", " "),
        "folder": str(run.folder),
    }
    parts = [
        tag("dl", *(tag("div", tag("dt", key), tag("dd", value)) for key, value in facts.items() if value))
    ]
    if status.get("exception"):
        parts.append(tag("p", str(status["exception"]), class_="bad"))
    parts.append(results(run))
    if run.parents:
        parts += [tag("h3", "Started from"), tag("ol", *map(parent_item, run.parents))]
    if recorded.get("command"):
        parts.append(tag("pre", str(recorded["command"])))
    return join(parts)


def results(run: Run) -> Html:
    """Validation metrics before training, at the best iteration and at the end."""
    curves = {name: curve for name, curve in run.curves.items() if name.startswith("val/")}
    validated = sorted({iteration for curve in curves.values() for iteration in curve})
    if not validated:
        return tag("p", "No validation is on record.")
    best = (run.summary.get("best") or {}).get("iteration")
    first, last = validated[0], validated[-1]
    after = {name: curve[last] for name, curve in curves.items() if last in curve}
    rows = []
    for name in headlines(after):
        found = [curves[name].get(i) for i in ([first] if best is None else [first, best])]
        change = after[name] - found[0] if found[0] is not None and last > first else None
        cells = [*map(number, found), number(after[name]), "+" * ((change or 0) > 0) + number(change)]
        rows.append([name.removeprefix("val/"), *cells])
    titles = [
        f"iteration {first}" if first else "before",
        f"best (iteration {best})",
        f"after (iteration {last})",
    ]
    kept = titles if best is not None else [titles[0], titles[2]]
    return table(["validation", *kept, "change"], rows, class_="numbers")


def parent_item(parent: Mapping[str, Any]) -> Html:
    """A run that this one descends from."""
    policy = policy_in_words(str(parent.get("policy")), parent.get("iteration"))
    weights = f", weights {str(parent['weights'])[:12]}" if parent.get("weights") else ""
    return tag(
        "li", tag("b", str(parent.get("name"))), f" {policy}{weights} ", tag("small", str(parent.get("run")))
    )


def curves_section(drawn: Sequence[Chart], other: Sequence[Chart]) -> Html:
    """The charts."""
    figures = [figure(chart, index) for index, chart in enumerate([*drawn, *other])]
    shown, rest = (
        tag("div", *part, class_="charts") for part in (figures[: len(drawn)], figures[len(drawn) :])
    )
    return join([shown, fold(counted(len(other), "other metric"), rest)] if other else [shown] * bool(drawn))


def warnings_section(run_folder: Path) -> Html:
    """Warnings and errors of ``train.log``, of all sessions."""
    path = run_folder / "train.log"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = [
        tag("li", tag("small", f"{time.split(',')[0]} "), tag("pre", message.strip()), class_=level.lower())
        for time, level, _, message in ENTRY.findall(text)
    ]
    if not found:
        return tag("p", "None." if path.is_file() else "This run has no train.log.")
    shown, rest = (tag("ul", *part, class_="log") for part in (found[:WARNINGS], found[WARNINGS:]))
    more = len(found) - WARNINGS
    return join([shown, fold(f"{more} more", rest)]) if more > 0 else shown


def config_section(config: Mapping[str, Any], overrides: Sequence[str]) -> Html:
    """The config by groups; what the command line has set is marked."""
    words = {override_key(word).split("@")[0].replace("/", "."): word for word in overrides}
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in leaves(dict(config)):
        group = key.split(".")[0] if "." in key else ""
        groups.setdefault(group, []).append((key, "null" if value is None else str(value)))
    parts = (
        [tag("p", "Set by the command: ", *(join([tag("code", word), " "]) for word in overrides))]
        if overrides
        else []
    )
    for group, values in sorted(groups.items(), key=lambda item: item[0] != ""):
        rows = [[tag("b", key) if is_set(key, words) else key, tag("code", value)] for key, value in values]
        chosen = [word for key, word in words.items() if group and key.split(".")[0] == group]
        title = join([group or "run", *(join([" ", tag("code", word)]) for word in chosen)])
        parts.append(fold(title, table(["key", "value"], rows)))
    return join(parts)


def is_set(key: str, words: Mapping[str, str]) -> bool:
    """Whether the command line has set this value, or the list that it is in."""
    return key in words or key.split("[")[0] in words


def environment_section(recorded: Mapping[str, Any]) -> Html:
    """Versions, machine and commit."""
    rows = [
        [key, tag("code", str(value))]
        for key, value in leaves({k: v for k, v in recorded.items() if k not in SHOWN_ELSEWHERE})
    ]
    if not rows:
        return Html()
    sessions = len(recorded.get("earlier_sessions", []))
    again = (
        [tag("p", f"Resumed {counted(sessions, 'time')}; this is the environment of the last session.")]
        if sessions
        else []
    )
    return join([*again, fold(counted(len(rows), "value"), table(["key", "value"], rows))])
