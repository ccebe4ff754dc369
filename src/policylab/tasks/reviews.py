"""Continue the opening of a movie review."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from policylab.data.rollout import Completion
from policylab.errors import UserError
from policylab.tasks import rows, vader
from policylab.tasks.metrics import distinct_2, polarity

OPENINGS = Path(__file__).parent.parent / "assets" / "reviews.jsonl"


class Reviews:
    """Openings of reviews, or any other texts to continue (see ``tasks.base.Task``).

    Args:
        name: names the run.
        source: ``default`` for 1,792 openings written for this project, ``vader`` for about 10,000 snippets of real
            reviews (fetched on first use), a JSON-lines file, or a data set on the hub.
        prompt_words: if a row is a whole text: how many of its first words are the prompt; for a shorter text, all
            except the last.
        held_out: if the source has no split: number of rows held out for validation.
        instruction: prompt for chat models, with ``{text}`` in it; None sends the opening alone.
        data_dir: folder for downloads.
        columns: field (``prompt``, ``completion``, ``text``, ``reference``, ``split``) -> its name in a file or a data
            set on the hub; None if it is the same.
        hub: for a data set on the hub: ``config``, ``revision``, and the splits to ``train`` on and to hold out as
            ``val``; None chooses the default (`rows.read_hub`).

    Raises:
        UserError: when the source cannot be loaded, or an argument is out of range.
    """

    def __init__(
        self,
        name: str,
        source: str,
        prompt_words: int,
        held_out: int,
        instruction: str | None,
        data_dir: str,
        columns: dict[str, str | None] | None = None,  # optional, so that older runs can be evaluated
        hub: dict[str, str | None] | None = None,
    ) -> None:
        columns, hub = columns or {}, hub or {}
        if unknown := columns.keys() - set(rows.FIELDS):
            raise UserError(
                f"task.columns.{min(unknown)} is not a field of a row; known are {', '.join(rows.FIELDS)}"
            )
        if prompt_words < 1:
            raise UserError(f"task.prompt_words={prompt_words}; a prompt has at least 1 word")
        self.name = name
        self.instruction = instruction
        renamed = {field: column for field, column in columns.items() if column}
        found = _read(source, prompt_words, Path(data_dir), renamed, hub)
        self.train, self.val = rows.hold_out(found, held_out, source)

    def metrics(self, completions: Sequence[Completion]) -> dict[str, list[float]]:
        """Sentiment by a lexicon that the reward does not use, and the share of word pairs that are not repeated."""
        return {
            "polarity": [polarity(completion.text) for completion in completions],
            "distinct_2": [distinct_2(completion.text) for completion in completions],
        }


def _read(
    source: str, prompt_words: int, data_dir: Path, columns: rows.Columns, hub: dict[str, str | None]
) -> list[rows.Row]:
    if source == "default":
        return rows.read_jsonl(OPENINGS, prompt_words, {})
    if source == "vader":
        return rows.read_jsonl(vader.movie_reviews(data_dir), prompt_words, {})
    path = Path(source).expanduser()
    if path.is_file():
        return rows.read_jsonl(path, prompt_words, columns)
    if path.is_dir():
        raise UserError(f"task.source={source} is a folder; give a .jsonl file")
    if path.suffix in (".json", ".jsonl") or source.startswith((".", "/", "~")):
        raise UserError(f"task.source={source}: there is no such file (looked in {Path.cwd()})")
    return rows.read_hub(source, hub, prompt_words, columns)
