"""The judge: a small CLIP of its own seed and architecture, trained on renders, that names what samples show."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from experiments.data import SceneSet
from experiments.teacher import networks
from experiments.teacher.objectives import Contrastive
from experiments.teacher.recipe import TeacherRecipe
from experiments.teacher.shards import encode_captions
from experiments.teacher.state import fit_stage
from experiments.training import StageCallback, batch_indices

NAMED_KINDS = ("single", "counted", "shapes")


def train_judge(
    directory: Path, words: CLIPTokenizer, recipe: TeacherRecipe, report: StageCallback | None = None
) -> CLIPModel:
    """Train the judge, or resume its training, on named scenes, also of drawings that the teacher never sees."""
    torch.manual_seed(recipe.judge.seed)
    model = networks.judge(words, recipe)
    data = SceneSet("train", kinds=NAMED_KINDS, others=True)
    count = 12_000 if recipe.judge.steps > 100 else 64
    draw = torch.Generator().manual_seed(recipe.judge.seed)
    indices = torch.randint(0, len(data), (count,), generator=draw).tolist()
    examples = [data.example(index, recipe.image_size, 70_000 + k) for k, index in enumerate(indices)]
    images = torch.stack([((e.image + 1) * 127.5).round().to(torch.uint8) for e in examples])
    tokens = encode_captions(words, [e.caption for e in examples])

    def pairs(step: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = batch_indices(step, recipe.judge, count)
        return images[rows].float() / 127.5 - 1, tokens[rows], attention_mask(tokens[rows], words)

    def watch(step: int, losses: dict[str, float]) -> None:
        if report:
            report("judge", step, recipe.judge.steps, losses)

    fit_stage(Contrastive(model), pairs, recipe.judge, directory / "judge", watch)
    return model.eval()


def attention_mask(tokens: Tensor, words: CLIPTokenizer) -> Tensor:
    """Return the mask (b, t) of token ids: 1 up to the first end-of-text token, 0 after it."""
    ended = (tokens == words.eos_token_id).long().cumsum(dim=1)
    return (ended - (tokens == words.eos_token_id).long() < 1).long()


@torch.no_grad()
def top1_accuracy(judge: CLIPModel, words: CLIPTokenizer, images: Tensor, candidates: list[list[str]]) -> float:
    """Return the share of images (n, 3, 64, 64) for which the judge ranks the first of their own candidates first."""
    hits = 0
    for image, captions in zip(images, candidates, strict=True):
        tokens = encode_captions(words, captions)
        mask = attention_mask(tokens, words)
        logits = judge(input_ids=tokens, attention_mask=mask, pixel_values=image[None]).logits_per_image
        hits += int(logits.argmax()) == 0
    return hits / len(images)
