"""The device of the tests in tests/gpu: a GPU; or, for a rehearsal of their code, the CPU.

pytest -m gpu tests/gpu                              on a machine with a GPU
POLICYLAB_REHEARSE=1 pytest -m gpu tests/gpu         anywhere: whether the tests themselves still run
"""

from __future__ import annotations

import os

import pytest
import torch

REHEARSAL = os.environ.get("POLICYLAB_REHEARSE") == "1"
CUDA = torch.cuda.is_available() and not REHEARSAL
DEVICE = torch.device("cuda" if CUDA else "cpu")
#: As ``hardware.accelerator`` names it.
ACCELERATOR = "gpu" if CUDA else "cpu"

#: For the modules of tests/gpu.
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or REHEARSAL), reason="torch sees no GPU"),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="a rehearsal on the CPU cannot show this")
