"""Shared by the root scripts: set-up before Hydra starts, and errors as one clear line.

Exit codes: 0 done, 2 bad input, 75 stopped by SIGTERM, SIGUSR1 or SIGUSR2 (run it again), 130 interrupted (Ctrl-C),
1 anything else.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from policylab.cli.help import help_page
from policylab.cli.logs import escape_unprintable
from policylab.config import resolvers
from policylab.distributed.allocator import keep_freed_memory
from policylab.distributed.signals import INTERRUPTED, stop_on_signals, stop_with_sweep
from policylab.distributed.world import world
from policylab.errors import ProcessFailed, UserError
from policylab.runs.command import MULTIRUN, NothingLeft, with_command_of, with_sweep
from policylab.runs.redaction import redact_text
from policylab.runs.words import typed

BAD_INPUT = 2
#: Config groups of which several may be chosen.
SEVERAL = ("logger", "callbacks", "debug", "experiments")
FULL_ERROR = "HYDRA_FULL_ERROR"
WANTS_TRACEBACKS = os.environ.get(FULL_ERROR) == "1"
#: Variables that libraries read when they are imported or first used. Variables that are already set are kept.
ENVIRONMENT = {
    # How long threads of GNU's OpenMP spin while they wait for each other. Long spinning makes an iteration several
    # times slower if another process uses the cores; no spinning makes it two fifths slower if no other process does.
    "GOMP_SPINCOUNT": "3000",
    # Torch puts large tensors on pages of 2 MiB instead of 4 KiB, which the kernel clears several times faster.
    "THP_MEM_ALLOC_ENABLE": "1",
    # Matrix products that oneDNN caches, each with its own memory for one shape of operands; by default 1,024.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


def prepare(script: str) -> None:
    """Tunes the process, registers the resolvers, makes the current folder importable. Call before ``hydra.main``.

    Args:
        script: ``__file__`` of the root script.
    """
    os.environ.update(ENVIRONMENT | os.environ)
    keep_freed_memory()
    escape_unprintable()
    resolvers.register(Path(script).resolve().parent)
    if os.getcwd() not in sys.path:
        sys.path.insert(1, os.getcwd())  # so that users can name their own modules


def guarded(
    main: Callable[[], object],
    doc: str,
    free_text: Sequence[str] = (),
    open_groups: Sequence[str] = (),
    overrides: Callable[[list[str]], list[str]] = list,
) -> None:
    """Runs a root script's ``main`` and ends the process with a clear message and the right exit code.

    Args:
        main: the function under ``hydra.main``.
        doc: docstring of the script, for ``--help``.
        free_text: keys whose value is text, which needs no quoting for Hydra.
        open_groups: groups whose keys may be missing in the script's config.
        overrides: turns a script's own form of arguments into overrides.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_page(doc, Path(sys.argv[0]).resolve()))
        return
    os.environ[FULL_ERROR] = "1"  # otherwise Hydra prints errors itself and exits with 1
    try:
        stop_on_signals()
        stop_with_sweep()
        words = overrides(sys.argv[1:])
        sys.argv[1:] = flags_first([typed(word, free_text, open_groups) for word in words])
        sys.argv[1:] = with_command_of(with_sweep(sys.argv[1:]))
        check_one_choice(sys.argv[1:], Path(sys.argv[0]).resolve().parent / "configs")
        main()
    except NothingLeft as done:
        print(done)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # as after `| head`
    except KeyboardInterrupt as stopped:
        sys.exit(getattr(stopped, "exit_code", INTERRUPTED))
    except Exception as error:
        end_with(error)


def flags_first(words: list[str]) -> list[str]:
    """Moves ``-m`` to the front, because Hydra accepts it only before or after all overrides.

    Raises:
        UserError: under torchrun or srun, where each process would sweep.
    """
    if world().size > 1 and not set(words).isdisjoint(MULTIRUN):
        raise UserError(
            f"-m under torchrun or srun would run the sweep {world().size} times; start it without them, with "
            "hardware=ddp or hardware=ddp_cpu"
        )
    return sorted(words, key=lambda word: word not in MULTIRUN)


def check_one_choice(words: Sequence[str], configs: Path) -> None:
    """Refuses several choices for a group that builds one object: Hydra would merge them into the last one.

    Raises:
        UserError: naming the group.
    """
    for word in words:
        key, _, value = word.partition("=")
        group = key.lstrip("+").partition("@")[0]
        several = value.startswith("[") and "," in value
        if several and group not in SEVERAL and (configs / group).is_dir():
            raise UserError(
                f"{word}: only the last of several choices for {group} would count; take one of them"
            )


def end_with(error: Exception) -> NoReturn:
    """Prints an error as one line, or an unknown one with its traceback, and exits: with 2 for bad input, else 1."""
    from policylab.cli.messages import is_mistake, one_line

    message = None if WANTS_TRACEBACKS else one_line(error)
    if message is None:
        print_traceback(error)
        sys.exit(1)
    rank = "" if world().main else f" on rank {world().rank}"
    print(f"error{rank}: {redact_text(message)}", file=sys.stderr)
    sys.exit(BAD_INPUT if is_mistake(error) else 1)


def print_traceback(error: Exception) -> None:
    """Prints the traceback of an error; for an error of another process, that process's traceback."""
    text = str(error) if isinstance(error, ProcessFailed) else "".join(traceback.format_exception(error))
    print(redact_text(text), file=sys.stderr)


def as_job(task: Callable[[], float | None]) -> float | None:
    """Runs the body of a Hydra task. An error of a single run ends the process here, before Hydra prints its own line.

    In a multirun the error is raised: Hydra's line names the job, and sweepers handle the exception.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    try:
        return task()
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        end_with(error)
