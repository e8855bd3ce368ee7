"""Hosts: the diffusers models that mixers are mounted in, one file per architecture."""

from unet_adapters.hosts.base import Host, find_host, list_hosts, register_host

__all__ = ["Host", "find_host", "list_hosts", "register_host"]
