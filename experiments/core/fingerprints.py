"""Fingerprints of tensors: digests that identify values, and versions that change whenever a value does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

TensorVersions = tuple[tuple[int, int], ...]


def weights_digest(network: nn.Module) -> str:
    """Return the SHA-256 of parameters and buffers: names, types, shapes and values. Takes about a second per GB."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tensor_versions(tensors: Iterable[Tensor]) -> TensorVersions:
    """Return what changes whenever a tensor is replaced or changed in place: part of the key of a cache."""
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


def weights_version(network: nn.Module) -> TensorVersions:
    """Return `tensor_versions` of parameters and buffers. Free, but valid only in this process."""
    return tensor_versions((*network.parameters(), *network.buffers()))
