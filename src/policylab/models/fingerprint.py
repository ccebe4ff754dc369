"""A fingerprint that identifies a model's weights."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor


def fingerprint(weights: Iterable[Tensor]) -> str:
    """Identifies weights by the shape, dtype and CRC-32 of each."""
    digest = hashlib.sha256()
    for weight in weights:
        content = weight.detach().cpu().flatten().view(torch.uint8).numpy()
        digest.update(f"{tuple(weight.shape)} {weight.dtype} {zlib.crc32(content.data)}\n".encode())
    return digest.hexdigest()
