"""What a mixer promises, as checks: `check_<promise>(mixer)` for a float64 mixer with projections of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mixers.mixer import TokenMixer
from mixers.testing.checks import module, numerics, order, weights
from mixers.testing.inputs import Inputs

Run = Callable[[TokenMixer, Inputs], None]


@dataclass(frozen=True)
class Check:
    """A check and when it applies.

    Attributes:
        run: raises AssertionError where the promise is broken.
        applies: whether the mixer makes the promise.
        heavy: it takes seconds, so the short profile runs it on a mixer's published configuration alone.
    """

    run: Run
    applies: Callable[[TokenMixer], bool] = lambda mixer: True
    heavy: bool = False

    @property
    def name(self) -> str:
        """Of the function."""
        return self.run.__name__

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (self.run.__doc__ or "").strip().splitlines()[0]

    def __call__(self, mixer: TokenMixer, inputs: Inputs | None = None) -> None:
        """Run it on fixed inputs, or on these."""
        self.run(mixer, inputs or Inputs())


CHECKS: tuple[Check, ...] = (
    Check(weights.check_forward_equals_its_matrix),
    Check(weights.check_matrix_by_probing),
    Check(weights.check_formulations_agree, weights.has_formulations),
    Check(weights.check_rows_sum_to_one, lambda m: m.traits.normalized),
    Check(weights.check_constant_values_are_kept, lambda m: m.traits.normalized),
    Check(weights.check_weights_are_positive, lambda m: m.traits.positive),
    Check(weights.check_linear_in_values),
    Check(
        weights.check_state_size_is_enough,
        lambda m: m.traits.causality == "causal" and m.traits.linear and not m.traits.needs_grid,
    ),
    Check(order.check_never_looks_ahead, lambda m: m.traits.causality == "causal" and not m.traits.needs_grid),
    Check(order.check_sees_every_token, lambda m: m.traits.causality != "causal"),
    Check(order.check_permutation_equivariance, lambda m: m.traits.permutation_equivariant),
    Check(order.check_repeating_every_token_changes_nothing, lambda m: m.traits.repetition_invariant),
    Check(
        order.check_weights_do_not_depend_on_the_number_of_tokens,
        lambda m: (
            m.traits.permutation_equivariant
            and not m.config.normalize
            and getattr(m.config, "scale", "constant") == "constant"
        ),
    ),
    Check(order.check_batch_items_are_independent),
    Check(weights.check_heads_are_independent, lambda m: m.heads > 1),
    Check(numerics.check_half_precision),
    Check(numerics.check_extreme_inputs),
    Check(numerics.check_gradients),
    Check(numerics.check_flops),
    Check(numerics.check_costs_grow_as_told),
    Check(numerics.check_compiles_once, heavy=True),
    Check(numerics.check_a_million_tokens, lambda m: m.traits.linear, heavy=True),
    Check(module.check_projections_are_called, module.fits_a_host),
    Check(module.check_mix_gives_a_new_tensor),
    Check(module.check_deterministic_copies),
    Check(module.check_saved_and_loaded),
    Check(module.check_meta_construction),
)


def checks_for(mixer: TokenMixer) -> list[Check]:
    """The checks that a mixer must pass: more promises, more checks."""
    return [check for check in CHECKS if check.applies(mixer)]
