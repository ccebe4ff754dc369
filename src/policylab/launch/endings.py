"""How a run ends: after a signal, after a failure, and for W&B."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from policylab.cli.logs import FILE_ONLY
from policylab.distributed.signals import Interrupted
from policylab.distributed.world import world
from policylab.errors import UserError

if TYPE_CHECKING:
    from policylab.launch.stop import StopOnSignal

log = logging.getLogger(__name__)


@contextmanager
def survive_exit(stop: StopOnSignal) -> Iterator[None]:
    """Catches Lightning's exit after Ctrl-C or SIGTERM, so that the run can still write its summary."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        if stop.signum is None:
            raise
        if world().size > 1 and not stop.stopped:  # only this process stops; others may wait for it
            raise Interrupted(stop.signum) from None
        stop.stopped = True


@contextmanager
def log_failure() -> Iterator[None]:
    """Writes an error to ``train.log`` and raises it. The root script prints it on the console."""
    try:
        yield
    except UserError as error:
        log.error("%s", error, extra=FILE_ONLY)
        raise
    except Exception:
        log.exception("the run failed", extra=FILE_ONLY)
        raise


@contextmanager
def closed_wandb() -> Iterator[None]:
    """Ends the W&B run, so that the next job of a multirun gets its own."""
    try:
        yield
    finally:
        if "wandb" in sys.modules:
            import wandb

            try:
                wandb.finish(exit_code=0 if sys.exc_info()[0] is None else 1)
            except Exception as error:  # an error of W&B does not fail a finished run
                log.warning("wandb could not finish: %s", error)
