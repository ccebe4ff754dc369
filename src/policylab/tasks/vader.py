"""Fetches movie-review snippets with human sentiment ratings, from the source package of vaderSentiment.

    python -m policylab.tasks.vader [FOLDER]

writes ``FOLDER/vader/movie_reviews.jsonl`` (default ``data``) and a file with its source and licence. The texts belong
to other people: each user downloads them, and they are never committed.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from policylab.errors import UserError

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
COMMAND = "python -m policylab.tasks.vader"
PROVENANCE = f"""# Movie-review snippets

What: 10,605 snippets of movie reviews from rotten.tomatoes.com, after Pang & Lee (2004); each with the mean
sentiment (-4 most negative to 4 most positive) that people gave it.

Where from: the source package of `{PACKAGE}` on PyPI, sha256 `{SHA256}`,
in it `additional_resources/hutto_ICWSM_2014.tar.gz`, in it `{RATINGS}`.

Licence: the package is under the MIT licence, (c) 2016 C.J. Hutto. The snippets quote published reviews,
whose authors keep their rights; use them for research and do not redistribute them.

Please cite: Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis
of Social Media Text. Eighth International Conference on Weblogs and Social Media (ICWSM-14). Ann Arbor, MI,
June 2014.

Changed here (`policylab/tasks/vader.py`): HTML entities decoded; quotation marks and dashes restored, which
the data set had written as `''` and as runs of blanks; exact duplicates dropped. Made by `{COMMAND}`.
"""


def movie_reviews(data_dir: Path) -> Path:
    """The file of snippets, with rows ``{"text": ..., "reference": {"rating": 2.27}}``; downloaded if it is missing.

    Raises:
        UserError: when it cannot be downloaded.
    """
    path = data_dir / "vader" / "movie_reviews.jsonl"
    if not path.is_file():
        print(f"fetching the movie reviews of {PACKAGE} (2.5 MB) into {path.parent}", flush=True)
        fetch(path)
    return path


def fetch(path: Path) -> None:
    """Downloads, checks, unpacks and writes the snippets to ``path``, their provenance beside it."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / ARCHIVE
    if not archive.is_file():
        _download(folder)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise UserError(f"{archive} has sha256 {digest}, not {SHA256}; delete it and run {COMMAND} again")
    (folder / "PROVENANCE.md").write_text(PROVENANCE, encoding="utf-8")
    # written to a temporary name first, so that another job never reads half a file
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for text, rating in dict(_snippets(archive)).items():
            row = {"text": text, "reference": {"rating": rating}}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    part.replace(path)


def _download(folder: Path) -> None:
    """Downloads the source package with pip, so that the user's index, proxy and certificates apply."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    limits = ["--timeout", "5", "--retries", "1"]
    what = ["--no-deps", "--no-binary", "vaderSentiment", "--dest", str(folder), PACKAGE]
    try:
        done = subprocess.run(pip + limits + what, capture_output=True, text=True, timeout=120)
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    except subprocess.TimeoutExpired:
        reason = "no answer in 120 s"
    if not (folder / ARCHIVE).is_file():
        raise UserError(
            f"{PACKAGE} could not be downloaded (pip: {reason}); with a network, run "
            f"{COMMAND} {folder.parent}, or put {ARCHIVE} from PyPI into {folder}"
        )


def _snippets(archive: Path) -> Iterator[tuple[str, float]]:
    """(text, mean rating) in the order of the file."""
    with tarfile.open(archive) as package:
        inner = package.extractfile(INNER_ARCHIVE)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as resources:
            ratings = resources.extractfile(RATINGS)
            assert ratings is not None
            lines = ratings.read().decode("utf-8").splitlines()
    for line in lines:
        _, rating, text = line.split("\t")
        yield repair(text), float(rating)


def repair(text: str) -> str:
    """Restores characters that the data set changed: dashes had become blanks, and a quotation mark two apostrophes.

    >>> repair("A ''small'' film    but R&amp;D")
    'A "small" film -- but R&D'
    """
    text = re.sub(r" {3,}| \N{EN DASH} ", " -- ", html.unescape(text))
    text = re.sub(r"[`\N{RIGHT SINGLE QUOTATION MARK}]", "'", text.replace("''", '"'))
    return " ".join(text.split())


if __name__ == "__main__":
    try:
        print(movie_reviews(Path(sys.argv[1] if len(sys.argv) > 1 else "data")))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
