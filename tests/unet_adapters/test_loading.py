"""What is read is what diffusers would read: variants, shards, either format of an adapter; and why nothing is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from tests.unet_adapters.linfusion_files import publish
from unet_adapters import MixerAdapter, load_adapter
from unet_adapters.linfusion import WEIGHTS
from unet_adapters.weight_files import STEM, find_weight_files, list_variants


def shard(folder: Path, suffix: str = "") -> None:
    """Replace the only weights file by two shards and their index, as huggingface_hub splits them."""
    tensors = load((folder / f"{STEM}{suffix}.safetensors").read_bytes())
    (folder / f"{STEM}{suffix}.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{STEM}{suffix}-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index{suffix}.json").write_text(json.dumps(index))


@pytest.fixture
def published(unet, tmp_path) -> Path:
    return publish(tmp_path / "published", unet, [None, -1, 5, 8])


def weights_of(adapter: MixerAdapter) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapter.parameters_by_name().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys() and left
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_either_format_of_an_adapter_is_loaded_alike(unet, published, tmp_path) -> None:
    linfusion = load_adapter(published, unet)
    linfusion.save_pretrained(tmp_path / "ours")
    assert_equal(weights_of(load_adapter(tmp_path / "ours", unet)), weights_of(linfusion))
    with pytest.raises(ValueError, match="no variants"):
        load_adapter(tmp_path / "ours", unet, variant="fp16")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter: expected adapter\.json, or the config\.json"):
        load_adapter(tmp_path / "empty", unet)


def test_a_sharded_linfusion_is_the_whole_one(unet, published) -> None:
    whole = weights_of(MixerAdapter.from_linfusion(published, unet))
    shard(published)
    assert_equal(weights_of(MixerAdapter.from_linfusion(published, unet)), whole)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / f"{STEM}-00002-of-00002.safetensors").unlink(), "lists it as a shard"),
        (lambda f: (f / f"{STEM}.safetensors.index.json").write_text("{}"), "weight_map"),
        (lambda f: (f / f"{STEM}.safetensors.index.json").write_text("[["), "weight_map"),
        (lambda f: (f / f"{STEM}.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'), "'../x'"),
        (lambda f: (f / f"{STEM}.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'), "1 is not the name"),
    ],
)
def test_damaged_shards_are_one_error(unet, published, damage, message) -> None:
    shard(published)
    damage(published)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        MixerAdapter.from_linfusion(published, unet)


def test_variants_of_a_linfusion(unet, published) -> None:
    plain = weights_of(MixerAdapter.from_linfusion(published, unet))
    tensors = load((published / WEIGHTS).read_bytes())
    for variant in ("fp16", "ema"):
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, published / f"{STEM}.{variant}.safetensors")
    assert_equal(weights_of(load_adapter(published, unet)), plain)
    doubled = weights_of(load_adapter(published, unet, variant="fp16"))
    assert_equal(doubled, {name: 2 * tensor for name, tensor in plain.items()})
    (published / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"it has the variant ema, fp16; pass variant='ema'"):
        load_adapter(published, unet)
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.bf16\.safetensors"):
        load_adapter(published, unet, variant="bf16")
    assert list_variants(published, STEM) == ["ema", "fp16"]
    shard(published, ".fp16")
    assert list_variants(published, STEM) == ["ema", "fp16"]
    assert_equal(weights_of(load_adapter(published, unet, variant="fp16")), doubled)


@torch.no_grad()
def test_a_mounted_model_of_each_variant(unet, run, tmp_path) -> None:
    """Two checkpoints in one folder are two checkpoints."""
    outputs = {}
    for seed, variant in enumerate((None, "fp16")):
        torch.manual_seed(seed)
        adapter = MixerAdapter.build(unet, "linfusion")
        for parameter in adapter.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        with adapter.mounted():
            outputs[variant] = run(unet)
            unet.save_pretrained(tmp_path, variant=variant)
    for variant, expected in outputs.items():
        assert torch.equal(run(MixerAdapter.from_mounted(tmp_path, variant=variant).model), expected)
    assert not torch.allclose(outputs[None], outputs["fp16"], atol=1e-3)


@torch.no_grad()
def test_a_mounted_model_in_shards(unet, run, tmp_path) -> None:
    with MixerAdapter.build(unet, "linfusion").mounted():
        expected = run(unet)
        unet.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(find_weight_files(tmp_path, STEM)) > 1
    assert torch.equal(run(MixerAdapter.from_mounted(tmp_path).model), expected)


def test_weights_that_are_not_read_are_named(unet, tmp_path) -> None:
    with MixerAdapter.build(unet, "linfusion").mounted():
        unet.save_pretrained(tmp_path / "pickled", safe_serialization=False)
        unet.save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(FileNotFoundError, match=r"\.bin is a pickle, which is never read"):
        MixerAdapter.from_mounted(tmp_path / "pickled")
    with pytest.raises(FileNotFoundError, match="it has the variant fp16; pass variant='fp16'"):
        MixerAdapter.from_mounted(tmp_path / "half")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        MixerAdapter.from_mounted(tmp_path)
