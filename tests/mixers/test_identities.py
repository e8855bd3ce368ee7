"""Mixers that are equal on paper are equal here."""

import pytest
import torch
import torch.nn.functional as F

from mixers import create_mixer, list_mixers, registry, structure
from mixers.feature_maps import FEATURE_MAPS
from mixers.operators import linear_attention
from mixers.testing.tolerances import assert_close
from tests.mixers.builders import float64


def test_linfusion_starts_as_normalized_linear_attention() -> None:
    linfusion = create_mixer("linfusion", 12, 2).double()
    linear = create_mixer("linear_attention", 12, 2, eps=1e-4).double()
    linear.projections.load_state_dict(linfusion.projections.state_dict())
    x = float64(2, 9, 12)
    assert torch.equal(linfusion(x), linear(x))


def test_linfusion_is_its_published_formula() -> None:
    """q / (q · mean k + 1e-4) times mean kᵀv, with both MLPs away from their start."""
    mixer = create_mixer("linfusion", 12, 2, mid_dim=5).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = float64(2, 9, 12)
    own = mixer.projections

    def mapped(mlp: torch.nn.Module, projection: torch.nn.Module) -> torch.Tensor:
        first, norm, _, last = mlp.net
        shifted = x + last(F.leaky_relu(norm(first(x)), 0.01))
        return mixer.split_heads(F.elu(projection(shifted)) + 1)

    q = mapped(mixer.for_q, own.to_q)
    k = mapped(mixer.for_k, own.to_k)
    v = mixer.split_heads(own.to_v(x))
    divided = q / (torch.einsum("blhk,bhk->blh", q, k.mean(1)) + 1e-4)[..., None]
    truth = torch.einsum("blhk,bhkv->blhv", divided, torch.einsum("blhk,blhv->bhkv", k / 9, v))
    assert_close(mixer(x), own.to_out(truth.flatten(2)))


@pytest.mark.parametrize("causality", ["causal", "noncausal"])
def test_softmax_is_attention_as_torch_computes_it(causality: str) -> None:
    mixer = create_mixer("softmax", 12, 2, causality=causality).double()
    x = float64(2, 9, 12)
    own = mixer.projections
    q, k, v = (mixer.split_heads(p(x)).transpose(1, 2) for p in (own.to_q, own.to_k, own.to_v))
    truth = F.scaled_dot_product_attention(q, k, v, is_causal=causality == "causal").transpose(1, 2).flatten(2)
    assert_close(mixer(x), own.to_out(truth))


@pytest.mark.parametrize("normalize", [True, False])
def test_bidirectional_without_decay_is_noncausal(normalize: bool) -> None:
    q = float64(2, 9, 2, 4).exp()
    k = float64(2, 9, 2, 4).exp()
    v = float64(2, 9, 2, 3)
    noncausal = linear_attention(q, k, v, causality="noncausal", normalize=normalize, backend="dense")
    for backend in ("auto", "chunked", "dense"):  # dense builds the two passes
        both = linear_attention(q, k, v, causality="bidirectional", normalize=normalize, backend=backend)
        assert_close(both, noncausal, what=backend)


def test_rank_is_at_most_the_number_of_features() -> None:
    matrix = structure.mixing_matrix(create_mixer("linear_attention", 12, 2).double(), float64(1, 40, 12))
    assert (structure.numerical_rank(matrix) <= 6).all()
    assert not structure.is_causal(matrix)
    causal = create_mixer("linear_attention", 12, 2, causality="causal").double()
    assert structure.is_causal(structure.mixing_matrix(causal, float64(1, 40, 12)))


def test_unnormalized_weights_do_not_depend_on_the_number_of_tokens() -> None:
    mixer = create_mixer("linear_attention", 12, 2, normalize=False)
    x = torch.randn(1, 8, 12)
    small = structure.mixing_matrix(mixer, x)
    large = structure.mixing_matrix(mixer, x.repeat(1, 4, 1))
    assert torch.allclose(small, large[..., :8, :8])


def test_elu_plus_one_keeps_small_values_and_finite_gradients() -> None:
    phi = FEATURE_MAPS["elu_plus_one"].apply
    x = torch.tensor([-30.0, -8.0, -1.0, 0.0, 1.0, 200.0])
    assert (phi(x.bfloat16()) > 0).all()
    assert_close(phi(x[2:].double()), F.elu(x[2:].double()) + 1)
    x.requires_grad_()
    phi(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", list_mixers())
def test_mixing_matrix_takes_a_hosts_projections(name: str) -> None:
    own = create_mixer(name, 12, 2, **registry.get_mixer_entry(name).mixer.drop_in_options).double()
    mounted = create_mixer(name, 12, 2, own_projections=False).double()
    mounted.load_state_dict({n: p for n, p in own.state_dict().items() if not n.startswith("projections.")})
    x = float64(1, 5, 12)
    matrix = structure.mixing_matrix(mounted, x, projections=own.projections, grid=(1, 5))
    assert torch.equal(matrix, structure.mixing_matrix(own, x, grid=(1, 5)))
