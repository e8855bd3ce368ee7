"""The loss of a distillation: a weighted sum of objectives, as one module for the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from experiments.config import LossTerm
from experiments.distill.objectives import create_objective
from experiments.distill.objectives.base import DistillationStep, ForwardPass, Requirement, UnavailableForward
from experiments.distill.objectives.matrix import softmax_rows
from experiments.teacher.teacher import Batch, Teacher
from unet_adapters import MixerAdapter
from unet_adapters.capture import capture_sites


class DistillationLoss(nn.Module):
    """A batch -> {"loss": Σ weight · term, and each term}; its only parameters are the student's.

    Teacher and student are one UNet with the adapter off and on, so the frozen weights are in memory once. A step runs
    the forward passes that its objectives need and no others; an objective with weight 0 at a step is not computed. The
    student's forward pass comes last and leaves the adapter mounted, because with gradient checkpointing `backward`
    runs it again. Unmount the adapter after training.

    With a UNet in half precision the step runs under autocast, so that the student can be trained in float32.
    """

    def __init__(self, teacher: Teacher, adapter: MixerAdapter, terms: Mapping[str, LossTerm]) -> None:
        super().__init__()
        self.student = adapter.student  # the only parameters of this module
        self._frozen = (teacher, adapter)  # in a tuple, so that the UNet is not registered as a child to be trained
        self._terms = {name: (term, create_objective(name, **term.options)) for name, term in terms.items()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss and its terms for a batch of `draw_batch`.

        Raises:
            ValueError: an objective has nothing to compare.
        """
        number = int(batch["step"][0])
        weights = {name: term.weight_at(number) for name, (term, _) in self._terms.items()}
        active = {name: objective for name, (_, objective) in self._terms.items() if weights[name] > 0}
        with autocast(self._frozen[0]):
            step = self._run_forwards(batch, {need for objective in active.values() for need in objective.needs})
            terms = {name: objective(step) for name, objective in active.items()}
        return {"loss": torch.stack([weights[name] * term for name, term in terms.items()]).sum(), **terms}

    def _run_forwards(self, batch: Batch, needs: set[Requirement]) -> DistillationStep:
        teacher, adapter = self._frozen
        batch = {name: value.to(teacher.denoiser.device) for name, value in batch.items()}
        latents = batch["latents"]
        timesteps = batch["timesteps"]
        noisy = teacher.scheduler.add_noise(latents, batch["noise"], timesteps)
        names = [site.name for site in adapter.sites] if "sites" in needs else []

        def run() -> ForwardPass:
            with capture_sites(teacher.denoiser, names) as calls:
                return ForwardPass(teacher.predict(noisy, timesteps, batch), calls)

        joint = {site.name for site in adapter.sites if site.text}
        teacher_pass = student_pass = None
        rows: dict[str, Tensor] = {}
        if "teacher" in needs:
            adapter.unmount()
            with torch.no_grad():
                teacher_pass = run()
                if "rows" in needs:
                    for name, call in teacher_pass.sites.items():
                        if name in joint:
                            continue  # the objective says why it has no rows
                        rows[name] = softmax_rows(teacher.denoiser.get_submodule(name), call.input, batch["rows"])
        adapter.mount()
        if "student" in needs:
            student_pass = run()
        return DistillationStep(
            adapter,
            teacher.target(latents, batch["noise"], timesteps),
            batch["rows"],
            teacher_pass or UnavailableForward("teacher"),
            student_pass or UnavailableForward("student"),
            rows,
        )


@contextmanager
def autocast(teacher: Teacher) -> Iterator[None]:
    """Run the block under torch.autocast to the UNet's dtype if that is a half precision: a student in float32 does."""
    dtype = teacher.denoiser.dtype
    is_half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(teacher.denoiser.device.type, dtype) if is_half else nullcontext():
        yield
