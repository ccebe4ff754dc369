"""The seconds of imports before a run, kept to what the run uses.

Lightning imports all of torchmetrics, which imports matplotlib for its plots and scipy for one window function;
transformers imports scipy for object detection. Each of them does without where it is not installed. A run plots
nothing and needs no scipy, so while the libraries are imported neither seems to be installed. Whatever is imported
afterwards finds them, and transformers, which remembers its answers, is made to ask again.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, PackageNotFoundError
from unittest.mock import patch

#: What Lightning and transformers import where they find it, and no run of ours uses.
UNUSED = ("matplotlib", "scipy")


def import_libraries() -> None:
    """Imports Lightning, transformers and all that builds a run. Call it before anything else imports them.

    The garbage collector rests meanwhile, and never looks at what was imported, which lives as long as the process.
    """
    if "policylab.config.build" in sys.modules:
        return
    gc.disable()
    try:
        with absent(UNUSED):
            import policylab.config.build  # noqa: F401
        gc.freeze()
    finally:
        gc.enable()


@contextmanager
def absent(packages: tuple[str, ...]) -> Iterator[None]:
    """While active, packages that are not imported yet seem not to be installed."""
    hidden = [name for name in packages if name not in sys.modules]
    found = Distribution.from_name

    def from_name(name: str) -> Distribution:
        if name in hidden:
            raise PackageNotFoundError(name)
        return found(name)

    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: documented to stop an import
    try:
        with patch.object(Distribution, "from_name", from_name):
            yield
    finally:
        for name in hidden:
            del sys.modules[name]
            answer = getattr(sys.modules.get("transformers.utils.import_utils"), f"is_{name}_available", None)
            if answer is not None:
                answer.cache_clear()
