"""The distillation objective: what a student must match, as one module for the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from experiments.config import Term
from experiments.distill.objectives import Forward, Need, NotRun, Seen, create_objective, teacher_rows
from experiments.teacher.teacher import Batch, Teacher
from unet_adapters import MixerAdapter
from unet_adapters.capture import capture_sites


class DistillationLoss(nn.Module):
    """A batch -> {"loss": Σ weight · term, and each term}; its only parameters are the student's.

    Teacher and student are one UNet, with the adapter off and on, so that the frozen weights are in memory once. A step
    runs the forwards that its objectives need and no others; one whose weight is 0 at a step is not computed. The
    student's forward comes last and leaves it mounted: with gradient checkpointing, `backward` runs it again.
    Unmount when the training is over.

    With a UNet in bfloat16 the step runs under autocast, so that the student can be trained in float32.
    """

    def __init__(self, teacher: Teacher, adapter: MixerAdapter, terms: Mapping[str, Term]) -> None:
        super().__init__()
        self.student = adapter.student  # the only parameters of this module
        self._hosts = (teacher, adapter)  # a tuple: the UNet is not a child, its weights are not ours to train
        self._terms = {name: (term, create_objective(name, **term.options)) for name, term in terms.items()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """A batch as `draw` makes it -> the loss and its terms.

        Raises:
            ValueError: an objective has nothing to compare.
        """
        step = int(batch["step"][0])
        active = [(name, term.at(step), make) for name, (term, make) in self._terms.items() if term.at(step) > 0]
        with autocast(self._hosts[0]):
            seen = self._look(batch, {need for _, _, objective in active for need in objective.needs})
            terms = {name: objective(seen) for name, _, objective in active}
        return {"loss": torch.stack([weight * terms[name] for name, weight, _ in active]).sum(), **terms}

    def _look(self, batch: Batch, needs: set[Need]) -> Seen:
        teacher, adapter = self._hosts
        batch = {name: value.to(teacher.unet.device) for name, value in batch.items()}
        latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
        noisy = teacher.scheduler.add_noise(latents, noise, timesteps)
        names = [site.name for site in adapter.sites] if "sites" in needs else []

        def run() -> Forward:
            with capture_sites(teacher.unet, names) as calls:
                return Forward(teacher.predict(noisy, timesteps, batch), calls)

        taught = learned = None
        rows: dict[str, Tensor] = {}
        if "teacher" in needs:
            adapter.unmount()
            with torch.no_grad():
                taught = run()
                if "rows" in needs:
                    layers = {n: (teacher.unet.get_submodule(n), call.input) for n, call in taught.sites.items()}
                    rows = {n: teacher_rows(layer, x, batch["rows"]) for n, (layer, x) in layers.items()}
        adapter.mount()
        if "student" in needs:
            learned = run()
        target = teacher.target(latents, noise, timesteps)
        return Seen(adapter, target, batch["rows"], taught or NotRun("teacher"), learned or NotRun("student"), rows)


@contextmanager
def autocast(teacher: Teacher) -> Iterator[None]:
    """torch.autocast to the UNet's dtype where that is a half precision: a student in float32 runs in it."""
    dtype = teacher.unet.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(teacher.unet.device.type, dtype) if half else nullcontext():
        yield


def target(scheduler: DDIMScheduler, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """What a perfect model predicts, for the scheduler's prediction type.

    Raises:
        ValueError: the scheduler predicts neither noise nor velocity.
    """
    kind = scheduler.config.prediction_type
    known = {"epsilon": lambda: noise, "v_prediction": lambda: scheduler.get_velocity(latents, noise, steps)}
    if kind not in known:
        raise ValueError(f"Cannot distill a model that predicts {kind!r}: expected one of {', '.join(known)}.")
    return known[kind]()
