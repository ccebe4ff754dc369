"""Imports before a run, with unused packages hidden.

Lightning imports torchmetrics, which imports matplotlib and scipy if they are installed; transformers imports scipy. A
run needs neither, so both are hidden during these imports. With the garbage collector off as well, the start takes 6 s
of processor time instead of 9.5 (Intel Xeon 2.5 GHz, 2 busy cores, 2026-11-28).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, PackageNotFoundError
from unittest.mock import patch

#: Packages that are hidden.
UNUSED = ("matplotlib", "scipy")


def import_libraries() -> None:
    """Imports everything that builds a run. Call it before anything else imports Lightning or transformers."""
    if "policylab.config.build" in sys.modules:
        return
    gc.disable()
    try:
        with absent(UNUSED):
            import policylab.config.build  # noqa: F401
        gc.freeze()  # imported modules live as long as the process
    finally:
        gc.enable()


@contextmanager
def absent(packages: tuple[str, ...]) -> Iterator[None]:
    """Hides packages that are not imported yet, as if they were not installed. Afterwards they can be imported."""
    hidden = [name for name in packages if name not in sys.modules]
    found = Distribution.from_name

    def from_name(name: str) -> Distribution:
        if name in hidden:
            raise PackageNotFoundError(name)
        return found(name)

    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None stops an import
    try:
        with patch.object(Distribution, "from_name", from_name):
            yield
    finally:
        for name in hidden:
            del sys.modules[name]
            check = getattr(sys.modules.get("transformers.utils.import_utils"), f"is_{name}_available", None)
            if check is not None:  # its result was cached while the package was hidden
                check.cache_clear()
