"""Fingerprints of tensors: equal exactly for equal bits, on whatever device they are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Elements that come to the host at once: a copy of a whole tensor might not fit beside a model.
_CHUNK = 1 << 22


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of named tensors: of names, dtypes, shapes and bits, in the order of the names.

        BLAKE2b(for each name in order: name, dtype, shape, BLAKE2b(bytes of the elements, row-major))

    Args:
        named: names, each once, and tensors of any dtype, strides and device.

    Returns:
        32 hexadecimal digits, of 16 bytes.

    Equivalent to: `torch.equal` of all tensors, within one chance in 2**64.
    """
    entries = sorted(named, key=lambda entry: entry[0])
    for device in {tensor.device for _, tensor in entries if tensor.is_cuda}:
        # Threads of the pool have streams of their own, which would not wait for what was begun on this one.
        torch.cuda.current_stream(device).synchronize()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        digests = list(pool.map(_of_bits, [tensor for _, tensor in entries]))
    hashed = hashlib.blake2b(digest_size=16)
    for (name, tensor), digest in zip(entries, digests, strict=True):
        hashed.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode() + digest)
    return hashed.hexdigest()


def _of_bits(tensor: Tensor) -> bytes:
    hashed = hashlib.blake2b(digest_size=16)
    values = tensor.detach().contiguous().reshape(-1)
    for part in values.split(_CHUNK):
        hashed.update(memoryview(part.view(torch.uint8).cpu().numpy()))
    return hashed.digest()
