"""The teacher's quality, measured, and its model card: what a reader needs to trust or distrust it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from jinja2 import Template
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import CLIPModel

from experiments.data import CaptionedImages, EmojiSet, batch
from experiments.data.emoji import BACKGROUNDS, LICENSE
from experiments.teacher.load import load_teacher
from experiments.teacher.recipe import TeacherRecipe

GUIDANCE, STEPS, CANDIDATES, SHEET = 3.0, 25, 100, 32
_TEMPLATE = Path(__file__).parent / "card.md.j2"


@torch.no_grad()
def write_card(folder: Path, recipe: TeacherRecipe) -> Path:
    """Measure the pipeline in `folder`, write `README.md` and `sheet.png` beside it; returns the card's path.

    Samples 100 held-in captions; about a minute on two cores.
    """
    pipe = load_teacher(str(folder))
    judge = CLIPModel.from_pretrained(folder / "evaluator", dtype=torch.float32).eval()
    seen, unseen, size = EmojiSet("train"), EmojiSet("held_out"), recipe.image_size
    real, captions = batch(seen, _spread(len(seen), CANDIDATES), size, [1000] * CANDIDATES)
    drawn = sample(pipe, captions, size)
    figures = {
        "psnr": psnr(pipe, unseen, size),
        "retrieval_real": retrieval(pipe, judge, real, captions),
        "retrieval_drawn": retrieval(pipe, judge, drawn, captions),
        "backgrounds_real": backgrounds_obeyed(real, captions),
        "backgrounds_drawn": backgrounds_obeyed(drawn, captions),
        "millions": {n: sum(p.numel() for p in m.parameters()) / 1e6 for n, m in _networks(pipe, judge).items()},
        "megabytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6,
    }
    sheet(drawn[::3][:SHEET], captions[::3][:SHEET]).save(folder / "sheet.png")
    card = folder / "README.md"
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).render(
        **figures, recipe=recipe, license=LICENSE, candidates=CANDIDATES, guidance=GUIDANCE, steps=STEPS, seen=len(seen)
    )
    card.write_text(text + "\n", encoding="utf-8")
    return card


def sample(pipe: StableDiffusionPipeline, captions: list[str], size: int) -> Tensor:
    """One picture a caption, seed k for caption k: (n, 3, size, size) in [-1, 1]."""
    parts = []
    for start in range(0, len(captions), 25):
        chunk = captions[start : start + 25]
        seeds = [torch.Generator().manual_seed(start + k) for k in range(len(chunk))]
        options = {"height": size, "width": size, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        parts.append(pipe(chunk, generator=seeds, output_type="pt", **options).images * 2 - 1)
    return torch.cat(parts).float()


def psnr(pipe: StableDiffusionPipeline, data: CaptionedImages, size: int) -> float:
    """Peak signal-to-noise ratio (dB) of the autoencoder on every picture of `data`, from the mean error of each."""
    values = []
    for start in range(0, len(data), 32):
        indices = range(start, min(start + 32, len(data)))
        images, _ = batch(data, indices, size, [0] * len(indices))
        decoded = pipe.vae.decode(pipe.vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        values.append(-10 * torch.log10((decoded - images).square().mean(dim=(1, 2, 3)) / 4))
    return float(torch.cat(values).mean())


def retrieval(pipe: StableDiffusionPipeline, judge: CLIPModel, images: Tensor, captions: list[str]) -> float:
    """Share of pictures whose own caption the CLIP ranks first among all of `captions`."""
    tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    logits = judge(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=images
    ).logits_per_image
    return float((logits.argmax(1) == torch.arange(len(images))).float().mean())


def backgrounds_obeyed(images: Tensor, captions: list[str]) -> float:
    """Share of pictures whose most frequent border color is nearest to the background their caption names."""
    names = list(BACKGROUNDS)
    palette = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in BACKGROUNDS.values()]).float()
    pixels = (images + 1) * 127.5
    border = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]], dim=-1)
    nearest = torch.cdist(border.permute(0, 2, 1).contiguous(), palette).argmin(-1)
    votes = torch.mode(nearest, dim=1).values.tolist()
    wanted = [names.index(c.rsplit(", ", 1)[1].removesuffix(" background")) for c in captions]
    return float(np.mean([v == w for v, w in zip(votes, wanted, strict=True)]))


def sheet(images: Tensor, captions: list[str], columns: int = 8, scale: int = 2) -> Image.Image:
    """A contact sheet: pictures with their captions beneath."""
    side, label = images.shape[-1] * scale, 26
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + label + 8) + 8), "white")
    pen = ImageDraw.Draw(page)
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 8 + (k % columns) * (side + 8), 8 + (k // columns) * (side + label + 8)
        pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        page.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
        name, background = caption.rsplit(", ", 1)
        pen.text((x, y + side + 1), f"{name[:21]}\n{background}", fill="black", font_size=10, spacing=1)
    return page


def _spread(total: int, count: int) -> list[int]:
    """`count` indices spread over `total` in a fixed random order, so that a sheet shows a fair sample."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(1))[:count].tolist()


def _networks(pipe: StableDiffusionPipeline, judge: CLIPModel) -> dict[str, torch.nn.Module]:
    return {"UNet": pipe.unet, "autoencoder": pipe.vae, "text encoder": pipe.text_encoder, "CLIP for evaluation": judge}
