"""Every registered mixer keeps its promises, and the suite catches one that does not."""

import itertools
import re
from collections.abc import Iterable, Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixers import TokenMixer, list_mixers, registry
from mixers.stages.normalizers import NORMALIZER_NAMES
from mixers.stages.scan_orders import SCANS
from mixers.testing import (
    MIXER_CHECKS,
    CheckInputs,
    ConformanceCase,
    MixerCheck,
    check_mixer,
    checks_for,
    conformance_cases,
    parametrize_with_checks,
    run_checks,
    strategies,
)
from mixers.traits import Traits
from mixers.zoo.linear_attention import LinearAttention

DEEP = settings().max_examples >= 1000


COMPILED = {
    "linfusion",
    "gla",
    "mamba",
    "mamba2",
    "kda",
    "hydra",
    "polaformer",
    "sparse_linear",
    "softmax_window",
    "ttt",
}
"""One mixer or more of every operator; compiling takes about ten seconds, so `make test-deep` has the others."""


def covering_cases(names: Iterable[str]) -> list[ConformanceCase]:
    """Every causality × normalization of every mixer in one of its forms, which alternate, and every default.

    So all pairs of a causality, a normalization and a form occur for each mixer, with half of the configurations.
    """
    cases = []
    for case in conformance_cases(names):
        entry = registry.get_mixer_entry(case.name)
        is_alone = len(entry.causalities) == 1 or not entry.mixer.drop_in_options
        turn = entry.causalities.index(case.causality) + case.normalize + entry.default_normalize
        if is_alone or case.is_default or case.form == ("published", "drop-in")[turn % 2]:
            cases.append(case)
    return cases


FEW_LENGTHS = CheckInputs((1, 3, 65))
"""One token, few, and one more than a block: what other configurations than the defaults are checked with."""


def conformance_parameters(cases: Sequence[ConformanceCase]) -> pytest.MarkDecorator:
    """The checks of these cases; unless deep, compilation, which takes seconds, of a mixer of every operator."""
    defaults = tuple(f"{case}-" for case in cases if case.is_default)
    parameters = []
    for parameter in parametrize_with_checks(cases, deep=DEEP).args[1]:
        mixer, check = parameter.values
        if DEEP or check.name != "check_compiles_once" or parameter.id.split("-")[0] in COMPILED:
            inputs = CheckInputs() if DEEP or parameter.id.startswith(defaults) else FEW_LENGTHS
            parameters.append(pytest.param(mixer, check, inputs, id=parameter.id, marks=parameter.marks))
    return pytest.mark.parametrize(("mixer", "check", "inputs"), parameters)


@conformance_parameters(conformance_cases(list_mixers()) if DEEP else covering_cases(list_mixers()))
def test_conformance(mixer: TokenMixer, check: MixerCheck, inputs: CheckInputs) -> None:
    check(mixer, inputs)


def test_the_covering_cases_have_every_pair_of_switches() -> None:
    for name in list_mixers():
        for switches in itertools.combinations(("causality", "normalize", "form"), 2):
            pairs = {tuple(getattr(case, s) for s in switches) for case in covering_cases([name])}
            assert pairs == {tuple(getattr(case, s) for s in switches) for case in conformance_cases([name])}, name
        assert any(case.is_default for case in covering_cases([name])), name


SCANNED = [
    ConformanceCase(name, causality, normalize=name == "linear_attention", form=form, options={"scan": scan})
    for scan in SCANS
    if scan != "raster"
    for name, causality, form in (
        ("linear_attention", "causal", "published"),
        ("gla", "bidirectional", "drop-in"),
        ("mamba", "causal", "published"),
    )
]


@parametrize_with_checks(SCANNED, deep=DEEP)
def test_conformance_of_scans(mixer: TokenMixer, check: MixerCheck) -> None:
    check(mixer)


SCALED = [
    ConformanceCase(name, "noncausal", normalize=False, form="drop-in", options={"scale": "mean"})
    for name in ("linear_attention", "gla", "mamba", "rwkv6", "inline")
]


@conformance_parameters(SCALED)
def test_conformance_of_mean_scale(mixer: TokenMixer, check: MixerCheck, inputs: CheckInputs) -> None:
    check(mixer, inputs)


def normalizer_cases() -> list[ConformanceCase]:
    """Every normalizer other than a mixer's own: one mixer of each operator, every causality; all mixers if deep."""
    cases = []
    names = list_mixers() if DEEP else ["linear_attention", "linfusion", "gla", "kda", "mamba", "hydra", "inline"]
    for name, normalizer in itertools.product(names, NORMALIZER_NAMES):
        entry = registry.get_mixer_entry(name)
        if normalizer == entry.config.default_normalizer or entry.mixer.refuses_normalizer(normalizer) is not None:
            continue
        all_causalities = name in ("linear_attention", "gla", "kda")
        for causality in entry.causalities if all_causalities else (entry.default_causality,):
            # Signed rows are not bounded by their sums: float16 needs a norm behind them, as SANA-Video 2.0 has.
            options = {"normalizer": normalizer, "norm": True}
            cases.append(ConformanceCase(name, causality, True, "drop-in", options))
    return cases


@conformance_parameters(normalizer_cases())
def test_conformance_of_normalizers(mixer: TokenMixer, check: MixerCheck, inputs: CheckInputs) -> None:
    check(mixer, inputs)


def test_the_suite_covers_every_mixer_and_configuration() -> None:
    assert len(list_mixers()) >= 3
    assert {c.name for c in conformance_cases(list_mixers())} == set(list_mixers())
    assert len(conformance_cases(["softmax", "linear_attention", "linfusion"])) == 2 + 6 + 6
    assert len(check_mixer("linfusion")) >= 12


@cache
def built(configuration: ConformanceCase) -> TokenMixer:
    return configuration()


@pytest.mark.parametrize("check", [check for check in MIXER_CHECKS if not check.heavy], ids=lambda c: c.name)
@given(data=st.data(), inputs=strategies.inputs())
def test_every_check_holds_for_any_mixer_and_input(check: MixerCheck, data: st.DataObject, inputs: CheckInputs) -> None:
    candidates = [c for c in conformance_cases(list_mixers()) if check.applies(built(c))]
    candidates = [c for c in candidates if check.name not in built(c).exceptions]
    check(built(data.draw(st.sampled_from(candidates))), inputs)


class LooksAhead(LinearAttention):
    """Claims to be causal."""

    @property
    def traits(self) -> Traits:
        return Traits("causal", normalized=True, positive=True, permutation_equivariant=False, linear=True)


class ForgetsToNormalize(LinearAttention):
    """Claims to be normalized."""

    @property
    def traits(self) -> Traits:
        return Traits("noncausal", normalized=True, positive=True, permutation_equivariant=True, linear=True)


class ClaimsNoOrder(LinearAttention):
    """Causal, but claims to be permutation-equivariant."""

    @property
    def traits(self) -> Traits:
        return Traits("causal", normalized=True, positive=True, permutation_equivariant=True, linear=True)


class KeepsItsOwnValues(LinearAttention):
    """Adds a copy of to_v of its own, which a host's LoRA or quantization would not reach."""

    def __init__(self, *args, **settings) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, **settings)
        self.copied = torch.nn.Linear(self.dim, self.dim, bias=False)

    def resolve_projections(self, projections):  # type: ignore[no-untyped-def]
        host = super().resolve_projections(projections)
        if projections is not None:
            host.to_v = self.copied
        return host


LIARS = [
    (
        LooksAhead,
        "noncausal",
        True,
        "never_looks_ahead.*with 2 tokens a change of tokens from 1 on(.|\n)*mixing matrix",
    ),
    (ForgetsToNormalize, "noncausal", False, "rows_sum_to_one"),
    (ClaimsNoOrder, "causal", True, "permutation_equivariance"),
    (KeepsItsOwnValues, "noncausal", False, "projections_are_called"),
]


def failures(mixer: TokenMixer, exceptions: dict[str, str] | None = None) -> str:
    quick = [check for check in checks_for(mixer) if not check.heavy]
    outcomes = run_checks(mixer.double(), exceptions, quick)
    return "\n".join(f"{o.check}: {o.message}" for o in outcomes if o.status == "failed")


@pytest.mark.parametrize(("liar", "causality", "normalize", "check"), LIARS)
def test_a_broken_promise_is_caught(liar: type[LinearAttention], causality: str, normalize: bool, check: str) -> None:
    mixer = liar(liar.Config(causality=causality, normalize=normalize), 12, 2)
    assert re.search(check, failures(mixer)), failures(mixer)


def test_exceptions_are_data_and_strict() -> None:
    liar = LooksAhead(LooksAhead.Config(causality="noncausal"), 12, 2)
    expected_failures = {"check_never_looks_ahead": "it sees every token"}
    assert not failures(liar, expected_failures)
    honest = LinearAttention(LinearAttention.Config(causality="causal"), 12, 2)
    assert "remove it from the exceptions" in failures(honest, expected_failures)
    with pytest.raises(ValueError, match="names no check"):
        check_mixer("linear_attention", exceptions={"check_nothing": "?"})
    with pytest.raises(ValueError, match="No mixer to check"):
        parametrize_with_checks([])
    with pytest.raises(AssertionError, match="LooksAhead fails check_never_looks_ahead"):
        check_mixer(lambda: liar)
