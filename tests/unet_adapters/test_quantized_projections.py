"""Projections whose weights are quantized: whatever the library, they are used but not trained."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from tests.unet_adapters.linfusion_files import publish
from unet_adapters import MixerAdapter, find_sites
from unet_adapters.linfusion import WEIGHTS


class QuantizedTensor(Tensor):
    """As of torchao and quanto: a subclass that says it is floating point."""


class IntegerLinear(nn.Module):
    """As of bitsandbytes: weights stored as integers, with a scale beside them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class PackedLinear(IntegerLinear):
    """As of GPTQ and AWQ: the weight is a buffer of another name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("qweight", self.weight.data)
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def subclass_weight(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(QuantizedTensor), requires_grad=False)
    return linear


KINDS = {"tensor subclass": subclass_weight, "integers": IntegerLinear, "packed": PackedLinear}
PROJECTIONS = ("to_q", "to_k", "to_v")


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def quantized(request, unet):
    unet.requires_grad_(False)
    for site in find_sites(unet):
        layer = unet.get_submodule(site.name)
        for name in PROJECTIONS:
            setattr(layer, name, request.param(getattr(layer, name)))
        layer.to_out[0] = request.param(layer.to_out[0])
    return unet


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


def test_below_min_tokens_the_quantized_layers_run(quantized, run, tmp_path) -> None:
    adapter = MixerAdapter.build(quantized, "linfusion", train_projections=False, min_tokens=1000)
    base = run(quantized)
    with adapter.mounted():
        assert torch.equal(run(quantized), base)


def test_quantized_projections_are_not_written_in_the_linfusion_format(quantized, tmp_path) -> None:
    adapter = MixerAdapter.build(quantized, "linfusion", train_projections=False)
    with pytest.raises(ValueError, match=r"to_q: .* cannot be written|to_q of the model has"):
        adapter.save_linfusion(tmp_path)
