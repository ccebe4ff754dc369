"""What the root scripts share: set-up before Hydra starts, and one clear line when something is wrong.

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
from policylab.distributed.signals import INTERRUPTED, stop_on_signals
from policylab.distributed.world import world
from policylab.errors import ProcessFailed, UserError
from policylab.runs.command import NothingLeft, with_command_of
from policylab.runs.redaction import redact_text
from policylab.runs.words import typed

BAD_INPUT = 2
#: Config groups of which several may be chosen.
SEVERAL = ("logger", "callbacks", "debug", "experiments")
FULL_ERROR = "HYDRA_FULL_ERROR"
WANTS_TRACEBACKS = os.environ.get(FULL_ERROR) == "1"
#: Variables that libraries read when they are imported or first used. Those that are set already are kept.
ENVIRONMENT = {
    # How long threads of GNU's OpenMP spin while they wait for each other. Long spinning makes an iteration several
    # times slower when another process uses the cores; no spinning makes it two fifths slower when none does.
    "GOMP_SPINCOUNT": "3000",
    # Torch puts large tensors on pages of 2 MiB instead of 4 KiB, which the kernel clears several times faster.
    "THP_MEM_ALLOC_ENABLE": "1",
    # Products that oneDNN keeps ready, each with memory of its own for one shape of operands; by default 1,024.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


def prepare(script: str) -> None:
    """Call before ``hydra.main``: tunes the process, registers the resolvers, makes the current folder importable.

    Args:
        script: ``__file__`` of the root script.
    """
    os.environ.update(ENVIRONMENT | os.environ)
    keep_freed_memory()
    escape_unprintable()
    resolvers.register(Path(script).resolve().parent)
    if os.getcwd() not in sys.path:
        sys.path.insert(1, os.getcwd())  # so that users can name their own modules


def guarded(main: Callable[[], object], doc: str, free_text: Sequence[str] = ()) -> None:
    """Runs a root script's ``main`` and ends the process with a clear message and the right exit code.

    Args:
        main: the function under ``hydra.main``.
        doc: docstring of the script, for ``--help``.
        free_text: keys whose value is text, which needs no quoting for Hydra.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_page(doc, Path(sys.argv[0]).resolve()))
        return
    os.environ[FULL_ERROR] = "1"  # else Hydra prints errors its own way and exits with 1
    try:
        stop_on_signals()
        sys.argv[1:] = flags_first(with_command_of([typed(word, free_text) for word in sys.argv[1:]]))
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
    """Moves ``-m`` to the front: Hydra wants it before or after all overrides.

    Raises:
        UserError: under torchrun or srun, where each process would sweep.
    """
    multirun = ("-m", "--multirun")
    if world().size > 1 and not set(words).isdisjoint(multirun):
        raise UserError(
            f"-m under torchrun or srun would run the sweep {world().size} times; start it without them, with "
            "hardware=ddp or hardware=ddp_cpu"
        )
    return sorted(words, key=lambda word: word not in multirun)


def check_one_choice(words: Sequence[str], configs: Path) -> None:
    """Refuses several choices of a group that builds one thing: Hydra would merge them into the last one.

    Raises:
        UserError: naming the group.
    """
    for word in words:
        key, _, value = word.partition("=")
        group = key.lstrip("+").partition("@")[0]
        several = value.startswith("[") and "," in value
        if several and group not in SEVERAL and (configs / group).is_dir():
            raise UserError(
                f"{word}: of several choices for {group} only the last would count; take one of them"
            )


def end_with(error: Exception) -> NoReturn:
    """Exits: with one line and code 2 for bad input, else with code 1; an unknown error with its traceback."""
    from policylab.cli.messages import is_mistake, one_line

    message = None if WANTS_TRACEBACKS else one_line(error)
    if message is None:
        print_traceback(error)
        sys.exit(1)
    whose = "" if world().main else f" on rank {world().rank}"
    print(f"error{whose}: {redact_text(message)}", file=sys.stderr)
    sys.exit(BAD_INPUT if is_mistake(error) else 1)


def print_traceback(error: Exception) -> None:
    """Prints the traceback of an error; for one in another process, the traceback from there."""
    text = str(error) if isinstance(error, ProcessFailed) else "".join(traceback.format_exception(error))
    print(redact_text(text), file=sys.stderr)


def as_job(task: Callable[[], float | None]) -> float | None:
    """Runs the body of a Hydra task; an error of a single run ends the process here.

    Hydra would print a line of its own before the message. In a multirun that line names the job, and sweepers handle
    the exception, so it is raised.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    try:
        return task()
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        end_with(error)
