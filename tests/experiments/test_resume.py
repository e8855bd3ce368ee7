"""Checkpoints: whole or not there, the last few kept, and a run that stops in any way goes on as if it had not."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.config import FitConfig
from experiments.core.signals import Interrupted
from experiments.studies.crash_test.study import crash_test
from experiments.training import checkpoints, delete_checkpoints, fit, processes, training_seconds
from experiments.training.guard import first_nonfinite_layer
from experiments.training.processes import split_batch

CONFIG = FitConfig(steps=12, batch_size=4, learning_rate=1e-2, warmup=2, ema=0.5, checkpoint_every=3, log_every=1)


class Line(nn.Module):
    """A regression whose loss is of several terms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 2)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        error = self.line(batch["x"]) - batch["y"]
        return {"loss": error.square().mean(), "largest": error.abs().amax()}


def batch(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {"x": torch.randn(4, 3, generator=draw), "y": torch.randn(4, 2, generator=draw)}


def trained(directory: Path, config: FitConfig = CONFIG, data: object = batch) -> dict[str, Tensor]:
    model = Line()
    fit(model, data, config, directory)  # type: ignore[arg-type]
    return model.state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return trained(tmp_path_factory.mktemp("whole"))


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_after(last: int, directory: Path, config: FitConfig = CONFIG) -> None:
    def kill(step: int, _: object) -> None:
        if step == last:
            raise Killed

    with pytest.raises(Killed):
        fit(Line(), batch, config, directory, kill)


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def files(directory: Path) -> list[Path]:
    return sorted((directory / "checkpoints").glob("*.safetensors"))


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    trained(tmp_path, CONFIG.model_copy(update={"keep": 3}))
    assert [path.stem for path in files(tmp_path)] == [f"step-{n:08d}" for n in (6, 9, 12)]
    delete_checkpoints(tmp_path)
    assert not files(tmp_path)


@settings(max_examples=15)
@given(data=st.data())
def test_damage_anywhere_falls_back_to_the_one_before(
    data: st.DataObject,
    whole: dict[str, Tensor],
    tmp_path_factory: pytest.TempPathFactory,
    caplog_at_warning: list[str],
) -> None:
    directory = tmp_path_factory.mktemp("damaged")
    killed_after(11, directory)
    latest = files(directory)[-1]
    content = bytearray(latest.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    latest.write_bytes(bytes(content))
    caplog_at_warning.clear()
    assert_equal(trained(directory), whole)
    assert any("going back" in line for line in caplog_at_warning)
    assert not list((directory / "checkpoints").glob("*.partial"))


def test_what_a_killed_writer_leaves_is_cleared(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    killed_after(8, tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000009.safetensors.sha256").write_text("0")  # comes first; the checkpoint never came
    (folder / "step-00000008.safetensors.partial").write_bytes(b"half")
    assert_equal(trained(tmp_path), whole)
    assert sorted(path.suffix for path in folder.iterdir()) == [".safetensors"] * 2 + [".sha256"] * 2


def test_a_damaged_checkpoint_takes_no_place_among_those_kept(tmp_path: Path) -> None:
    killed_after(11, tmp_path, CONFIG.model_copy(update={"checkpoint_every": 2}))
    latest = files(tmp_path)[-1]
    latest.write_bytes(b"")
    trained(tmp_path, CONFIG.model_copy(update={"checkpoint_every": 4}))
    assert [path.stem[-2:] for path in files(tmp_path)] == ["08", "12"]
    assert latest.with_name(f"{latest.name}.damaged").is_file()


@pytest.fixture(scope="module")
def caplog_at_warning() -> list[str]:
    """What checkpoints log."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logging.getLogger(checkpoints.__name__).addHandler(Keep())
    return lines


def test_nothing_but_damage_is_one_clear_sentence(tmp_path: Path) -> None:
    trained(tmp_path)
    for path in files(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="all 2 checkpoints there are damaged"):
        trained(tmp_path)


def test_a_full_disk_loses_no_older_checkpoint(
    tmp_path: Path, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, caplog_at_warning: list[str]
) -> None:
    write = checkpoints.write_bytes

    def full(path: Path, content: bytes) -> None:
        if path.name in ("step-00000009.safetensors", "step-00000012.safetensors.sha256"):
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoints, "write_bytes", full)
    caplog_at_warning.clear()
    assert_equal(trained(tmp_path), whole)
    assert [path.stem for path in files(tmp_path)] == ["step-00000003", "step-00000006"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4  # no checksum of one that is not there
    assert any("No space left" in line for line in caplog_at_warning)


def test_sigterm_saves_and_stops(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    def ask(step: int, _: object) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="after step 5 of 12"):
        fit(Line(), batch, CONFIG, tmp_path, ask)
    assert files(tmp_path)[-1].stem == "step-00000005" and signal.getsignal(signal.SIGTERM) is before
    assert_equal(trained(tmp_path), whole)


def test_sigterm_in_the_last_step_stops_too(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    def ask(step: int) -> dict[str, Tensor]:
        if step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(step)

    with pytest.raises(Interrupted, match="after step 12 of 12"):
        trained(tmp_path, data=ask)
    assert_equal(trained(tmp_path), whole)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_are_the_batch(tmp_path: Path, whole: dict[str, Tensor], accumulation: int) -> None:
    got = trained(tmp_path, CONFIG.model_copy(update={"accumulation": accumulation}))
    for name, expected in whole.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_shares_make_up_the_batch(processes: int, accumulation: int, each: int) -> None:
    total = processes * accumulation * each
    given_batch = {"x": torch.arange(total), "pair": (torch.arange(total) * 2,)}
    parts = [part for p in range(processes) for part in split_batch(given_batch, p, processes, accumulation)]
    assert torch.equal(torch.cat([part["x"] for part in parts]), given_batch["x"])
    assert torch.equal(torch.cat([part["pair"][0] for part in parts]), given_batch["pair"][0])


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 3"):
        split_batch(torch.zeros(4), 0, 3, 1)


def test_seconds_add_up_over_stops(tmp_path: Path) -> None:
    assert training_seconds(tmp_path) == 0
    trained(tmp_path, CONFIG.model_copy(update={"steps": 6}))
    first = training_seconds(tmp_path)
    trained(tmp_path)
    assert training_seconds(tmp_path) > first > 0


def test_an_average_that_was_switched_is_one_clear_sentence(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match="`ema` was switched"):
        trained(tmp_path, CONFIG.model_copy(update={"ema": 0.0}))


def test_what_is_not_finite_is_named(tmp_path: Path, whole: dict[str, Tensor]) -> None:
    def broken(step: int) -> dict[str, Tensor]:
        return {k: v * (float("inf") if step == 7 and k == "x" else 1) for k, v in batch(step).items()}

    model = Line()
    with pytest.raises(
        FloatingPointError, match=r"step 7: loss, largest not finite.*layer .* is line \(torch.float32\)"
    ):
        fit(model, broken, CONFIG, tmp_path)
    assert [path.stem for path in files(tmp_path)] == ["step-00000006", "step-00000007"]
    assert_equal(trained(tmp_path), whole)  # it continues once the batch is fixed


def test_the_first_module_that_broke_is_named() -> None:
    class Sums(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 0

    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), Sums(nn.ReLU()))
    assert first_nonfinite_layer(lambda: network(torch.ones(1, 2)), network) == "2 (torch.float32)"
    network[1][1].weight.data.fill_(float("nan"))
    assert first_nonfinite_layer(lambda: network(torch.ones(1, 2)), network) == "1.1 (torch.float32)"
    network[1][1].weight.data.fill_(1)
    assert first_nonfinite_layer(lambda: network[:2](torch.ones(1, 2)), network) is None


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    class Root(Line):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": (self.line(batch["x"]) * 0).abs().sqrt().sum()}  # the root's slope at 0 is infinite

    with pytest.raises(FloatingPointError, match=r"gradients of 2 parameters .*line\.weight \(torch.float32\)"):
        fit(Root(), batch, CONFIG, tmp_path)


def test_half_precision_trains_float32_weights_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = Line()
    inner = []
    model.line.register_forward_hook(lambda _m, _i, output: inner.append(output.dtype))
    log = fit(model, batch, CONFIG.model_copy(update={"mixed_precision": "bf16"}), tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and set(inner) == {torch.bfloat16}
    assert all(isinstance(value, float) for record in log for name, value in record.items() if name != "step")
    assert model(batch(0))["loss"].dtype == torch.float32 and inner[-1] == torch.float32


class Half(processes.Accelerator):  # type: ignore[misc]
    """float16 as on a GPU, scaled gradients included, on the CPU."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
        self.native_amp = True


def test_float16_halves_its_scale_and_resumes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.model_copy(update={"mixed_precision": "fp16"})
    with pytest.raises(ValueError, match="Cannot train in fp16 on cpu"):
        trained(tmp_path / "cpu", config)
    monkeypatch.setattr(processes, "Accelerator", Half)
    assert_equal(trained(tmp_path / "whole", config), trained(tmp_path / "again", config))
    first = load_file(tmp_path / "whole/checkpoints/step-00000012.safetensors")
    assert 1 < first["scaler/scale"] < 2.0**20 and first["optimizer/step/line.weight"] < 12  # some were skipped
    killed_after(7, tmp_path / "killed", config)
    trained(tmp_path / "killed", config)
    second = load_file(tmp_path / "killed/checkpoints/step-00000012.safetensors")
    assert first.keys() == second.keys()
    assert_equal(second, first)


def test_float16_does_not_skip_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Root(Line):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": (self.line(batch["x"]).float() * 0).abs().sqrt().sum()}

    monkeypatch.setattr(processes, "Accelerator", Half)
    config = CONFIG.model_copy(update={"mixed_precision": "fp16", "steps": 40})
    with pytest.raises(FloatingPointError, match="step 21: the gradients"):
        fit(Root(), batch, config, tmp_path)


def test_the_launcher_s_settings_are_not_added(
    tmp_path: Path, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert_equal(trained(tmp_path), whole)


def test_a_tracker_that_is_missing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'wandb' is not installed"):
        trained(tmp_path / "run", CONFIG.model_copy(update={"trackers": ("wandb",)}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_for_real_a_few_times(tmp_path: Path) -> None:
    assert crash_test(tmp_path, kills=2, steps=16, pause=0.02).identical
