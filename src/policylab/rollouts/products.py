"""Chooses the library for fp32 matrix products on this machine: measured once, and cached.

Results depend on the choice to the bit, so a machine keeps its first one: in the user's cache folder, by the names of
processor and torch version. Checkpoints also store the choice of their run.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policylab.distributed.machine import cpu_name
from policylab.functional import products
from policylab.functional.products import CLASSES, LAYOUTS, ONEDNN, PYTORCH, SIZES, Choice
from policylab.models.decoders.linear import Linear

log = logging.getLogger(__name__)

#: Values of ``hardware.products``.
SETTINGS = ("measured", "pytorch", "onednn")
#: (N, I, O) of the products that represent a class: layers of the tiny model, and a quarter of a layer of GPT-2.
#: Decoding has few rows.
SHAPES = {"small": (512, 128, 512), "large": (256, 768, 1024)}
DECODING = {"small": (64, 128, 512), "large": (64, 768, 1024)}
#: Number of timed calls, of which the fastest counts; and the speed-up from which oneDNN is chosen.
CALLS, FASTER = 7, 1.1


def choose_products(setting: str) -> None:
    """Chooses for this process as ``hardware.products`` says."""
    if setting == "measured":
        products.use(choice_of_machine(cache_folder()))
    else:
        products.use(ONEDNN if setting == "onednn" else PYTORCH)


def cache_folder() -> Path:
    """PolicyLab's folder in the user's cache, which need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "policylab"


def machine() -> str:
    """A file name for this machine, from everything that the speed of products depends on."""
    words = cpu_name(), torch.backends.cpu.get_cpu_capability(), "torch", torch.__version__
    return re.sub(r"[^\w.+]+", "-", " ".join(words)).strip("-")


def choice_of_machine(folder: Path) -> Choice:
    """The choice that the folder has for this machine; without one, measures and saves it.

    If it cannot be saved, all products are PyTorch's own, because the next process might choose differently.
    """
    name = machine()
    file = folder / f"products-{name}.json"
    try:
        if (kept := read(file)) is None:
            keep(file, record(measured()))
            kept = read(file)  # written by the first process
    except OSError as error:
        log.warning(
            "cannot save which library is faster for matrix products (%s), so PyTorch's own computes all; "
            "set hardware.products=pytorch or onednn to choose without measuring",
            error,
        )
        return Choice(name, PYTORCH.onednn)
    assert kept is not None
    return Choice(name, kept)


def read(file: Path) -> frozenset[str] | None:
    """The classes of products for oneDNN, from a file of `keep`; None if there is none. A damaged file is deleted.

    Raises:
        OSError: when the file exists and cannot be read.
    """
    try:
        onednn = frozenset(json.loads(file.read_text())["onednn"])
        if onednn <= CLASSES:
            return onednn
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("%s is damaged; the products are measured again", file)
    file.unlink(missing_ok=True)
    return None


def keep(file: Path, content: dict[str, Any]) -> None:
    """Writes the file atomically, unless another process has written it.

    Raises:
        OSError: when it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp") as temporary:
        json.dump(content, temporary, indent=1)
        temporary.flush()
        with suppress(FileExistsError):
            os.link(temporary.name, file)


def record(rates: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Content of the file: the classes for oneDNN, and GFLOP/s of PyTorch and oneDNN on one core."""
    onednn = sorted(name for name, (own, other) in rates.items() if other > FASTER * own)
    return {
        "onednn": onednn,
        "gflops": {name: [round(rate, 1) for rate in pair] for name, pair in rates.items()},
    }


def measured() -> dict[str, tuple[float, float]]:
    """GFLOP/s of each class of products by PyTorch and by oneDNN, in a third of a second; empty without oneDNN.

    Uses one thread and its CPU time, so that other load on the machine does not change the result.
    """
    if not products.onednn_multiplies():
        return {}
    threads, before = torch.get_num_threads(), products.chosen()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return {
                f"{layout}/{size}": rates(
                    layout, *(DECODING if layout in ("packed", "activated") else SHAPES)[size]
                )
                for size in SIZES
                for layout in LAYOUTS
            }
    finally:
        products.use(before)
        torch.set_num_threads(threads)


def rates(layout: str, n: int, i: int, o: int) -> tuple[float, float]:
    """GFLOP/s of one product by PyTorch and by oneDNN."""
    x, weight, slope = torch.ones(n, i), torch.ones(o, i), torch.ones(n, o)
    fastest = []
    for choice in (PYTORCH, ONEDNN):
        products.use(choice)
        run = product(layout, x, weight, slope)
        run()  # the first call is slower
        seconds = []
        for _ in range(CALLS):
            started = time.thread_time()
            run()
            seconds.append(time.thread_time() - started)
        fastest.append(2 * n * i * o / max(min(seconds), 1e-9) / 1e9)
    return fastest[0], fastest[1]


def product(layout: str, x: Tensor, weight: Tensor, slope: Tensor) -> Callable[[], Tensor]:
    """The product as in training or decoding, by the library in use."""
    if layout == "rows":
        return lambda: products.linear(x, weight, None)
    if layout == "columns":
        return lambda: products.linear(slope, weight.t(), None)
    if layout == "outer":
        return lambda: products.outer(slope, x)
    layer = Linear(weight, None, torch.float32, "gelu" if layout == "activated" else None)
    return lambda: layer(x)
