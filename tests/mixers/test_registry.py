"""Finding and building mixers by name: typos, refusals, listing, and mixers from other packages."""

import dataclasses
import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from mixers import (
    TokenMixer,
    catalog,
    create_mixer,
    entries,
    list_mixers,
    mixer_from_state_dict,
    plugins,
    register_mixer,
    registry,
)
from mixers.option_types import option_types
from mixers.registry import get_mixer_entry
from mixers.testing import check_mixer
from mixers.zoo.linear_attention import LinearAttention, LinearAttentionConfig


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linfusoin", {}, "Did you mean 'linfusion'"),
        ("linfusion", {"mid_dimm": 3}, "Did you mean 'mid_dim'"),
        ("linfusion", {"mid_dim": 0}, "must be positive"),
        ("softmax", {"normalize": False}, "unbounded"),
        ("softmax", {"causality": "bidirectional"}, "does not support causality"),
        ("linear_attention", {"causality": "acausal"}, "does not support causality"),
        ("linear_attention", {"feature_map": "identity"}, "signed.*elu_plus_one.*normalize=False"),
        ("linear_attention", {"feature_map": "elu"}, "Did you mean"),
        ("linear_attention", {"eps": -1.0}, "eps > 0"),
        ("linear_attention", {"reference_length": 0}, "reference_length > 0"),
        ("linear_attention", {"conv_2d": True}, "conv_2d=True needs a convolution: pass conv_size"),
    ],
)
def test_what_has_no_meaning_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, 2, **options)


WRONG: dict[type, tuple[object, ...]] = {
    bool: ("false", 0, 1.0, [], {}),
    int: ("3", 1.5, True, float("nan"), [3], {}),
    float: ("0.5", True, float("nan"), float("inf"), 10**400, [0.5], {}),
    str: (3, True, ["raster"], {}),
}


@pytest.mark.parametrize("name", list_mixers())
def test_options_of_another_type_are_refused(name: str) -> None:
    """Also those of a file or a command line, where "false" would be true."""
    config = registry.get_mixer_entry(name).config
    types = option_types(config)
    assert types.keys() == {field.name for field in dataclasses.fields(config)}
    for option, kinds in types.items():
        (kind,) = set(kinds) - {type(None)}
        for value in WRONG[kind] if type(None) in kinds else (*WRONG[kind], None):
            options = {option: value}
            with pytest.raises(ValueError, match=f"^Expected {option} to be "):
                config(**options)


def test_heads_must_divide_and_tokens_must_fit() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        create_mixer("linear_attention", 12, 5)
    mixer = create_mixer("linear_attention", 12, 2, own_projections=False)
    with pytest.raises(ValueError, match="own_projections=False"):
        mixer(torch.randn(1, 3, 12))
    with pytest.raises(ValueError, match="Expected tokens"):
        create_mixer("linear_attention", 12, 2)(torch.randn(1, 3, 8))
    with pytest.raises(ValueError, match="positions, but"):
        create_mixer("linear_attention", 12, 2)(torch.randn(1, 6, 12), grid=(2, 2))


def test_listing_by_pattern_and_trait() -> None:
    assert list_mixers("lin*") == ["linear_attention", "linfusion", "linfusion_low_rank"]
    assert list_mixers(linear=False) == ["softmax", "sparse_linear"]
    assert list_mixers("none*") == []
    with pytest.raises(ValueError, match="Did you mean 'normalized'"):
        list_mixers(normalize=True)


@pytest.mark.parametrize("name", list_mixers())
def test_an_entry_tells_what_it_can_be_asked_for(name: str) -> None:
    entry = registry.get_mixer_entry(name)
    assert entry.default_causality in entry.causalities
    assert entry.default_normalize in entry.normalizations
    assert entry.summary


@pytest.mark.parametrize("name", list_mixers())
def test_the_configuration_is_frozen_and_rebuilds_the_mixer_from_json(name: str) -> None:
    mixer = create_mixer(name, 12, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mixer.config.normalize = False
    again = create_mixer(name, 12, 2, **json.loads(json.dumps(mixer.config.to_dict())))
    assert again.config == mixer.config


def test_one_class_adds_a_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "ENTRIES", {})

    @register_mixer("mine", causalities=("noncausal",))
    class Mine(LinearAttention):
        """Mine: relu features."""

        Config = dataclasses.make_dataclass(
            "MineConfig", [("feature_map", str, "elu_plus_one")], bases=(LinearAttentionConfig,), frozen=True
        )

    assert list_mixers() == ["mine"]
    assert isinstance(create_mixer("mine", 12, 2), TokenMixer)
    assert "check_permutation_equivariance" in check_mixer("mine")
    with pytest.raises(ValueError, match="already has that name"):

        @register_mixer("mine")
        class Other(LinearAttention):
            """Takes the same name."""


def test_entry_points_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []

    def installed(group: str) -> list[EntryPoint]:
        groups.append(group)
        return [EntryPoint("plugin", "mixers.zoo.softmax", "mixers")]

    monkeypatch.setattr(plugins, "entry_points", installed)
    registry._discover.__wrapped__()
    assert groups == ["mixers"]


def test_the_tables_of_the_page_of_mixers_are_current() -> None:
    page = (Path(__file__).parents[2] / "docs" / "mixers.md").read_text(encoding="utf-8")
    assert all(f"<!-- table: {name} -->" in page for name in catalog.TABLES)
    assert catalog.render(page) == page, "run python -m mixers.catalog docs/mixers.md"
    with pytest.raises(ValueError, match="Unknown table"):
        catalog.render("<!-- table: nothing --> <!-- end -->")


def test_a_state_dict_keeps_the_dtype_of_every_tensor() -> None:
    """Checkpoints in half precision keep the parameters of the decay in float32."""
    dim = 8
    inner = 16
    n = 4
    rank = 3
    state = {
        "in_proj.weight": torch.randn(2 * inner, dim).bfloat16(),
        "conv1d.weight": torch.randn(inner, 1, 4).bfloat16(),
        "x_proj.weight": torch.randn(rank + 2 * n, inner).bfloat16(),
        "dt_proj.weight": torch.randn(inner, rank).bfloat16(),
        "dt_proj.bias": torch.randn(inner),
        "A_log": torch.randn(inner, n),
        "D": torch.randn(inner),
        "out_proj.weight": torch.randn(dim, inner).bfloat16(),
    }
    mixer = mixer_from_state_dict("mamba", state)
    dtypes = {name: parameter.dtype for name, parameter in mixer.named_parameters()}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide == {"A_log", "output.D", "step.up.bias"}
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in mixer.parameters())
    assert mixer(torch.randn(1, 5, dim).bfloat16()).dtype == torch.bfloat16
    mixer.A_log.data.zero_()
    assert state["A_log"].any(), "the mixer shares memory with the state dict"


@pytest.mark.parametrize("name", list_mixers())
def test_widths_are_whole_channels_per_head(name: str) -> None:
    entry = get_mixer_entry(name)
    options = {"expand": 1.5} | ({"conv_branch": False} if name == "ttt" else {})
    mixer = create_mixer(name, 40, 8, **(entry.mixer.tiny_options | options))
    assert mixer.value_width % mixer.mixed_heads == 0
    grid = (2, 3) if mixer.traits.needs_grid else None
    assert mixer(torch.randn(1, 6, 40), grid=grid).shape == (1, 6, 40)


@pytest.mark.parametrize("name", [name for name in list_mixers() if "causal" in get_mixer_entry(name).causalities])
def test_the_state_includes_the_window_of_a_causal_convolution(name: str) -> None:
    without, with_window = (
        create_mixer(
            name, 16, 2, causality="causal", **(get_mixer_entry(name).mixer.tiny_options | {"conv_size": size})
        )
        for size in (0, 4)
    )
    assert with_window.state_size(9) - without.state_size(9) == 3 * with_window.convolved_width
