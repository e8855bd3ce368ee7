"""The loop: resuming is exact, the state is never half written, a broken loss stops it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from experiments.config import FitConfig
from experiments.training import fit
from experiments.training.optimizers import Muon, create_optimizer, orthogonalize
from experiments.training.schedule import learning_rate_factor

CONFIG = FitConfig(steps=9, batch_size=4, learning_rate=1e-2, warmup=2, ema=0.5, checkpoint_every=3, log_every=1)


class Noisy(nn.Module):
    """A regression whose loss draws random numbers, as denoising does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 2)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.line(self.frozen(x)) + torch.randn(len(x), 2)).square().mean()}


def batch(step: int) -> torch.Tensor:
    return torch.full((4, 3), float(step))


class Killed(BaseException):
    """Stands for the end of the process."""


@settings(max_examples=12)
@given(stop=st.integers(1, 8), optimizer=st.sampled_from(["adamw", "muon"]))
def test_a_run_killed_anywhere_ends_bit_identical(
    stop: int, optimizer: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = CONFIG.model_copy(update={"optimizer": optimizer})
    undisturbed = Noisy()
    resumed = Noisy()
    whole = fit(undisturbed, batch, config, tmp_path_factory.mktemp("whole"))
    directory = tmp_path_factory.mktemp("killed")

    def kill(step: int, _: dict[str, float]) -> None:
        if step == stop:
            raise Killed

    with pytest.raises(Killed):
        fit(Noisy(), batch, config, directory, kill)
    again = fit(resumed, batch, config, directory)
    assert again == whole
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_muon_is_torchs_own_on_matrices_and_adamw_elsewhere() -> None:
    """Two optimizers of torch, each with its parameters, do the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(20, 16), nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16), nn.Linear(16, 2)
    )
    theirs = copy.deepcopy(model)
    config = CONFIG.model_copy(update={"optimizer": "muon", "weight_decay": 0.1})
    ours = create_optimizer(model, config)
    options = {"lr": config.learning_rate, "weight_decay": 0.1}
    matrices = [theirs[1].weight, theirs[3].weight]
    others = [p for p in theirs.parameters() if all(p is not matrix for matrix in matrices)]
    parts = (
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(others, **options),
    )
    for step in range(3):
        for network, optimizers in ((model, (ours,)), (theirs, parts)):
            network(torch.arange(20)).square().sum().backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate / (step + 1)
                optimizer.step()
                optimizer.zero_grad()
    for ours_value, theirs_value in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_value, theirs_value, rtol=1e-2, atol=1e-4)  # iterations are in bfloat16


@settings(max_examples=20)
@given(shape=st.tuples(st.integers(16, 40), st.integers(16, 40)), scale=st.sampled_from([1e-6, 1.0, 1e4]))
def test_orthogonalized_matrices_keep_their_directions(shape: tuple[int, int], scale: float) -> None:
    """Singular vectors stay and singular values come close to 1, whatever the scale."""
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.5, 1.5, len(v))
    result = u.T @ orthogonalize(scale * u * values @ v) @ v.T
    assert ((result.diag() - 1).abs() < 0.4).all()
    assert (result - result.diag().diag()).abs().max() < 0.05


def test_muon_treats_a_convolution_as_a_matrix() -> None:
    """In any memory format."""
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 20, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    linear = nn.Linear(144, 20)
    with torch.no_grad():
        linear.weight.copy_(plain.weight.flatten(1))
    gradient = torch.randn(20, 16, 3, 3)
    for layer in (plain, last, linear):
        layer.weight.grad = gradient.reshape(layer.weight.shape)
        Muon([layer.weight], lr=0.1, weight_decay=0.1).step()
        torch.testing.assert_close(
            layer.weight.flatten(1), linear.weight if layer is linear else plain.weight.flatten(1)
        )
    torch.testing.assert_close(linear.weight, plain.weight.flatten(1))


def test_frozen_parameters_do_not_change(tmp_path: Path) -> None:
    model = Noisy()
    before = model.frozen.weight.clone()
    fit(model, batch, CONFIG, tmp_path)
    assert torch.equal(model.frozen.weight, before)
    assert not torch.equal(model.line.weight, Noisy().line.weight)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    def broken(step: int) -> torch.Tensor:
        return batch(step) * (float("nan") if step == 5 else 1)

    with pytest.raises(FloatingPointError, match="step 5"):
        fit(Noisy(), broken, CONFIG, tmp_path)
    assert [json.loads(r)["step"] for r in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]
    resumed = Noisy()
    whole = Noisy()
    log = fit(resumed, batch, CONFIG, tmp_path)  # goes on from step 5, which was good
    assert log == fit(whole, batch, CONFIG, tmp_path / "whole")
    assert torch.equal(resumed.line.weight, whole.line.weight)


def test_a_log_that_cannot_be_written_does_not_end_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = Path.open

    def full(path: Path, mode: str = "r", **kwargs: Any) -> Any:
        if path.name == "metrics.jsonl" and mode == "a" and len(opened(path).read().splitlines()) == 3:
            with opened(path, mode) as file:
                file.write('{"step": 4, "lo')
            monkeypatch.setattr(Path, "open", opened)
            raise OSError(28, "No space left on device")
        return opened(path, mode, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    log = fit(Noisy(), batch, CONFIG, tmp_path)
    assert "Cannot write step 4" in caplog.text and log[-1]["step"] == CONFIG.steps
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if line.endswith("}")] == [
        record["step"] for record in log if record["step"] != 4
    ]


def test_a_foreign_checkpoint_is_one_clear_sentence(tmp_path: Path) -> None:
    fit(Noisy(), batch, CONFIG, tmp_path)
    with pytest.raises(ValueError, match="another model"):
        fit(nn.Sequential(nn.Linear(2, 2)), batch, CONFIG, tmp_path)


@given(
    steps=st.integers(1, 500),
    warmup=st.integers(0, 50),
    schedule=st.sampled_from(["cosine", "constant", "inverse_sqrt"]),
)
def test_the_rate_stays_within_its_bounds(steps: int, warmup: int, schedule: str) -> None:
    config = CONFIG.model_copy(update={"steps": steps, "warmup": warmup, "schedule": schedule})
    factors = [learning_rate_factor(step, config) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    peak = factors.index(max(factors))
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_the_inverse_square_root_halves_the_rate_over_four_times_the_steps() -> None:
    """It does not depend on the end of the training, so that a longer one continues a shorter one."""
    config = CONFIG.model_copy(update={"warmup": 100, "schedule": "inverse_sqrt"})
    assert learning_rate_factor(99, config) == 1
    assert learning_rate_factor(399, config) == pytest.approx(0.5)
    longer = config.model_copy(update={"steps": 10 * config.steps})
    assert learning_rate_factor(5000, config) == learning_rate_factor(5000, longer)
