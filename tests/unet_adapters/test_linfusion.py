"""The published LinFusion format: round trips, its numerics, and what a damaged or foreign file says."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from mixers import list_mixers
from tests.unet_adapters.linfusion_files import load_weights, module, publish
from unet_adapters import MixerAdapter, find_sites
from unet_adapters.linfusion import CONFIG, DOWNLOADS, WEIGHTS, LinFusionModule

HALF = "diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture
def published(unet, tmp_path) -> Path:
    return publish(tmp_path / "published", unet, [None, -1, 5, 8])


class Theirs:
    """The published computation as a processor, from the file's tensors; shares nothing with our mixers."""

    def __init__(self, heads: int, tensors: dict[str, Tensor]):
        self.heads = heads
        self.t = tensors

    def net(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.0.weight" not in self.t:
            return x  # their Identity, which is added to x as an MLP's result is
        y = F.linear(x, self.t[f"{name}.0.weight"], self.t[f"{name}.0.bias"])
        y = F.layer_norm(y, y.shape[-1:], self.t[f"{name}.1.weight"], self.t[f"{name}.1.bias"])
        return F.linear(F.leaky_relu(y), self.t[f"{name}.3.weight"], self.t[f"{name}.3.bias"])

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x = hidden_states
        n = hidden_states.shape[1]
        q = F.linear(x + self.net("to_q_", x), self.t["to_q.weight"])
        k = F.linear(x + self.net("to_k_", x), self.t["to_k.weight"])
        v = F.linear(x, self.t["to_v.weight"])
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = q @ k.mean(-2, keepdim=True).transpose(-2, -1) + 1e-4
        y = q @ ((k * n**-0.5).transpose(-2, -1) @ (v * n**-0.5)) / z
        return F.linear(y.transpose(1, 2).flatten(2), self.t["to_out.0.weight"], self.t["to_out.0.bias"])


def theirs(unet: UNet2DConditionModel, folder: Path) -> UNet2DConditionModel:
    copy = deepcopy(unet)
    tensors = load_weights(folder / WEIGHTS)
    for i, entry in enumerate(json.loads((folder / CONFIG).read_text())["modules_list"]):
        own = {name.removeprefix(f"{i}."): t for name, t in tensors.items() if name.startswith(f"{i}.")}
        copy.get_submodule(entry["module_name"]).processor = Theirs(entry["heads"], own)
    return copy


@torch.no_grad()
def test_the_numerics_are_theirs(unet, run, published) -> None:
    base = run(unet)
    with MixerAdapter.from_linfusion(published, unet).mounted():
        ours = run(unet)
    assert (ours - run(theirs(unet, published))).abs().max() <= 1e-5
    assert (ours - base).abs().max() > 1e-2 and torch.equal(run(unet), base)


@pytest.mark.parametrize("mid", [None, -1, 3])
@torch.no_grad()
def test_the_numerics_are_theirs_for_every_form(unet, run, tmp_path, mid) -> None:
    """-1 is not plain linear attention on their projections: their Identity makes it to_q(x + x)."""
    published = publish(tmp_path / "published", unet, [mid] * 4)
    adapter = MixerAdapter.from_linfusion(published, unet)
    reference = run(theirs(unet, published))
    assert all(bool(list(mixer.parameters())) == (mid != -1) for mixer in adapter.mixers.values())
    with adapter.mounted():
        assert (run(unet) - reference).abs().max() <= 1e-5


@torch.no_grad()
def test_published_ours_published_is_bitwise(unet, published, tmp_path) -> None:
    adapter = MixerAdapter.from_linfusion(published, unet)
    assert not adapter.is_mounted and adapter.train_projections and len(adapter.sites) == 4
    adapter.save_linfusion(tmp_path / "again")
    before, after = (
        {e["module_name"]: (i, e) for i, e in enumerate(modules(f))} for f in (published, tmp_path / "again")
    )
    old = load_weights(published / WEIGHTS)
    new = load_weights(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys() and len(old) == len(new)
    for name, (i, entry) in after.items():
        j, published_entry = before[name]
        assert entry == published_entry
        parts = [key.removeprefix(f"{i}.") for key in new if key.startswith(f"{i}.")]
        assert parts and all(torch.equal(new[f"{i}.{part}"], old[f"{j}.{part}"]) for part in parts)


def modules(folder: Path) -> list[dict]:
    return json.loads((folder / CONFIG).read_text())["modules_list"]


PLAIN = {"mixer_name": "linear_attention", "eps": 1e-4}  # the published form without MLPs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mid_dim": 3},
        {"train_projections": False},
        {"select": "mid_block"},
        PLAIN,
        {**PLAIN, "train_projections": False},
    ],
    ids=str,
)
def test_ours_published_ours_is_bitwise(unet, run, train, tmp_path, options) -> None:
    adapter = MixerAdapter.build(
        unet, options.get("mixer_name", "linfusion"), **{k: v for k, v in options.items() if k != "mixer_name"}
    )
    if list(adapter.student.parameters()):
        train(adapter)
    with torch.no_grad(), adapter.mounted():
        mounted = run(unet)
        adapter.save_linfusion(tmp_path / "mounted")
    adapter.save_linfusion(tmp_path / "unmounted")
    assert (tmp_path / "mounted" / WEIGHTS).read_bytes() == (tmp_path / "unmounted" / WEIGHTS).read_bytes()
    assert sorted(path.name for path in (tmp_path / "mounted").iterdir()) == [CONFIG, WEIGHTS]
    assert [e["module_name"] for e in modules(tmp_path / "mounted")] == [site.name for site in adapter.sites]
    assert {e["projection_mid_dim"] for e in modules(tmp_path / "mounted")} == {
        -1 if "eps" in options else options.get("mid_dim")
    }
    again = MixerAdapter.from_linfusion(tmp_path / "mounted", unet)
    with torch.no_grad(), again.mounted():
        assert torch.equal(run(unet), mounted)


def test_it_goes_on_as_any_adapter(unet, run, train, published, tmp_path) -> None:
    adapter = MixerAdapter.from_linfusion(published, type("Pipe", (), {"unet": unet})())
    train(adapter)
    adapter.save_pretrained(tmp_path / "adapter")
    again = MixerAdapter.from_pretrained(tmp_path / "adapter", unet)
    with torch.no_grad():
        with adapter.mounted():
            trained = run(unet)
        with again.mounted():
            assert torch.equal(run(unet), trained)


@torch.no_grad()
def test_half_precision_files(unet, published) -> None:
    """The fp16 variant is read where it is the only one; it is then in the dtype of the UNet."""
    full = load_weights(published / WEIGHTS)
    save_file({name: tensor.half() for name, tensor in full.items()}, published / HALF)
    (published / WEIGHTS).unlink()
    adapter = MixerAdapter.from_linfusion(published, unet)
    name = modules(published)[0]["module_name"]
    weight = adapter.parameters_by_name()[f"{name}.to_q.weight"]
    assert weight.dtype == torch.float32 and torch.equal(weight, full["0.to_q.weight"].half().float())
    unet.to(torch.bfloat16)
    assert {p.dtype for p in MixerAdapter.from_linfusion(published, unet).student.parameters()} == {torch.bfloat16}


def test_a_hub_id(unet, published, monkeypatch) -> None:
    requests = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        requests.append((repository, allow_patterns))
        return str(published)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(MixerAdapter.from_linfusion("Yuanshi/LinFusion-1-5", unet).sites) == 4
    assert requests == [("Yuanshi/LinFusion-1-5", DOWNLOADS)]


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_weights(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def change_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


def change_entry(**changes: object) -> Callable[[Path], None]:
    return change_config(lambda config: config["modules_list"][0].update(changes))


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def only_a_pickle(folder: Path) -> None:
    torch.save(load_weights(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def a_pickle_under_its_name(folder: Path) -> None:
    torch.save(load_weights(folder / WEIGHTS), folder / WEIGHTS)


DAMAGE = {
    "tensor missing": (change_tensors(lambda t: t.pop("2.to_k_.3.bias")), "2.to_k_.3.bias is missing"),
    "tensors missing": (change_tensors(lambda t: [t.pop(f"{i}.to_q.weight") for i in range(3)]), "2 more of the kind"),
    "tensor left over": (change_tensors(lambda t: t.update({"4.x": torch.ones(1)})), "4.x is left over"),
    "wrong shape": (
        change_tensors(lambda t: t.update({"0.to_out.0.bias": torch.ones(3)})),
        r"0.to_out.0.bias is \(3,\), expected \(16,\)",
    ),
    "whole numbers": (
        change_tensors(lambda t: t.update({"0.to_q.weight": torch.ones(16, 16, dtype=torch.int8)})),
        "stored as I8",
    ),
    "not finite": (
        change_tensors(lambda t: t["1.to_q.weight"].fill_(torch.nan)),
        "1.to_q.weight has values that are not",
    ),
    "weights truncated": (cut(WEIGHTS, 0.7), "truncated, damaged or not a safetensors file"),
    "header truncated": (cut(WEIGHTS, 0.01), "truncated, damaged or not a safetensors file"),
    "weights empty": (cut(WEIGHTS, 0), "truncated, damaged or not a safetensors file"),
    "weights missing": (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "pickle": (only_a_pickle, "diffusion_pytorch_model.bin is a pickle, which is never read"),
    "pickle renamed": (a_pickle_under_its_name, "not a safetensors file"),
    "config missing": (lambda folder: (folder / CONFIG).unlink(), "not a LinFusion folder"),
    "config truncated": (cut(CONFIG, 0.5), "is not JSON"),
    "config not text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    "config too deep": (lambda folder: (folder / CONFIG).write_text("[" * 200_000), "is not JSON"),
    "config a list": (lambda folder: (folder / CONFIG).write_text("[]"), "describes no diffusers model"),
    "another class": (
        change_config(lambda c: c.update(_class_name="UNet2DConditionModel")),
        "describes UNet2DConditionModel, expected _class_name 'LinFusion'",
    ),
    "no modules": (change_config(lambda c: c.update(modules_list=[])), "modules_list should be a list"),
    "module twice": (change_config(lambda c: c["modules_list"].append(c["modules_list"][0])), "more than once"),
    "entry incomplete": (change_config(lambda c: c["modules_list"][1].pop("heads")), "entry 1 of modules_list"),
    "entry a list": (change_config(lambda c: c["modules_list"].insert(0, [1])), "entry 0 of modules_list"),
    "mid zero": (change_entry(projection_mid_dim=0), "null, -1 or positive"),
    "mid true": (change_entry(projection_mid_dim=True), "null, -1 or positive"),
    "mid enormous": (change_entry(projection_mid_dim=10**15), r"expected \(1000000000000000, 16\)"),
    "heads do not divide": (change_entry(heads=3), "dim_n that heads divides"),
    "unknown module": (change_entry(module_name="mid_block.nowhere"), r"mid_block.nowhere \(dim 16.*no such site here"),
    "other heads": (change_entry(heads=4), r"heads 4 there; dim 16, heads 2 here"),
    "cross-attention": (
        change_entry(module_name="mid_block.attentions.0.transformer_blocks.0.attn2"),
        "no such site here",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
@torch.no_grad()
def test_damage_is_one_sentence_and_the_unet_is_as_before(unet, run, weights, published, damage, message) -> None:
    base = run(unet)
    before = weights(unet)
    objects = dict(unet.named_parameters())
    kinds = {name: type(m) for name, m in unet.named_modules()}
    damage(published)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        MixerAdapter.from_linfusion(published, unet)
    assert str(caught.value).count("\n") == 0 and str(published) in str(caught.value)
    after = unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert {name: type(m) for name, m in unet.named_modules()} == kinds and torch.equal(run(unet), base)
    assert all(parameter is objects[name] for name, parameter in unet.named_parameters())


def test_a_file_for_another_unet_says_for_which(unet, tmp_path) -> None:
    """Only the config is looked at before this is said: the weights need not be there."""
    from unet_adapters.hosts.unet_profiles import PROFILES

    named = {profile.name: profile for profile in PROFILES}
    for name, other in (("SD-2.1", "SD-1.5 inpainting"), ("SD-1.5", "SDXL base"), ("SDXL base", "SD-1.5")):
        entries = [
            {"module_name": n, "dim_n": s["dim"], "heads": s["heads"], "projection_mid_dim": None}
            for n, s in named[name].fingerprint.items()
        ]
        (tmp_path / CONFIG).write_text(json.dumps({"_class_name": "LinFusion", "modules_list": entries}))
        with pytest.raises(ValueError, match=f"is for {name} and this UNet is {other}: .* modules that do not fit"):
            MixerAdapter.from_linfusion(tmp_path, named[other].unet())
        with pytest.raises(ValueError, match="this UNet is a UNet without a published profile"):
            MixerAdapter.from_linfusion(tmp_path, unet)


def test_our_own_folder_is_named_as_such(unet, tmp_path) -> None:
    MixerAdapter.build(unet, "linfusion").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="it is an adapter for from_pretrained"):
        MixerAdapter.from_linfusion(tmp_path, unet)


def test_a_source_that_is_no_directory_and_no_repository(unet, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a directory nor a Hub repository"):
        MixerAdapter.from_linfusion(tmp_path / "nowhere", unet)


def test_a_unet_that_is_mounted_already_is_refused(unet, published) -> None:
    with MixerAdapter.build(unet, "linfusion").mounted(), pytest.raises(RuntimeError, match="another adapter"):
        MixerAdapter.from_linfusion(published, unet)


def test_projections_that_the_format_has_not(unet, published, tmp_path) -> None:
    attn = unet.get_submodule(find_sites(unet)[0].name)
    attn.to_q.bias = torch.nn.Parameter(torch.zeros(8))
    sentence = "to_q of the model has bias and weight; in the LinFusion format it has weight"
    with pytest.raises(ValueError, match=sentence):
        MixerAdapter.from_linfusion(published, unet)
    with pytest.raises(ValueError, match=sentence):
        MixerAdapter.build(unet, "linfusion").save_linfusion(tmp_path / "out")


@pytest.mark.parametrize(
    ("mixer", "options", "reason"),
    [
        ("linfusion", {"causality": "causal"}, r"causality='causal' \(it has 'noncausal'\)"),
        ("linfusion", {"normalize": False}, r"normalize=False \(it has True\)"),
        ("linfusion", {"eps": 1e-6}, r"eps=1e-06 \(it has 0.0001\)"),
        ("linfusion", {"feature_map": "relu"}, r"feature_map='relu' \(it has 'elu_plus_one'\)"),
        ("linfusion", {"gate": True}, r"gate=True \(it has False\)"),
        ("linfusion", {"min_tokens": 9}, "min_tokens=9"),
        ("linear_attention", {}, r"cannot express eps=1e-06 \(it has 0.0001\)"),
    ],
)
def test_what_the_format_has_no_place_for(unet, tmp_path, mixer, options, reason) -> None:
    adapter = MixerAdapter.build(unet, mixer, **options)
    with pytest.raises(ValueError, match=f"{reason}.*use save_pretrained"):
        adapter.save_linfusion(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mixer", sorted(set(list_mixers()) - {"linfusion", "linear_attention"}))
def test_other_mixers_are_refused(unet, tmp_path, mixer) -> None:
    with pytest.raises(ValueError, match=rf"attn1 is {mixer}: use save_pretrained"):
        MixerAdapter.build(unet, mixer).save_linfusion(tmp_path / "out")


def test_a_fused_lora_is_refused(unet, tmp_path) -> None:
    from peft import LoraConfig

    adapter = MixerAdapter.build(unet, "linfusion", train_projections=False)
    adapter.save_linfusion(tmp_path / "plain")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False), "style")
    adapter.save_linfusion(tmp_path / "with")
    assert (tmp_path / "with" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()
    unet.fuse_lora()
    with pytest.raises(RuntimeError, match="cannot save in the LinFusion format: a LoRA is fused"):
        adapter.save_linfusion(tmp_path / "fused")


def test_a_module_has_seventeen_tensors_or_five() -> None:
    for mid, count in ((None, 17), (7, 17), (-1, 5)):
        parts = LinFusionModule("x", 8, 2, mid).tensors(3)
        expected = {f"3.{name}": tuple(tensor.shape) for name, tensor in module(8, mid).items()}
        assert {part.published: part.shape for part in parts} == expected and len(parts) == count
