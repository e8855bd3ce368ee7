"""The students of a selection: one for each mixer, trained site by site, and adapters put together from their sites."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experiments.config import MixerSpec
from experiments.core.files import save_folder
from experiments.core.progress import ProgressCallback
from experiments.distill import DistillationContext, build_student, run_stages
from experiments.studies.hybrid_selection.config import HybridConfig
from unet_adapters import Host, MixerAdapter

Assignment = Mapping[str, str]
"""The name of the mixer at each site, by site name; sites that are not in it keep softmax attention."""


def train_student(
    context: DistillationContext, config: HybridConfig, mixer: str, directory: Path, progress: ProgressCallback
) -> MixerAdapter:
    """Train one mixer at all sites, or load it if it is complete; a stopped training continues.

    Args:
        context: the teacher and its training images.
        config: its distillation.
        mixer: name of the mixer.
        directory: of the run; receives `mixers/<name>/`.
        progress: called with every step.
    """
    folder = directory / "mixers" / mixer
    if not (folder / "adapter").is_dir():
        adapter = build_student(context.teacher, mixer, MixerSpec(), config.distillation, config.seed)

        def after_step(stage: str, completed: int, steps: int, losses: dict[str, float]) -> None:
            progress(f"{mixer}: {stage} distillation", completed, steps)

        run_stages(context.teacher, adapter, config.distillation, context.batch, folder / "training", after_step)
        save_folder(folder / "adapter", adapter.save_pretrained)
    return MixerAdapter.from_pretrained(folder / "adapter", context.pipe)


def combine_students(
    students: Mapping[str, MixerAdapter], assignment: Assignment, host: Host, min_tokens: int = 0
) -> MixerAdapter:
    """Build one adapter that has, at each site, the mixer and projections of the student trained with that mixer.

    Args:
        students: by the name of their mixer, on all sites, of one architecture.
        assignment: one site or more.
        host: of the model that the adapter is for.
        min_tokens: see `MixerAdapter.build`.
    """
    sites = [site for site in host.sites() if site.name in assignment]
    site_mixers = {site.name: students[assignment[site.name]].site_mixers[site.name] for site in sites}
    weights = {
        name: tensor
        for site in sites
        for name, tensor in students[assignment[site.name]].student.state_dict().items()
        if name.startswith(f"{site.name}.")
    }
    trains_projections = next(iter(students.values())).train_projections
    adapter = MixerAdapter(host, sites, site_mixers, trains_projections, min_tokens, weights)
    adapter.student.load_state_dict(weights)
    return adapter
