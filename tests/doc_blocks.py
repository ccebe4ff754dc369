"""Finds the code blocks of Markdown pages and the commands in them, for the tests that run the documentation."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``where`` is its page and line, such as ``README.md:12``."""

    where: str
    language: str
    text: str

    @property
    def file_name(self) -> str | None:
        """Name of the file that the block shows: a comment alone on its first line; None without one."""
        match = re.fullmatch(r"# ([\w./-]+\.(?:py|yaml))", self.text.partition("\n")[0])
        return match[1] if match else None

    @property
    def commands(self) -> list[list[str]]:
        """The arguments of each command, without comments, leading ``VAR=value`` and commands after a pipe."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
            lexer.whitespace_split = True
            for separator, words in _split(list(lexer)):
                words = list(dropwhile(ASSIGNMENT.fullmatch, words))
                if words and separator != "|":
                    found.append(words)
        return found


def _split(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The commands of one line, each with the operator before it."""
    separator, command = "", list[str]()
    for word in words:
        if set(word) <= set("&;|"):
            yield separator, command
            separator, command = word, []
        else:
            command.append(word)
    yield separator, command


def blocks(pages: Iterable[Path]) -> list[Block]:
    """All fenced blocks of some pages, in order."""
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            where = f"{page.relative_to(ROOT).as_posix()}:{line}"
            found.append(Block(where, match["language"], match["text"]))
    return found
