"""PolicyLab: a Lightning + Hydra laboratory for reinforcement learning of language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policylab.runs.run import Run, list_runs, load_run

__version__ = "0.1.0"
__all__ = ["Run", "list_runs", "load_run"]
#: The modules of public names. They are imported at the first use, so that ``import policylab`` takes no time.
MODULES = {"Run": "policylab.runs.run", "list_runs": "policylab.runs.run", "load_run": "policylab.runs.run"}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
