"""Open the pipeline that the command line names, and mount its mixer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from experiments.highres.random_pipeline import RandomPipeline, fixed_seed
from experiments.teacher.load import load_teacher
from mixers.suggest import hint
from unet_adapters import MixerAdapter, load_adapter
from unet_adapters.hosts.transformers.profiles import TRANSFORMER_PROFILES, TransformerProfile
from unet_adapters.hosts.unet_profiles import PROFILES, UNetProfile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class PipelineOptions:
    """The pipeline that makes an image, as the command line names it.

    Attributes:
        model: embedded, a folder, a Hub id, or random:NAME for a published architecture with random weights.
        adapter: folder or Hub id of a distilled adapter, in this library's or LinFusion's format; None: no adapter.
        mixer: an untrained mixer to mount; None: no mixer.
        device: cpu or cuda; None: a GPU if there is one.
        dtype: name of the UNet's dtype; None: float32 on a CPU, otherwise bfloat16.
        variant: weight files to read, such as fp16; None: those without a variant.
    """

    model: str = "embedded"
    adapter: str | None = None
    mixer: str | None = None
    device: str | None = None
    dtype: str | None = None
    variant: str | None = None

    @contextmanager
    def open(self, *, for_plan: bool = False) -> Iterator[tuple[Any, str]]:
        """Yield the pipeline with its mixer mounted, and the device of the work.

        Args:
            for_plan: nothing will be computed, so the device need not be present and random weights stay uninitialized.

        Raises:
            ValueError: If the model, adapter, mixer, device or dtype does not exist.
        """
        device, dtype = resolve_device(self.device, self.dtype, must_exist=not for_plan)
        if self.adapter is not None and self.mixer is not None:
            raise ValueError("Cannot mount both: pass --adapter (trained) or --mixer (untrained), not both.")
        present = device if torch.cuda.is_available() else "cpu"
        pipe = open_pipeline(self.model, dtype, present, initialize=not for_plan, variant=self.variant)
        mounted = mount(pipe, self.adapter, self.mixer)
        try:
            yield pipe, device
        finally:
            if mounted is not None:
                mounted.unmount()


def resolve_device(device: str | None, dtype: str | None, *, must_exist: bool = True) -> tuple[str, torch.dtype]:
    """Return the device and dtype that the command line names, or their defaults.

    Raises:
        ValueError: If the device or dtype is unknown, or the device must exist and does not.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device!r}: expected cpu or cuda.")
    if device != "cpu" and not torch.cuda.is_available() and must_exist:
        raise ValueError(f"--device {device}: torch finds no GPU on this machine. Use --device cpu.")
    return device, DTYPES[dtype]


def open_pipeline(
    model: str, dtype: torch.dtype, device: str, *, initialize: bool = True, variant: str | None = None
) -> Any:
    """Open a pipeline by name.

    Args:
        model: embedded, a folder, a Hub id, or random:NAME for a published architecture with random weights.
        dtype: of the UNet and the text encoders.
        device: where the pipeline is.
        initialize: give random weights values; see `RandomPipeline`.
        variant: weight files to read; see `load_teacher`.

    Raises:
        ValueError: If there is no such model or architecture.
    """
    kind, _, name = model.partition(":")
    if kind != "random":
        return load_teacher(model, dtype, variant).to(device)
    profiles: dict[str, UNetProfile | TransformerProfile] = {profile.name: profile for profile in PROFILES}
    profiles |= {profile.name: profile for profile in TRANSFORMER_PROFILES}
    if name not in profiles:
        raise ValueError(f"Unknown architecture {name!r}: expected one of {', '.join(profiles)}.{hint(name, profiles)}")
    return RandomPipeline(profiles[name], dtype, device, initialize)


def mount(pipe: Any, adapter: str | None, mixer: str | None) -> MixerAdapter | None:
    """Mount an adapter from a folder or the Hub, or an untrained mixer, or neither.

    Raises:
        ValueError, FileNotFoundError: If there is no such adapter or mixer, or it does not fit the UNet.
    """
    if adapter is not None:
        return load_adapter(adapter, pipe).mount()
    if mixer is None:
        return None
    with fixed_seed():
        return MixerAdapter.build(pipe, mixer, train_projections=False).mount()
