"""Projections whose weights are quantized: whatever the library, they are used but not trained."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load
from torch import nn

from experiments.core.fingerprints import plain_tensors, weights_digest, weights_version
from tests.unet_adapters.linfusion_files import publish
from tests.unet_adapters.quantized_layers import LIBRARIES, STAND_INS
from unet_adapters import MixerAdapter, find_sites
from unet_adapters.highres.fingerprint import fingerprint
from unet_adapters.linfusion import WEIGHTS

KINDS = {
    **{f"{name}'s stand-in": layer for name, layer in STAND_INS.items()},
    **{name: layer for name, (_, layer) in LIBRARIES.items()},
}
MODULES = {layer: module for module, layer in LIBRARIES.values()}
PROJECTIONS = ("to_q", "to_k", "to_v")


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def quantized(request, unet):
    if request.param in MODULES:
        pytest.importorskip(MODULES[request.param], reason="compared where it is installed; a stand-in is tested")
    for site in find_sites(unet):
        layer = unet.get_submodule(site.name)
        for name in PROJECTIONS:
            setattr(layer, name, request.param(getattr(layer, name)))
        layer.to_out[0] = request.param(layer.to_out[0])
    return unet.requires_grad_(False)


def test_they_are_used_but_not_trained(quantized, run, train) -> None:
    with pytest.raises(ValueError, match=r"to_q: .* cannot be trained: build with train_projections=False"):
        MixerAdapter.build(quantized, "linfusion")
    base = run(quantized)
    adapter = MixerAdapter.build(quantized, "linfusion", train_projections=False)
    with adapter.mounted():
        run(quantized).square().mean().backward()
        assert not torch.allclose(run(quantized), base, atol=1e-4)
    gradients = [parameter.grad for parameter in adapter.student.parameters()]
    assert gradients and all(gradient is not None for gradient in gradients)
    assert torch.equal(run(quantized), base)


def test_adapters_with_projections_of_their_own_bring_them(quantized, run, train, tmp_path) -> None:
    """LinFusion's weights are in its file: a quantized model takes them as plain layers, and gets its own back."""
    if any(not hasattr(quantized.get_submodule(site.name).to_q, "weight") for site in find_sites(quantized)):
        pytest.skip("the LinFusion format asks for a weight in every projection")
    published = publish(tmp_path / "published", quantized, [None, None, 5, 8])
    base = run(quantized)
    layers = {name: id(module) for name, module in quantized.named_modules()}
    adapter = MixerAdapter.from_linfusion(published, quantized)
    stored = load((published / WEIGHTS).read_bytes())
    first = find_sites(quantized)[-1].name  # `publish` lists the sites in reverse
    assert torch.equal(adapter.parameters_by_name()[f"{first}.to_q.weight"], stored["0.to_q.weight"])
    train(adapter)
    with adapter.mounted():
        mixed = run(quantized)
    assert torch.equal(run(quantized), base)
    assert {name: id(module) for name, module in quantized.named_modules()} == layers
    adapter.save_pretrained(tmp_path / "ours")
    adapter.save_linfusion(tmp_path / "theirs")
    for restored in (
        MixerAdapter.from_pretrained(tmp_path / "ours", quantized),
        MixerAdapter.from_linfusion(tmp_path / "theirs", quantized),
    ):
        with restored.mounted():
            torch.testing.assert_close(run(quantized), mixed)


@pytest.mark.parametrize("name", LIBRARIES)
def test_stand_ins_behave_as_the_libraries(name: str) -> None:
    """The same operations give plain or quantized tensors, or raise, and state dicts have as many entries."""
    module, quantize = LIBRARIES[name]
    pytest.importorskip(module, reason="the stand-in was compared where it is installed")
    theirs = quantize(nn.Linear(8, 4))
    ours = STAND_INS[name](nn.Linear(8, 4))
    x = torch.randn(2, 8)
    operations = {
        "detach": lambda w: w.detach(),
        "clone": lambda w: w.detach().clone(),
        "bfloat16": lambda w: w.to(torch.bfloat16),
        "contiguous": lambda w: w.contiguous(),
        "flatten": lambda w: w.flatten(),
        "add": lambda w: w + 1,
        "finite": lambda w: w.isfinite(),
        "bits": lambda w: w.view(torch.uint8),
        "dequantize": lambda w: w.dequantize(),
    }

    def outcome(operation, weight) -> str:
        try:
            result = operation(weight)
        except Exception as error:
            return type(error).__name__
        return "plain" if type(result) in (torch.Tensor, nn.Parameter) else "quantized"

    for what, operation in operations.items():
        assert outcome(operation, ours.weight) == outcome(operation, theirs.weight), what
    for layer in (ours, theirs):
        assert isinstance(layer, nn.Linear) and layer(x).shape == (2, 4)
        assert layer.weight.dtype == torch.float32 and layer.weight.data_ptr() == 0
    assert ours.weight.requires_grad == theirs.weight.requires_grad
    inner = [len(layer.weight.__tensor_flatten__()[0]) for layer in (ours, theirs)]
    assert min(inner) >= 2
    assert ("weight" in ours.state_dict()) == ("weight" in theirs.state_dict())


def test_a_change_inside_a_quantized_weight_changes_every_fingerprint(quantized) -> None:
    """Wrapped tensors have no storage of their own: what they hold is read."""

    def fingerprints() -> tuple[str, object, str]:
        return weights_digest(quantized), weights_version(quantized), fingerprint(quantized)

    before = fingerprints()
    assert fingerprints() == before
    layer = quantized.get_submodule(find_sites(quantized)[0].name).to_q
    weight = layer.weight if hasattr(layer, "weight") else layer.qweight
    with torch.no_grad():
        inner = next(plain_tensors(weight))
        inner[0, 0] += 1 if int(inner[0, 0]) < 0 else -1
    after = fingerprints()
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_below_min_tokens_the_quantized_layers_run(quantized, run, tmp_path) -> None:
    adapter = MixerAdapter.build(quantized, "linfusion", train_projections=False, min_tokens=1000)
    base = run(quantized)
    with adapter.mounted():
        assert torch.equal(run(quantized), base)


def test_quantized_projections_are_not_written_in_the_linfusion_format(quantized, tmp_path) -> None:
    adapter = MixerAdapter.build(quantized, "linfusion", train_projections=False)
    with pytest.raises(ValueError, match=r"to_q: .* cannot be written|to_q of the model has"):
        adapter.save_linfusion(tmp_path)
