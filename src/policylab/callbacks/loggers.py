"""External loggers, configured to work without network or account, and to continue in a resumed run."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from policylab.callbacks.metrics_csv import MetricsCSV
from policylab.errors import UserError
from policylab.runs.folder import write_atomically
from policylab.runs.redaction import redact

log = logging.getLogger(__name__)

#: Attribute that marks a logger that has failed.
SWITCHED_OFF = "policylab_switched_off"


def wandb(
    run_dir: str, project: str, entity: str | None, group: str | None, name: str, tags: Sequence[str]
) -> WandbLogger:
    """Weights & Biases, offline unless ``WANDB_MODE`` is set.

    ``wandb sync`` uploads an offline run later. A resumed run keeps its id.

    Raises:
        UserError: when ``WANDB_MODE=online`` and there is no API key.
    """
    import wandb as library

    mode = os.environ.get("WANDB_MODE", "offline")
    if mode == "online" and not has_wandb_key():
        raise UserError("WANDB_MODE=online, but there is no API key; run `wandb login`, or unset WANDB_MODE")
    project, group, name, tags = redact([project, group, name, list(tags)])
    logger = WandbLogger(
        save_dir=run_dir,
        project=project,
        entity=entity,
        group=group,
        name=name,
        tags=tags,
        version=kept_id(Path(run_dir) / "wandb" / "id.txt"),
        resume="allow",
        mode=mode,
        settings=library.Settings(silent=mode != "online"),
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning passes it, and wandb warns that it has no effect
    return logger


def mlflow(run_dir: str, experiment: str, name: str, tracking_uri: str | None) -> MLFlowLogger:
    """MLflow: a database in the run folder unless a tracking server is named.

    Raises:
        UserError: when mlflow is not installed, or its server does not answer.
    """
    if find_spec("mlflow") is None:
        raise UserError("logger=mlflow needs mlflow; install it with: pip install -e '.[mlflow]'")
    id_file = Path(run_dir) / "mlflow" / "id.txt"
    id_file.parent.mkdir(parents=True, exist_ok=True)
    experiment, name = redact([experiment, name])
    logger = MLFlowLogger(
        experiment_name=experiment,
        run_name=name,
        tracking_uri=tracking_uri or f"sqlite:///{run_dir}/mlflow/mlflow.db",
        run_id=id_file.read_text() if id_file.is_file() else None,
    )
    if not id_file.is_file():
        try:
            run_id = str(logger.run_id)  # connects to the server
        except Exception as error:  # the library raises errors of any type
            raise UserError(
                f"logger=mlflow cannot connect to {tracking_uri or 'its database'}: {str(error).splitlines()[0]}"
            ) from error
        write_atomically(id_file, run_id)
    return logger


def tolerated(logger: Logger) -> Logger:
    """The logger, changed so that its errors do not end the run. ``metrics.csv`` is not changed: its errors must."""
    if not isinstance(logger, MetricsCSV):
        for name in ("log_hyperparams", "log_metrics", "save", "finalize"):
            setattr(logger, name, partial(_call, logger, getattr(logger, name)))
    return logger


def attempt(logger: Logger, action: Callable[[], object]) -> None:
    """Calls a logger. After its first error it warns, and does not call the logger again."""
    if getattr(logger, SWITCHED_OFF, False):
        return
    try:
        action()
    except Exception as error:  # each library raises errors of any type
        setattr(logger, SWITCHED_OFF, True)
        log.warning(
            "%s failed and is turned off for the rest of the run (%s: %s); metrics.csv has all metrics",
            *(type(logger).__name__, type(error).__name__, str(error).split("\n")[0]),
        )


def _call(logger: Logger, method: Callable[..., object], *args: object, **kwargs: object) -> None:
    attempt(logger, partial(method, *args, **kwargs))


def has_wandb_key() -> bool:
    """Whether ``wandb login`` or ``WANDB_API_KEY`` gave a key. wandb itself would prompt, or wait for the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def kept_id(file: Path) -> str:
    """The id in a file, which is created with a random id if it is missing."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, secrets.token_hex(4))
    return file.read_text()
