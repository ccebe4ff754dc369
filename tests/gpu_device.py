"""The device of the tests in tests/gpu: a GPU, or the CPU to check that the tests themselves run.

pytest -m gpu tests/gpu                              on a machine with a GPU
POLICYLAB_REHEARSE=1 pytest -m gpu tests/gpu         on any machine, to check the tests' code
"""

from __future__ import annotations

import os

import pytest
import torch

REHEARSAL = os.environ.get("POLICYLAB_REHEARSE") == "1"
CUDA = torch.cuda.is_available() and not REHEARSAL
DEVICE = torch.device("cuda" if CUDA else "cpu")
#: Its name in ``hardware.accelerator``.
ACCELERATOR = "gpu" if CUDA else "cpu"

#: Marks of every module in tests/gpu.
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or REHEARSAL), reason="torch sees no GPU"),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="a rehearsal on the CPU cannot show this")
