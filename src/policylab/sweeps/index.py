"""``sweep.jsonl``: the record of a sweep, of its jobs and of failures. Lines are only added."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from policylab.errors import UserError
from policylab.runs.find import SWEEP_FILE
from policylab.runs.folder import append_whole
from policylab.runs.redaction import redact_words
from policylab.runs.status import now
from policylab.runs.words import override_key, word
from policylab.sweeps.jobs import Job, identity, label_of, matters

#: Differences that a message lists.
LISTED = 8


class Index:
    """The record of a sweep. Only one process at a time can open it; the lock ends with the process.

    Args:
        folder: folder of the sweep.
        resume: whether the sweep exists.

    Attributes:
        labels: labels of all jobs so far, by identity.
        failed: reasons, by label, of jobs that failed last time.
        submitted: cluster ids of submitted jobs, by label.

    Raises:
        UserError: when the folder already holds a sweep and ``resume`` is false, or another process runs it.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / SWEEP_FILE
        self.labels = dict[str, str]()
        self.failed = dict[str, str]()
        self.submitted = dict[str, str]()
        self.lock = self.path.open("a+")  # held as long as it is open
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sessions = [record["session"] for record in read_records(self.path) if "session" in record]
            where = f", as process {sessions[-1]['process']} of {sessions[-1]['host']}" if sessions else ""
            raise UserError(f"{folder} is running{where}; wait for its end, or stop it first") from None
        except OSError as error:
            raise UserError(
                f"cannot lock {self.path}: {error.strerror}; take a folder on another disk: hydra.sweep.dir=PATH"
            ) from None
        records = read_records(self.path)  # under the lock: no other process adds to them any more
        if records and not resume:
            raise UserError(f"{folder} already holds a sweep; to resume it, give {word('sweep', folder)}")
        cut_torn_line(self.path)
        self.swept = set[str]()  # keys that had several values, in any session
        self.header: dict[str, Any] = {}
        for record in records:
            self.header = record.get("sweep", self.header)
            self.swept.update(record.get("session", {}).get("swept", ()))
            if "job" in record:
                self.labels[record["identity"]] = record["job"]
            if "failed" in record:
                self.failed[record["failed"]] = record["reason"]
            if "submitted" in record:
                self.submitted[record["submitted"]] = record["id"]

    def begin(
        self, shared: Sequence[str], swept: Iterable[str], values: Callable[[Sequence[str]], dict[str, Any]]
    ) -> None:
        """Records a new sweep, or compares it with the record; and records this process.

        Args:
            shared: overrides that all jobs share, as in the command.
            swept: keys that have several values.
            values: gives the config values of these overrides, by dotted key.

        Raises:
            UserError: lists the differences.
        """
        words = sorted(word for word in redact_words(shared) if matters(override_key(word)))
        if not self.header:
            self.header = {"version": 1, "shared": words, "values": values(words)}
            self.add({"sweep": self.header})
        before = self.header["shared"]
        found = changed_words(before, words, self.swept, set(swept))
        found += changed_values(self.header["values"], values(before))
        if found:
            more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
            raise UserError(
                f"{self.folder} is another sweep than this command's: {'; '.join(found[:LISTED])}{more}; use the same "
                "overrides and config files, or start a new sweep, without sweep="
            )
        session = {"process": os.getpid(), "host": platform.node(), "at": now(), "swept": sorted(swept)}
        self.add({"session": session})

    def label(self, words: Sequence[str]) -> str:
        """The label of the job with these overrides. A new job is recorded."""
        key = identity(words)
        if key not in self.labels:
            taken = {label: other for other, label in self.labels.items()}
            self.labels[key] = label_of(words, self.header["shared"], taken)
            self.add({"job": self.labels[key], "identity": key})
        return self.labels[key]

    def add_failure(self, job: Job, reason: str) -> None:
        """Records the reason why a job failed."""
        self.failed[job.label] = reason
        self.add({"failed": job.label, "reason": reason, "at": now()})

    def add(self, record: Mapping[str, Any]) -> None:
        """Writes a record to the end of the file."""
        append_whole(self.path, json.dumps(record) + "\n")

    def close(self) -> None:
        """Releases the sweep for other processes."""
        self.lock.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of all complete lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def cut_torn_line(path: Path) -> None:
    """Removes an incomplete last line, after a full disk or a power failure."""
    content = path.read_bytes()
    os.truncate(path, content.rfind(b"\n") + 1)


def changed_words(
    before: Sequence[str], now: Sequence[str], swept_before: set[str], swept: set[str]
) -> list[str]:
    """Differences between the shared overrides and the recorded ones.

    A key may change between fixed and swept: this changes the list of jobs, not their values.
    """
    old, new = ({override_key(word): word for word in words} for words in (before, now))
    return [
        f"{old.get(key, f'no {key}')} before, {new.get(key, f'no {key}')} now"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and key not in swept and (key in old or key not in swept_before)
    ]


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences between config values and the recorded ones, after config files have changed."""
    return [
        f"{key} was {before.get(key)}, now {now.get(key)}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
