"""fp32 matrix products on this CPU, PyTorch's own (MKL, as a rule) against oneDNN's: GF/s, the fastest of seven.

    python benchmarks/products.py [--out benchmarks/results/products.csv]

A linear layer's three products: forward, gradient of the input, gradient of the weights, in their memory layouts.
The last line says which classes of products a run on this machine computes with oneDNN. Rows of other processors are
kept in the file.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from policylab.functional import products
from policylab.functional.products import linear, onednn_multiplies, outer
from policylab.rollouts.products import measured, record
from policylab.runs.environment import describe_environment

#: (rows, in, out): layers of the tiny model and of GPT-2 at a micro-batch and at a decoding step, and GPT-2's head.
SHAPES = [
    (1024, 128, 512), (1024, 512, 128), (1024, 768, 768), (1024, 768, 3072), (1024, 3072, 768), (512, 768, 50257),
    (64, 768, 3072), (64, 768, 50257),
]  # fmt: skip


def rate(product: Callable[[], Any], operations: int) -> float:
    """GF/s, after one warm-up call."""
    product()
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return operations / min(seconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a CSV to write")
    chosen = parser.parse_args()
    if not onednn_multiplies():
        raise SystemExit("this build of PyTorch has no oneDNN product to compare with")
    choice = record(measured())["onednn"]
    products.use(products.ONEDNN)
    rows = []
    print(
        f"{'rows x in x out':>20}{'forward':>16}{'by input':>16}{'by weights':>16}    PyTorch / oneDNN, GF/s"
    )
    for n, i, o in SHAPES:
        x, weight, slope = torch.randn(n, i), torch.randn(o, i), torch.randn(n, o)
        pairs = [
            (lambda x=x, w=weight: F.linear(x, w), lambda x=x, w=weight: linear(x, w, None)),
            (lambda s=slope, w=weight: s @ w, lambda s=slope, w=weight: linear(s, w.t(), None)),
            (lambda s=slope, x=x: s.t() @ x, lambda s=slope, x=x: outer(s, x)),
        ]
        rates = [rate(product, 2 * n * i * o) for pair in pairs for product in pair]
        cells = [f"{rates[k]:.0f} / {rates[k + 1]:.0f}" for k in (0, 2, 4)]
        print(f"{f'{n} x {i} x {o}':>20}" + "".join(f"{cell:>16}" for cell in cells))
        rows.append([n, i, o, *(f"{r:.0f}" for r in rates)])
    print(f"a run here computes with oneDNN: {', '.join(choice) or 'nothing'}")
    if chosen.out is not None:
        about = describe_environment(Path(__file__).parents[1])
        facts = [
            about["cpu"],
            torch.get_num_threads(),
            about["packages"]["torch"],
            datetime.date.today().isoformat(),
        ]
        ways = ("forward", "by_input", "by_weights")
        columns = ["rows", "in", "out", *(f"{way}_{by}" for way in ways for by in ("pytorch", "onednn")),
                   "cpu", "threads", "torch", "date"]  # fmt: skip
        before = list(csv.reader(chosen.out.open()))[1:] if chosen.out.is_file() else []
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        with chosen.out.open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(columns)
            table.writerows(row for row in before if row[columns.index("cpu")] != about["cpu"])
            table.writerows([*row, *facts] for row in rows)


if __name__ == "__main__":
    main()
