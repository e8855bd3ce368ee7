"""What a mixer promises, as checks: `check_<promise>(mixer)` for a float64 mixer with projections of its own."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mixers import structure
from mixers.mixer import TokenMixer
from mixers.testing.tolerances import assert_close
from mixers.traits import Traits

Check = Callable[[TokenMixer], None]
LENGTHS = (1, 2, 63, 64, 65)


def tokens(mixer: TokenMixer, length: int = 19, batch: int = 2, seed: int = 0) -> Tensor:
    """Normal tokens (b, l, d) in the mixer's dtype."""
    generator = torch.Generator().manual_seed(seed)
    parameter = next(mixer.parameters())
    return torch.randn(batch, length, mixer.dim, generator=generator, dtype=torch.float64).to(parameter.dtype)


def rebuilt(mixer: TokenMixer, config: Any = None, own_projections: bool = True) -> TokenMixer:
    """A new mixer of the same class with the same parameters, its configuration replaced where one is given."""
    fresh = type(mixer)(config or mixer.config, mixer.dim, mixer.heads, own_projections=own_projections).double()
    kept = {n: p for n, p in mixer.state_dict().items() if own_projections or not n.startswith("projections.")}
    fresh.load_state_dict(kept)
    return fresh.train(mixer.training)


def without_eps(mixer: TokenMixer) -> TokenMixer:
    """The mixer with eps = 0, or itself where its configuration has none."""
    names = {f.name for f in dataclasses.fields(mixer.config)}
    return rebuilt(mixer, dataclasses.replace(mixer.config, eps=0.0)) if "eps" in names else mixer


def check_forward_equals_its_matrix(mixer: TokenMixer) -> None:
    """mixer(x) = to_out(W v) with W from the formula, forward and gradient, at awkward lengths."""
    for length in LENGTHS:
        x = tokens(mixer, length).requires_grad_()
        fast = mixer(x)
        weights = structure.mixing_matrix(mixer, x)
        host = mixer.host(None)
        dense = torch.einsum("bhij,bjhv->bihv", weights, mixer.split(host.to_v(x))).flatten(2)
        truth = host.to_out(dense)
        assert_close(fast, truth, what=f"forward at l = {length}")
        weighting = tokens(mixer, length, seed=1)
        (got,) = torch.autograd.grad((fast * weighting).sum(), x, retain_graph=True)
        (wanted,) = torch.autograd.grad((truth * weighting).sum(), x)
        assert_close(got, wanted, what=f"gradient at l = {length}")


def check_rows_sum_to_one(mixer: TokenMixer) -> None:
    """Normalised: rows sum to one, less what eps takes (here at most 1e-2); exactly one where eps is 0."""
    x = tokens(mixer)
    sums = structure.row_sums(structure.mixing_matrix(mixer, x))
    assert ((sums - 1).abs() < 1e-2).all(), f"rows sum to {sums.min():.4f} … {sums.max():.4f}, expected 1"
    exact = structure.row_sums(structure.mixing_matrix(without_eps(mixer), x))
    assert_close(exact, torch.ones_like(exact), what="row sums without eps")


def check_constant_values_are_kept(mixer: TokenMixer) -> None:
    """Normalised: values that are the same for every token come out as they went in, exactly where eps is 0."""
    x, host = tokens(mixer), mixer.host(None)
    values = tokens(mixer, 1, batch=1).expand_as(x)
    constant = SimpleNamespace(to_q=host.to_q, to_k=host.to_k, to_v=lambda _: values, to_out=torch.nn.Identity())
    assert_close(without_eps(mixer)(x, projections=constant), values, what="output for constant values")


def check_projections_are_called(mixer: TokenMixer) -> None:
    """Handed a host's projections, each part of each is called once; nothing of them is kept."""
    x, host = tokens(mixer), mixer.host(None)
    calls: Counter[str] = Counter()

    def counted(name: str, module: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        def call(t: Tensor) -> Tensor:
            calls[name] += 1
            return module(t)

        return call

    parts = {name: counted(name, getattr(host, name)) for name in ("to_q", "to_k", "to_v")}
    last = [counted("to_out", host.to_out), counted("dropout", torch.nn.Identity())]
    mounted = rebuilt(mixer, own_projections=False)
    assert_close(mounted(x, projections=SimpleNamespace(**parts, to_out=last)), mixer(x), what="with a host's")
    wanted = dict.fromkeys(("to_q", "to_k", "to_v", "to_out", "dropout"), 1)
    assert calls == wanted, f"calls of the projections: {dict(calls)}, expected one each"
    assert not any(name.startswith("projections.") for name in mounted.state_dict()), "has projections of its own"


def check_weights_are_positive(mixer: TokenMixer) -> None:
    """No weight is negative."""
    smallest = structure.mixing_matrix(mixer, tokens(mixer)).min()
    assert smallest >= 0, f"a weight is {smallest:.3g}"


def check_never_looks_ahead(mixer: TokenMixer) -> None:
    """Causal: changing later tokens changes no earlier output; the smallest failing place is named."""
    x = tokens(mixer)
    y = mixer(x)
    for place in range(1, x.shape[1]):
        changed = x.clone()
        changed[:, place:] += 1
        try:
            assert_close(mixer(changed)[:, :place], y[:, :place])
        except AssertionError as error:
            raise AssertionError(
                f"claims to be causal, but tokens from {place} on change earlier outputs: {error}"
            ) from None


def check_sees_every_token(mixer: TokenMixer) -> None:
    """Not causal: the first output depends on the last token."""
    x = tokens(mixer)
    changed = x.clone()
    changed[:, -1] += 1
    apart = (mixer(changed)[:, 0] - mixer(x)[:, 0]).abs().max()
    assert apart > 1e-9, "claims not to be causal, but the first output does not depend on the last token"


def check_permutation_equivariance(mixer: TokenMixer) -> None:
    """Order-free: permuting the tokens permutes the output."""
    x = tokens(mixer)
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(2))
    assert_close(mixer(x[:, order]), mixer(x)[:, order], what="output of permuted tokens")


def check_repeating_every_token_changes_nothing(mixer: TokenMixer) -> None:
    """Normalised and order-free: twice the tokens, the same output; why it carries over to other resolutions."""
    x = tokens(mixer)
    twice = mixer(x.repeat_interleave(2, dim=1))
    assert_close(twice[:, ::2], mixer(x), what="output with every token repeated")


def check_linear_in_values(mixer: TokenMixer) -> None:
    """Scaling to_v scales the mixed values: the weights do not depend on v."""
    x, doubled = tokens(mixer), copy.deepcopy(mixer)
    with torch.no_grad():
        doubled.host(None).to_v.weight.mul_(2)
    bias = mixer.host(None).to_out.bias
    assert_close(doubled(x) - bias, 2 * (mixer(x) - bias), what="output for doubled values")


def check_batch_items_are_independent(mixer: TokenMixer) -> None:
    """An item's output does not depend on its neighbours in the batch."""
    x = tokens(mixer, batch=3)
    assert_close(mixer(x)[1:2], mixer(x[1:2]), what="item alone against item in a batch")


def check_half_precision(mixer: TokenMixer) -> None:
    """float16 and bfloat16 stay near float64, and finite for large inputs."""
    x = tokens(mixer)
    truth = mixer(x)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(mixer).to(dtype)
        assert_close(half(x.to(dtype)), truth, dtype, what=f"output in {dtype}")
        assert half(30 * x.to(dtype)).isfinite().all(), f"not finite in {dtype} for inputs 30 times as large"


def check_gradients(mixer: TokenMixer) -> None:
    """Every parameter gets a finite gradient, and gradcheck agrees with finite differences."""
    mixer = copy.deepcopy(mixer)
    x = tokens(mixer, length=3, batch=1).requires_grad_()
    mixer(x).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    assert torch.autograd.gradcheck(mixer, (x.detach().requires_grad_(),))


def check_deterministic_copies(mixer: TokenMixer) -> None:
    """The same input gives the same output, also from a deep copy and from a saved state."""
    x = tokens(mixer)
    y = mixer(x)
    assert torch.equal(mixer(x), y) and torch.equal(copy.deepcopy(mixer)(x), y)
    assert torch.equal(rebuilt(mixer)(x), y)


def check_costs_are_told(mixer: TokenMixer) -> None:
    """flops and state_size are positive, and grow as the mixer's traits say."""
    near, far = mixer.mixing_flops(1024), mixer.mixing_flops(4096)
    assert near > 0 and mixer.state_size(1024) > 0
    growth = far / near
    assert (growth <= 4.01) == mixer.traits.linear, f"4 times the tokens cost {growth:.2f} times as much"


def check_meta_construction(mixer: TokenMixer) -> None:
    """The mixer can be built on the meta device, for structure without memory."""
    with torch.device("meta"):
        ghost = type(mixer)(mixer.config, mixer.dim, mixer.heads)
    assert {p.device.type for p in ghost.parameters()} == {"meta"}


# (check, when it applies)
CHECKS: tuple[tuple[Check, Callable[[Traits], bool]], ...] = (
    (check_forward_equals_its_matrix, lambda t: True),
    (check_rows_sum_to_one, lambda t: t.normalized),
    (check_constant_values_are_kept, lambda t: t.normalized),
    (check_projections_are_called, lambda t: True),
    (check_weights_are_positive, lambda t: t.positive),
    (check_never_looks_ahead, lambda t: t.causality == "causal"),
    (check_sees_every_token, lambda t: t.causality != "causal"),
    (check_permutation_equivariance, lambda t: t.order_free),
    (check_repeating_every_token_changes_nothing, lambda t: t.order_free and t.normalized),
    (check_linear_in_values, lambda t: True),
    (check_batch_items_are_independent, lambda t: True),
    (check_half_precision, lambda t: True),
    (check_gradients, lambda t: True),
    (check_deterministic_copies, lambda t: True),
    (check_costs_are_told, lambda t: True),
    (check_meta_construction, lambda t: True),
)


def checks_for(traits: Traits) -> list[Check]:
    """The checks that a mixer with these traits must pass: more promises, more checks."""
    return [check for check, applies in CHECKS if applies(traits)]
