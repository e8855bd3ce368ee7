"""Train the parts, generate images with every combination, and measure them.

    teacher -> student, ControlNet, IP-Adapter (each alone) -> images of every combination -> numbers -> one page

The images are kept as tensors, so that a run that was killed continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel

from experiments.core.environment import describe_environment
from experiments.core.files import require_same_inputs, write_json
from experiments.core.fingerprints import weights_digest
from experiments.core.locks import lock_folder
from experiments.core.progress import ProgressCallback
from experiments.data import open_records
from experiments.data.example import SPLITS, digest_records
from experiments.distill import DistillationContext
from experiments.distill.student import training_sources
from experiments.studies.compatibility.config import CompatibilityConfig
from experiments.studies.compatibility.controlnet import detect_edges
from experiments.studies.compatibility.ip_adapter import embed_images, flatten_weights, ip_adapter_loaded
from experiments.studies.compatibility.measure import (
    clip_similarity,
    edge_agreement,
    mean_interval,
    paired_difference,
)
from experiments.studies.compatibility.sampling import (
    ReferenceImages,
    check_unmounting,
    controlnet_pipeline,
    edge_arguments,
    generate_images,
    image_prompt_arguments,
    load_references,
    reconstruct,
)
from experiments.studies.compatibility.training import (
    CompatibilityModels,
    load_clip,
    open_teacher_context,
    train_models,
)
from unet_adapters.files import save_tensors

RUN = "run.json"
ARMS = ("teacher+", "student+", "teacher", "student")
"""The compared models; + is with the ControlNet or the IP-Adapter."""


def run_compatibility(directory: Path, config: CompatibilityConfig, progress: ProgressCallback) -> dict[str, Any]:
    """Train what is not yet trained, generate what is not yet generated, and measure.

    Args:
        directory: receives run.json, student/, controlnet/, ip_adapter.safetensors (the published format), samples/
            and result.json.
        config: a different one needs another directory.
        progress: called with every phase.

    Returns:
        The results, as written to result.json.

    Raises:
        ValueError: the directory is in use, or holds a run of another configuration, teacher, judge or data.
        OSError: the disk is full or fails; the parts that are complete are kept.

    Cost: about 25 minutes on two CPU cores with the default configuration.
    """
    with lock_folder(directory, "compatibility study"):
        progress("teacher and images", 0, 1)
        context = open_teacher_context(config)
        clip = load_clip(config, context)
        inputs = _inputs(config, context, clip)
        require_same_inputs(directory / RUN, inputs, directory.rglob("*.safetensors"))
        write_json(directory / RUN, inputs)
        models = train_models(config, context, clip, directory, progress)
        result = _measure(config, models, directory, progress)
        write_json(directory / "result.json", result)
        return result


def _measure(
    config: CompatibilityConfig, models: CompatibilityModels, directory: Path, progress: ProgressCallback
) -> dict[str, Any]:
    """Return the results of trained models, as `run_compatibility` does."""
    sampling = config.sampling
    references = [
        load_references(config.grid.data, split, size, sampling.images)
        for size in sampling.sizes
        for split in ("train", "held_out")
    ]
    smallest = references[:2]
    progress("bitwise checks", 0, 1)
    checks = check_unmounting(
        models.context.pipe, models.student, models.controlnet, models.ip_adapter, models.clip, references[0]
    )
    return {
        "config": config.model_dump(mode="json"),
        "environment": describe_environment(),
        "checks": checks,
        "controlnet": [measure_controlnet(config, models, r, directory, progress) for r in references],
        "ip_adapter": [measure_ip_adapter(config, models, r, directory, progress) for r in smallest],
        "parameters": {
            "student": sum(p.numel() for p in models.student.student.parameters()),
            "ControlNet": sum(p.numel() for p in models.controlnet.parameters()),
            "IP-Adapter": sum(p.numel() for p in flatten_weights(models.ip_adapter).values()),
        },
    }


def measure_controlnet(
    config: CompatibilityConfig,
    models: CompatibilityModels,
    references: ReferenceImages,
    directory: Path,
    progress: ProgressCallback,
) -> dict[str, Any]:
    """Measure edge agreement of images generated with and without the ControlNet, by teacher and student."""
    pipe = models.context.pipe
    controlled = controlnet_pipeline(pipe, models.controlnet)
    edges = detect_edges(references.images)

    def generate(with_part: bool) -> Tensor:
        arguments = edge_arguments(edges) if with_part else None
        pipeline = controlled if with_part else pipe
        return generate_images(pipeline, references.captions, references.size, config.sampling, arguments)

    images = _generate_arms("controlnet", models, references, generate, directory, progress)
    scores = {arm: edge_agreement(of_arm, edges) for arm, of_arm in images.items()}
    scores["ceiling"] = edge_agreement(reconstruct(pipe, references.images), edges)
    return _summarize(references, scores)


def measure_ip_adapter(
    config: CompatibilityConfig,
    models: CompatibilityModels,
    references: ReferenceImages,
    directory: Path,
    progress: ProgressCallback,
) -> dict[str, Any]:
    """Measure similarity to the references of images generated from the empty caption, with and without IP-Adapter."""
    pipe = models.context.pipe
    captions = [""] * len(references.captions)
    embeddings = embed_images(models.clip, references.images)

    def generate(with_part: bool) -> Tensor:
        if not with_part:
            return generate_images(pipe, captions, references.size, config.sampling)
        with ip_adapter_loaded(pipe, models.ip_adapter):
            arguments = image_prompt_arguments(embeddings)
            return generate_images(pipe, captions, references.size, config.sampling, arguments, chunk=1)

    images = _generate_arms("ip_adapter", models, references, generate, directory, progress)
    images["caption"] = load_images(directory, "controlnet", references, "teacher")
    images["ceiling"] = reconstruct(pipe, references.images)
    scores = {arm: clip_similarity(models.clip, of_arm, references.images) for arm, of_arm in images.items()}
    return _summarize(references, scores)


def load_images(directory: Path, part: str, references: ReferenceImages, arm: str) -> Tensor:
    """Load generated images (n, 3, s, s) in [-1, 1] of a run.

    Args:
        directory: of the run.
        part: "controlnet" or "ip_adapter".
        references: what they were generated from.
        arm: one of `ARMS`.
    """
    return load_file(_images_path(directory, part, references, arm))["images"].float() / 127.5 - 1


def _generate_arms(
    part: str,
    models: CompatibilityModels,
    references: ReferenceImages,
    generate: Callable[[bool], Tensor],
    directory: Path,
    progress: ProgressCallback,
) -> dict[str, Tensor]:
    """Generate the images of every arm, or load those that exist."""
    student = models.student
    for number, arm in enumerate(ARMS):
        path = _images_path(directory, part, references, arm)
        progress(f"{part}, {references.split}, {references.size} px", number, len(ARMS))
        if not path.is_file():
            with student.mounted() if arm.startswith("student") else student.unmounted():
                pixels = ((generate(arm.endswith("+")) + 1) * 127.5).round().to(torch.uint8)
            save_tensors(path, {"images": pixels})
    return {arm: load_images(directory, part, references, arm) for arm in ARMS}


def _images_path(directory: Path, part: str, references: ReferenceImages, arm: str) -> Path:
    name = arm.replace("+", "_with")
    return directory / "samples" / f"{part}-{references.split}-{references.size}-{name}.safetensors"


def _summarize(references: ReferenceImages, scores: dict[str, list[float]]) -> dict[str, Any]:
    """Return intervals of the means of all arms, and the effects of the part.

    Args:
        references: what was generated from.
        scores: arm -> one score per image.
    """
    effect = {model: paired_difference(scores[f"{model}+"], scores[model]) for model in ("teacher", "student")}
    teacher_effect = effect["teacher"]["mean"]
    return {
        "split": references.split,
        "size": references.size,
        "arms": {arm: {**mean_interval(values), "values": values} for arm, values in scores.items()},
        "effect": effect,
        "student_minus_teacher": paired_difference(scores["student+"], scores["teacher+"]),
        "effect_kept": effect["student"]["mean"] / teacher_effect if teacher_effect else None,
    }


def _inputs(config: CompatibilityConfig, context: DistillationContext, clip: CLIPModel) -> dict[str, Any]:
    """Return what the trained parts, the images and the numbers of a run depend on."""
    distillation = config.grid.distillation
    return {
        "configuration": config.model_dump(mode="json"),
        "teacher": context.teacher.fingerprint,
        "judge": weights_digest(clip),
        "data": [digest_records(open_records(config.grid.data, split=split)) for split in SPLITS],
        "plugin source": training_sources(config.grid.variants[0].mixer, distillation),
    }
