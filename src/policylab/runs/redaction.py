"""Hides secrets in the files and the log of a run, and from loggers.

``${oc.env:NAME}`` is not a secret, and is kept. A secret is recognized by its name, and afterwards also by its value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from policylab.runs.folder import write_atomically
from policylab.runs.words import UNREAD, read

#: Replaces a secret.
HIDDEN = "<secret>"
#: A shorter value is hidden only under its own name: replacing it everywhere would damage other text.
SHORTEST = 6

#: Names of secrets, in snake_case.
SECRET = re.compile(
    r"(^|_)((api|access|secret|private|signing|encryption|subscription|ssh)_?keys?|auth|authorization|bearer|token"
    r"|(api|access|auth|hf|hub)_tokens|(secret|password|passphrase|credential)s?|passwd)$"
)
#: A token of a language model, or a count of them.
MODEL_TOKEN = re.compile(
    r"(^|_)(bos|eos|eot|bot|pad|unk|sep|cls|mask|boi|eoi|image|audio|video|think|tool|special|start|stop|end|first"
    r"|last|next|prev|new|per|a|each|max|min)_token$"
)
#: A reference to the environment, alone or in an HTTP header.
REFERENCE = re.compile(r"(?:(?:Bearer|Basic|Token) )?\$\{oc\.env:\w+(?:, ?(?:null|''|\"\"))?\}")
#: ``https://user:password@host``
ADDRESS_PASSWORD = re.compile(r"(\w://[^/\s:@]*:)([^/\s@]+)@")
#: ``name=value`` in text, such as a command.
ASSIGNMENT = re.compile(r"([\w.\-]+)=(\"[^\"]*\"|'[^']*'|[^\s&]+)")
#: ``name=value`` as an argument of Hydra.
OVERRIDE = re.compile(r"([+~]*)([\w./@\-]+)=(.*)", re.DOTALL)

#: Values that this process has found under a secret's name.
_known: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether a value of this name is a secret.

    >>> [is_secret(name) for name in ("api_key", "X-API-Key", "hf_token", "authToken", "eos_token", "max_new_tokens")]
    [True, True, True, True, False, False]
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", name).lower()
    return bool(SECRET.search(words)) and not MODEL_TOKEN.search(words)


def remember(values: Any) -> None:
    """Records the secrets in these plain values. From now on they are hidden wherever they appear."""
    _known.update(_secrets(values, hidden=False))


def _secrets(item: Any, hidden: bool) -> Iterator[str]:
    """The literal values under names of secrets."""
    if isinstance(item, dict):
        for key, inner in item.items():
            yield from _secrets(inner, hidden or is_secret(str(key)))
    elif isinstance(item, list | tuple):
        for inner in item:
            yield from _secrets(inner, hidden)
    elif hidden and _hides(item) and len(str(item)) >= SHORTEST:
        yield str(item)


def _hides(value: Any) -> bool:
    """Whether a value under a secret's name is a secret: a boolean, an empty value or a reference is not."""
    if isinstance(value, str):
        return value not in ("", HIDDEN) and REFERENCE.fullmatch(value) is None
    return isinstance(value, int | float) and not isinstance(value, bool)


def redact(value: Any) -> Any:
    """A copy of plain data without secrets.

    Hides values under a name such as ``api_key`` or ``hf_token``, passwords in addresses, and in any text values that
    are assigned to such a name or are those of an environment variable with such a name.
    """
    remember(value)
    return _redacted(value, hidden=False)


def _redacted(item: Any, hidden: bool) -> Any:
    if isinstance(item, dict):
        return {key: _redacted(inner, hidden or is_secret(str(key))) for key, inner in item.items()}
    if isinstance(item, list | tuple):
        return [_redacted(inner, hidden) for inner in item]
    if hidden:
        return HIDDEN if _hides(item) else item
    return redact_text(item) if isinstance(item, str) else item


def redact_text(text: str) -> str:
    """Text without known secrets, passwords in addresses, and values assigned to a secret's name."""
    for secret in sorted(_known | set(_of_environment()), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = ADDRESS_PASSWORD.sub(lambda m: f"{m[1]}{HIDDEN}@" if _hides(m[2]) else m[0], text)
    return ASSIGNMENT.sub(_assignment, text)


def _assignment(match: re.Match[str]) -> str:
    name, value = match[1], match[2]
    hides = _under_secret(name) and _hides(value.strip("'\""))
    return f"{name}={HIDDEN}" if hides else match[0]


def _under_secret(path: str) -> bool:
    """Whether any part of a dotted path is a secret's name."""
    return any(map(is_secret, re.split(r"[./@]", path)))


def _of_environment() -> Iterator[str]:
    return (value for name, value in os.environ.items() if is_secret(name) and len(value) >= SHORTEST)


def redact_words(words: Iterable[str]) -> list[str]:
    """A command line without secrets. If a value contains a secret, the whole value is hidden."""
    return [_redacted_word(word) for word in words]


def _redacted_word(word: str) -> str:
    match = OVERRIDE.fullmatch(word)
    if match is None:
        return redact_text(word)
    sign, key, text = match.groups()
    value, hidden = read(word), _under_secret(key)
    if value is UNREAD:
        value, hidden = text, hidden or any(map(is_secret, re.findall(r"[\w-]+", text)))
    _known.update(_secrets(value, hidden))
    return word if _redacted(value, hidden) == value else f"{sign}{key}={HIDDEN}"


def redact_file(path: Path) -> None:
    """Rewrites a YAML file of Hydra's own without secrets."""
    if path.is_file():
        content = OmegaConf.to_container(OmegaConf.load(path))
        clean = redact(_with_words(content))
        if clean != content:
            write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(clean)))


def _with_words(item: Any) -> Any:
    """Plain data in which texts in lists are redacted as arguments of a command line."""
    if isinstance(item, dict):
        return {key: _with_words(inner) for key, inner in item.items()}
    if isinstance(item, list):
        return [_redacted_word(inner) if isinstance(inner, str) else _with_words(inner) for inner in item]
    return item
