"""The list of all checks, and when each applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mixers.mixer import TokenMixer
from mixers.testing.checks import cost, independence, matrix, module, numerics, order
from mixers.testing.inputs import CheckInputs, has_option

CheckFunction = Callable[[TokenMixer, CheckInputs], None]


def _always(mixer: TokenMixer) -> bool:
    return True


@dataclass(frozen=True)
class MixerCheck:
    """A check and when it applies.

    Attributes:
        run: raises AssertionError if the promise is broken.
        applies: whether a mixer makes the promise.
        heavy: it takes seconds, so it runs on a mixer's published configuration only, unless all are asked for.
    """

    run: CheckFunction
    applies: Callable[[TokenMixer], bool] = _always
    heavy: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.run.__name__

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (self.run.__doc__ or "").strip().splitlines()[0]

    def __call__(self, mixer: TokenMixer, inputs: CheckInputs | None = None) -> None:
        """Run it on fixed inputs, or on these."""
        self.run(mixer, inputs or CheckInputs())


MIXER_CHECKS: tuple[MixerCheck, ...] = (
    MixerCheck(matrix.check_forward_equals_its_matrix, lambda m: m.traits.linear_in_values),
    MixerCheck(matrix.check_matrix_by_probing, lambda m: m.traits.linear_in_values),
    MixerCheck(matrix.check_matrix_by_differentiating, lambda m: not m.traits.linear_in_values),
    MixerCheck(matrix.check_formulations_agree, lambda m: has_option(m, "backend")),
    MixerCheck(matrix.check_every_head_has_its_temperature, matrix.supports_temperature),
    MixerCheck(matrix.check_mean_scale_is_a_factor, matrix.supports_mean_scale),
    MixerCheck(matrix.check_rows_sum_to_one, lambda m: m.traits.normalized),
    MixerCheck(matrix.check_constant_values_are_kept, lambda m: m.traits.normalized),
    MixerCheck(matrix.check_matrix_is_nonnegative, lambda m: m.traits.positive),
    MixerCheck(matrix.check_linear_in_values, lambda m: m.traits.linear_in_values),
    MixerCheck(matrix.check_state_size_is_enough, matrix.has_state),
    MixerCheck(matrix.check_a_token_sees_itself, matrix.has_fixed_entries),
    MixerCheck(matrix.check_part_of_the_matrix_is_the_matrix_of_the_part, matrix.has_fixed_entries),
    MixerCheck(matrix.check_bidirectional_is_two_causal_passes, matrix.is_two_causal_passes),
    MixerCheck(order.check_never_looks_ahead, lambda m: m.traits.causality == "causal" and not m.traits.needs_grid),
    MixerCheck(order.check_sees_every_token, lambda m: m.traits.causality != "causal"),
    MixerCheck(order.check_permutation_equivariance, lambda m: m.traits.permutation_equivariant),
    MixerCheck(order.check_repeating_every_token_changes_nothing, lambda m: m.traits.repetition_invariant),
    MixerCheck(independence.check_batch_items_are_independent),
    MixerCheck(independence.check_empty_batch),
    MixerCheck(independence.check_heads_are_independent_in_values, lambda m: m.heads > 1),
    MixerCheck(independence.check_heads_are_independent_in_queries, lambda m: m.heads > 1),
    MixerCheck(independence.check_heads_are_independent_in_keys, lambda m: m.heads > 1),
    MixerCheck(numerics.check_half_precision, lambda m: m.traits.continuous),
    MixerCheck(numerics.check_extreme_inputs),
    MixerCheck(numerics.check_gradients),
    MixerCheck(numerics.check_gradients_per_sample),
    MixerCheck(cost.check_flops),
    MixerCheck(cost.check_costs_grow_as_promised),
    MixerCheck(cost.check_compiles_once, heavy=True),
    MixerCheck(cost.check_long_sequences, lambda m: has_option(m, "backend"), heavy=True),
    MixerCheck(cost.check_a_million_tokens, lambda m: m.traits.linear, heavy=True),
    MixerCheck(module.check_projections_are_called, module.fits_a_host),
    MixerCheck(module.check_mix_gives_a_new_tensor),
    MixerCheck(module.check_repeatable),
    # pickle does not find a class that is defined in a function
    MixerCheck(module.check_pickled_copies, lambda m: "<locals>" not in type(m).__qualname__),
    MixerCheck(module.check_saved_and_loaded),
    MixerCheck(module.check_meta_construction),
)


def checks_for(mixer: TokenMixer) -> list[MixerCheck]:
    """Return the checks that a mixer must pass: more promises, more checks."""
    return [check for check in MIXER_CHECKS if check.applies(mixer)]
