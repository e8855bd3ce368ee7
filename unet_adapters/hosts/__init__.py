"""Hosts: the diffusers models that mixers are mounted in, one file per architecture."""

from unet_adapters.hosts.base import (
    GridSource,
    Host,
    TextSource,
    find_host,
    find_sites,
    list_hosts,
    register_host,
    unwrap_model,
)

__all__ = ["GridSource", "Host", "TextSource", "find_host", "find_sites", "list_hosts", "register_host", "unwrap_model"]
