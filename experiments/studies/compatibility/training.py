"""The three parts of the study, each trained against the softmax UNet without having seen the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel

from experiments.ablation.cell import distill_cell
from experiments.core.files import save_folder
from experiments.core.progress import ProgressCallback
from experiments.data import open_dataset
from experiments.distill import DistillationContext, build_student, open_context
from experiments.studies.compatibility import controlnet as control
from experiments.studies.compatibility import ip_adapter as ip
from experiments.studies.compatibility.config import CompatibilityConfig
from experiments.teacher.load import EMBEDDED
from experiments.training import fit
from unet_adapters import MixerAdapter
from unet_adapters.files import save_tensors


@dataclass(frozen=True)
class CompatibilityModels:
    """The teacher with its training images, and the parts that are combined.

    Attributes:
        context: the teacher and its encoded training images.
        clip: the teacher's own small CLIP, which judges similarity and embeds images for the IP-Adapter.
        student: the distilled student, not mounted.
        controlnet: trained with the teacher's softmax attention.
        ip_adapter: weights in the published format, trained with the teacher's softmax attention.
    """

    context: DistillationContext
    clip: CLIPModel
    student: MixerAdapter
    controlnet: ControlNetModel
    ip_adapter: ip.IPAdapterWeights


def train_models(
    config: CompatibilityConfig,
    context: DistillationContext,
    clip: CLIPModel,
    directory: Path,
    progress: ProgressCallback,
) -> CompatibilityModels:
    """Train every part that is not yet complete in the folder."""
    student = train_student(config, context, directory, progress)
    controlnet = train_controlnet(config, context, directory, progress)
    weights = train_ip_adapter(config, context, clip, directory, progress)
    return CompatibilityModels(context, clip, student, controlnet, weights)


def open_teacher_context(config: CompatibilityConfig) -> DistillationContext:
    """Open the teacher and encode its training images."""
    distillation = config.grid.distillation
    more_sizes = distillation.all_sizes[1:]
    return open_context(config.grid.teacher, config.grid.data, distillation.image_size, distillation.images, more_sizes)


def load_clip(config: CompatibilityConfig, context: DistillationContext) -> CLIPModel:
    """Load the CLIP that was trained with the teacher.

    Raises:
        ValueError: the teacher's folder has none.
    """
    teacher = config.grid.teacher
    folder = (EMBEDDED if teacher == "embedded" else Path(teacher)) / "evaluator"
    if not folder.is_dir():
        raise ValueError(f"Cannot judge images: {folder} is missing. Expected the CLIP that `mixlab teacher` writes.")
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return clip.to(context.pipe.device)


def train_student(
    config: CompatibilityConfig, context: DistillationContext, directory: Path, progress: ProgressCallback
) -> MixerAdapter:
    """Distill the student by the ablations' own objective, or load it if it is complete."""
    folder = directory / "student"
    if not folder.is_dir():
        cell = config.grid.cells()[0]
        variant = config.grid.variants[0]
        adapter = build_student(context.teacher, variant.mixer, variant, cell.distillation, cell.seed)
        checkpoints = directory / "training" / "student"
        distill_cell(cell, context, adapter, checkpoints, lambda _, done, total: progress("student", done, total))
        save_folder(folder, adapter.save_pretrained)
    return MixerAdapter.from_pretrained(folder, context.pipe)


def train_controlnet(
    config: CompatibilityConfig, context: DistillationContext, directory: Path, progress: ProgressCallback
) -> ControlNetModel:
    """Train the ControlNet with the softmax UNet, or load it if it is complete."""
    folder = directory / "controlnet"
    pipe = context.pipe
    if not folder.is_dir():
        torch.manual_seed(config.seed)
        model = control.create_controlnet(pipe.unet, pipe.vae_scale_factor)
        edges = torch.cat([control.detect_edges(chunk).bool() for chunk in _training_images(config)])
        fit(
            control.controlnet_loss(pipe.unet, model, context.teacher.scheduler),
            control.controlnet_batches(
                context, edges, _empty_caption(context), config.controlnet, config.controlnet_caption_dropout
            ),
            config.controlnet,
            directory / "training" / "controlnet",
            lambda step, _: progress("ControlNet", step, config.controlnet.steps),
        )
        save_folder(folder, model.save_pretrained)
    model = ControlNetModel.from_pretrained(folder).eval().requires_grad_(False)
    return model.to(pipe.device)


def train_ip_adapter(
    config: CompatibilityConfig,
    context: DistillationContext,
    clip: CLIPModel,
    directory: Path,
    progress: ProgressCallback,
) -> ip.IPAdapterWeights:
    """Train the IP-Adapter with the softmax UNet, or load it if it is complete."""
    file = directory / "ip_adapter.safetensors"
    pipe = context.pipe
    if not file.is_file():
        embeddings = torch.cat([ip.embed_images(clip, chunk) for chunk in _training_images(config)])
        with ip.ip_adapter_loaded(pipe, ip.initial_weights(pipe, embeddings, context.text_states)):
            fit(
                ip.ip_adapter_loss(pipe.unet, context.teacher.scheduler),
                ip.ip_adapter_batches(
                    context,
                    embeddings,
                    _empty_caption(context),
                    config.ip_adapter,
                    config.ip_adapter_caption_dropout,
                    config.ip_adapter_image_dropout,
                ),
                config.ip_adapter,
                directory / "training" / "ip_adapter",
                lambda step, _: progress("IP-Adapter", step, config.ip_adapter.steps),
            )
            weights = ip.flatten_weights(ip.read_weights(pipe.unet))
        save_tensors(file, weights)
    return ip.unflatten_weights(load_file(file))


def _training_images(config: CompatibilityConfig) -> list[Tensor]:
    distillation = config.grid.distillation
    data = open_dataset(config.grid.data, split="train")
    return control.training_images(data, distillation.image_size, distillation.images)


def _empty_caption(context: DistillationContext) -> Tensor:
    """Return the text states (t, d) of the empty caption."""
    with torch.no_grad():
        text, _ = context.pipe.encode_prompt([""], context.pipe.device, 1, do_classifier_free_guidance=False)
    return text[0]
