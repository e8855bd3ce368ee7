"""Fingerprints of tensors: digests that identify values, and versions that change whenever a value does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

TensorVersions = tuple[tuple[int, int], ...]


def weights_digest(network: nn.Module) -> str:
    """Return the SHA-256 of parameters and buffers: names, types, shapes and values. Takes about a second per GB."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        for part in plain_tensors(tensor):
            digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_versions(tensors: Iterable[Tensor]) -> TensorVersions:
    """Return what changes whenever a tensor is replaced or changed in place: part of the key of a cache."""
    parts = (part for tensor in tensors for part in plain_tensors(tensor))
    return tuple((part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensor or, if it wraps others as quantized weights do and has no storage of its own, those."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def weights_version(network: nn.Module) -> TensorVersions:
    """Return `tensor_versions` of parameters and buffers. Free, but valid only in this process."""
    return tensor_versions((*network.parameters(), *network.buffers()))
