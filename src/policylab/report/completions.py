"""Samples on the page of a run: validation prompts before and after training, and groups of training samples."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from policylab.errors import counted
from policylab.report.html import Html, fold, join, tag
from policylab.runs.figures import number

Sample = dict[str, Any]
#: Prompts that are shown at once; validations and iterations that are shown at all, evenly spaced.
OPEN, VALIDATIONS, ITERATIONS = 6, 12, 8
#: Characters of a completion that are shown.
LONGEST = 4000


def samples_section(samples: Sequence[Sample]) -> Html:
    """Validation prompts with what the policy wrote at each validation, and training samples by iteration."""
    validation = [sample for sample in samples if sample["split"] == "val"]
    training = [sample for sample in samples if sample["split"] == "train"]
    if not samples:
        return tag("p", "This run has no samples.jsonl, or none in it.")
    return join([*validations(validation), *iterations(training)])


def validations(samples: Sequence[Sample]) -> list[Html]:
    """For each validation prompt: before and after training, side by side, and in between."""
    recorded = sorted({sample["iteration"] for sample in samples})
    kept = spaced(recorded, VALIDATIONS)
    by_prompt = dict[tuple[str, int], dict[int, Sample]]()
    seen = Counter[tuple[int, str]]()
    for sample in samples:
        place = sample["iteration"], sample["prompt"]
        by_prompt.setdefault((sample["prompt"], seen[place]), {})[sample["iteration"]] = sample
        seen[place] += 1
    articles = [prompt_article(prompt, history, kept) for (prompt, _), history in by_prompt.items()]
    if not articles:
        return []
    left = len(recorded) - len(kept)
    note = f"Validation prompts at {counted(len(kept), 'validation')}"
    note += f"; {left} between them are left out." if left else "."
    more = (
        [fold(counted(len(articles) - OPEN, "more prompt"), *articles[OPEN:])] if len(articles) > OPEN else []
    )
    return [tag("h3", "Before and after"), tag("p", note), *articles[:OPEN], *more]


def prompt_article(prompt: str, history: dict[int, Sample], kept: Sequence[int]) -> Html:
    """One prompt, and what was written after it."""
    first, last = min(history), max(history)
    ends = [first] if first == last else [first, last]
    two = [tag("div", tag("h4", when(iteration)), completion(history[iteration])) for iteration in ends]
    between = [i for i in kept if i in history and i not in ends]
    rest = [tag("div", tag("h4", when(i)), completion(history[i])) for i in between]
    parts = [tag("p", prompt, class_="prompt"), tag("div", *two, class_="two")]
    return tag(
        "article",
        *parts,
        *([fold(counted(len(between), "validation") + " between", *rest)] if between else []),
    )


def when(iteration: int) -> str:
    """The heading of a sample."""
    return f"iteration {iteration}" if iteration else "before training"


def completion(sample: Sample) -> Html:
    """A completion with its figures."""
    text = str(sample["completion"])
    figures = [f"reward {number(sample.get('reward'))}"]
    figures += [f"{name} {number(value)}" for name, value in (sample.get("parts") or {}).items()]
    figures += [f"KL {number(sample['kl'])}"] if sample.get("kl") is not None else []
    figures += [counted(sample["length"], "token")] if "length" in sample else []
    cut = (
        [tag("span", f" ... {len(text) - LONGEST:,} more characters", class_="note")]
        if len(text) > LONGEST
        else []
    )
    if sample.get("ended") is False:
        cut.append(
            tag("span", " cut", class_="note", title="at the length limit, or before the end of its episode")
        )
    return join([tag("p", text[:LONGEST], *cut, class_="text"), tag("p", " · ".join(figures), class_="note")])


def iterations(samples: Sequence[Sample]) -> list[Html]:
    """Training samples by iteration and prompt. A group with equal rewards is marked: it teaches nothing."""
    by_iteration = defaultdict[int, dict[str, list[Sample]]](dict)
    for sample in samples:
        by_iteration[sample["iteration"]].setdefault(sample["prompt"], []).append(sample)
    kept = spaced(sorted(by_iteration), ITERATIONS)
    return [tag("h3", "In training"), *(of_iteration(i, by_iteration[i]) for i in kept)] if kept else []


def of_iteration(iteration: int, by_prompt: dict[str, list[Sample]]) -> Html:
    """The samples of one iteration."""
    groups = [group for group in by_prompt.values() if len(group) > 1]
    flat = sum(map(is_flat, groups))
    title = f"Iteration {iteration}: {counted(len(by_prompt), 'prompt')}"
    title += f", {flat} of {counted(len(groups), 'group')} flat" if groups else ""
    return fold(title, *(group_article(prompt, group) for prompt, group in by_prompt.items()))


def group_article(prompt: str, group: Sequence[Sample]) -> Html:
    """The samples of one prompt, the best first."""
    mark = [tag("span", " flat: all rewards are equal", class_="flat")] if is_flat(group) else []
    ranked = sorted(group, key=lambda sample: -(sample.get("reward") or 0.0))
    return tag("article", tag("p", prompt, *mark, class_="prompt"), *map(completion, ranked), class_="group")


def is_flat(group: Sequence[Sample]) -> bool:
    """Whether several samples have one reward."""
    return len(group) > 1 and len({sample.get("reward") for sample in group}) == 1


def spaced(values: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the values, the first and the last included.

    >>> spaced(range(0, 100, 10), 4)
    [0, 30, 60, 90]
    """
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]
