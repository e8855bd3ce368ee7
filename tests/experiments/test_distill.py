"""Objectives against the same numbers by hand, what they run and what they train; on tiny pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experiments.config import LossTerm
from experiments.distill import DistillationLoss, list_objectives
from experiments.distill.objectives import DistillationStep, create_objective, register_objective
from experiments.distill.objectives.matrix import row_indices, softmax_rows
from experiments.teacher.teacher import Batch, Teacher
from mixers import create_mixer
from mixers.structure import mixing_matrix
from tests.experiments.students import batch_of, gradients, open_teacher, student
from unet_adapters import MixerAdapter
from unet_adapters.capture import capture_sites

PUBLISHED = {"noise": LossTerm(), "output": LossTerm(weight=0.5), "features": LossTerm(weight=0.5)}


def one(name: str, **options: Any) -> dict[str, LossTerm]:
    return {name: LossTerm(options=options)}


@pytest.fixture
def teacher() -> Teacher:
    return open_teacher()


@pytest.fixture
def batch(teacher: Teacher) -> Batch:
    return batch_of(teacher)


@contextmanager
def forwards(teacher: Teacher) -> Iterator[list[bool]]:
    """For each forward of the UNet: whether it builds a graph."""
    records: list[bool] = []
    hook = teacher.denoiser.register_forward_pre_hook(lambda *_: records.append(torch.is_grad_enabled()))
    yield records
    hook.remove()


@pytest.mark.parametrize("name", ["output", "features", "local", "matrix"])
def test_zero_where_the_student_is_the_teacher(teacher: Teacher, batch: Batch, name: str) -> None:
    adapter = MixerAdapter.build(teacher.pipe, "softmax")
    assert DistillationLoss(teacher, adapter, one(name))(batch)["loss"].item() < 1e-20


def test_noise_is_the_teachers_own_loss_where_the_student_is_the_teacher(teacher: Teacher, batch: Batch) -> None:
    result = DistillationLoss(teacher, MixerAdapter.build(teacher.pipe, "softmax"), one("noise"))(batch)["loss"]
    noisy = teacher.scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    with torch.no_grad():
        own = F.mse_loss(teacher.denoiser(noisy, batch["timesteps"], batch["text"]).sample, batch["noise"])
    torch.testing.assert_close(result, own)


def test_the_published_loss_by_hand(teacher: Teacher, batch: Batch) -> None:
    adapter = student(teacher)
    result = DistillationLoss(teacher, adapter, PUBLISHED)(batch)
    adapter.unmount()
    noisy = teacher.scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    sites: dict[bool, dict[str, Tensor]] = {}
    outputs: dict[bool, Tensor] = {}
    for mounted in (False, True):
        records: dict[str, Tensor] = {}
        adapter.mount() if mounted else adapter.unmount()
        hooks = [
            teacher.denoiser.get_submodule(site.name).register_forward_hook(
                lambda _m, _a, out, n=site.name, s=records: s.update({n: out})
            )
            for site in adapter.sites
        ]
        outputs[mounted] = teacher.denoiser(noisy, batch["timesteps"], batch["text"]).sample.detach()
        sites[mounted] = records
        for hook in hooks:
            hook.remove()
    noise = F.mse_loss(outputs[True], batch["noise"])
    output = F.mse_loss(outputs[True], outputs[False])
    features = torch.stack([F.mse_loss(sites[True][n], sites[False][n]) for n in sites[True]]).mean()
    torch.testing.assert_close(result["noise"], noise)
    torch.testing.assert_close(result["output"], output)
    torch.testing.assert_close(result["features"], features)
    torch.testing.assert_close(result["loss"], noise + output / 2 + features / 2)


def test_local_by_hand_and_each_sites_gradient_is_its_own(teacher: Teacher, batch: Batch) -> None:
    adapter = student(teacher)
    result = DistillationLoss(teacher, adapter, one("local"))(batch)["loss"]
    whole = gradients(adapter, result)
    assert whole.keys() == dict(adapter.student.named_parameters()).keys()
    noisy = teacher.scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    with (
        adapter.unmounted(),
        torch.no_grad(),
        capture_sites(teacher.denoiser, [s.name for s in adapter.sites]) as calls,
    ):
        teacher.predict(noisy, batch["timesteps"], batch)
    losses = {}
    for name, call in calls.items():
        error = (adapter.mixers[name](call.input, projections=teacher.denoiser.get_submodule(name)) - call.output) ** 2
        losses[name] = torch.stack([error[i].mean() / call.output[i].var(correction=0) for i in range(2)]).mean()
    torch.testing.assert_close(result, torch.stack(list(losses.values())).mean())
    for name, loss in losses.items():
        alone = gradients(adapter, loss / len(losses))
        assert all(n.startswith(f"{name}.") for n in alone)
        for n, value in alone.items():
            torch.testing.assert_close(whole[n], value)


def test_rows_of_the_teacher_are_those_of_its_softmax(teacher: Teacher) -> None:
    layer = teacher.denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    x = torch.randn(2, 20, layer.query_dim, dtype=torch.float64)
    mixer = create_mixer("softmax", layer.query_dim, layer.heads, own_projections=False)
    row_shares = torch.rand(2, 5, dtype=torch.float64)
    matrix = mixing_matrix(mixer, x, layer)
    rows = softmax_rows(layer, x, row_shares)
    for sample in range(2):
        for r, i in enumerate((row_shares[sample] * 20).long().tolist()):
            torch.testing.assert_close(rows[sample, r], matrix[sample, :, i])


@given(share=st.floats(0, 1, exclude_max=True, width=32), length=st.integers(1, 1 << 22))
def test_every_row_is_one_of_the_tokens(share: float, length: int) -> None:
    _, rows = row_indices(torch.tensor([[share]]), length)
    assert 0 <= int(rows) < length


@pytest.mark.parametrize("mixer", ["linfusion", "mamba"], ids=["a matrix a head", "a matrix a channel"])
def test_matrix_by_hand(teacher: Teacher, batch: Batch, mixer: str) -> None:
    adapter = student(teacher, mixer, select="mid_block")
    result = DistillationLoss(teacher, adapter, one("matrix"))(batch)["loss"]
    assert adapter.is_mounted
    (name,) = adapter.mixers
    noisy = teacher.scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    layer = teacher.denoiser.get_submodule(name)
    with adapter.unmounted(), torch.no_grad(), capture_sites(teacher.denoiser, [name]) as calls:
        teacher.predict(noisy, batch["timesteps"], batch)
        softmax = create_mixer("softmax", layer.query_dim, layer.heads, own_projections=False)
        expected = mixing_matrix(softmax, calls[name].input, layer)
    matrix = mixing_matrix(adapter.mixers[name], calls[name].input, layer, calls[name].grid)
    terms = []
    for sample in range(2):
        rows = (batch["rows"][sample] * matrix.shape[-1]).long()
        for head in range(layer.heads):
            channels = matrix[sample, head] if matrix.ndim == 5 else matrix[sample, head, None]
            target = expected[sample, head][rows]
            error = sum((channel[rows] - target).square().sum() for channel in channels)
            terms.append(error / (len(channels) * target.square().sum()))
    torch.testing.assert_close(result, torch.stack(terms).mean())
    trained = gradients(adapter, result)
    assert any(n.endswith("to_q.weight") for n in trained) or mixer == "mamba"
    assert not any(".to_out." in n for n in trained)


def test_matrix_leaves_out_large_sites_and_says_so(
    teacher: Teacher, batch: Batch, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = student(teacher)
    some = DistillationLoss(teacher, adapter, one("matrix", max_tokens=30))
    trained = gradients(adapter, some(batch)["loss"])
    some(batch)
    left_out = [s.name for s in adapter.sites if not any(n.startswith(s.name) for n in trained)]
    assert 0 < len(left_out) < len(adapter.sites)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1 and all(name in messages[0] for name in left_out)
    with pytest.raises(ValueError, match="max_tokens=3 tokens"):
        DistillationLoss(teacher, adapter, one("matrix", max_tokens=3))(batch)


@pytest.mark.parametrize("name", list_objectives())
def test_only_the_student_is_trained(teacher: Teacher, batch: Batch, name: str) -> None:
    before = {n: v.clone() for n, v in teacher.denoiser.state_dict().items()}
    adapter = student(teacher)
    objective = DistillationLoss(teacher, adapter, one(name))
    assert {id(p) for p in objective.parameters()} == {id(p) for p in adapter.student.parameters()}
    optimizer = torch.optim.SGD(objective.parameters(), lr=1e-3)
    objective(batch)["loss"].backward()
    optimizer.step()
    adapter.unmount()
    assert all(p.grad is None for p in teacher.denoiser.parameters())
    after = teacher.denoiser.state_dict()
    assert all(torch.equal(after[n], v) for n, v in before.items())


@pytest.mark.parametrize(
    ("terms", "graphs"),
    [
        (one("noise"), [True]),
        (one("output"), [False, True]),
        (one("local"), [False]),
        (one("matrix"), [False]),
        (one("local") | one("matrix"), [False]),
        (PUBLISHED, [False, True]),
    ],
)
def test_a_step_runs_no_more_than_it_needs(
    teacher: Teacher, batch: Batch, terms: dict[str, LossTerm], graphs: list[bool]
) -> None:
    with forwards(teacher) as records:
        DistillationLoss(teacher, student(teacher), terms)(batch)
    assert records == graphs


def test_a_term_without_weight_is_not_run(teacher: Teacher, batch: Batch) -> None:
    terms = {"noise": LossTerm(), "output": LossTerm(weight=0.5, start=2, ramp=2)}
    objective = DistillationLoss(teacher, student(teacher), terms)
    losses = []
    for step, graphs in enumerate([[True], [True], [False, True], [False, True], [False, True]]):
        with forwards(teacher) as records:
            losses.append(objective(batch | {"step": torch.full((2,), step)}))
        assert records == graphs
    shares = [(((t["loss"] - t["noise"]) / t["output"]).item() if "output" in t else 0.0) for t in losses]
    assert shares == pytest.approx([0, 0, 0.25, 0.5, 0.5])


@given(weight=st.floats(0, 10), start=st.integers(0, 50), ramp=st.integers(0, 50))
def test_weights_rise_from_their_start_over_their_ramp(weight: float, start: int, ramp: int) -> None:
    term = LossTerm(weight=weight, start=start, ramp=ramp)
    values = [term.weight_at(step) for step in range(120)]
    assert values == sorted(values) and not any(values[:start])
    assert all(value == weight for value in values[start + max(0, ramp - 1) :])
    if ramp > 1 and weight > 0:
        assert values[start] == pytest.approx(weight / ramp)


@pytest.mark.parametrize("terms", [PUBLISHED, one("local"), one("matrix")], ids=["published", "local", "matrix"])
def test_gradient_checkpointing_changes_no_gradient(teacher: Teacher, batch: Batch, terms: dict[str, LossTerm]) -> None:
    adapter = student(teacher, "linfusion", causality="causal", scan="column")
    teacher.denoiser.train()
    objective = DistillationLoss(teacher, adapter, terms)
    plain = gradients(adapter, objective(batch)["loss"])
    teacher.denoiser.enable_gradient_checkpointing()
    saved = gradients(adapter, objective(batch)["loss"])
    assert plain.keys() == saved.keys() and any(value.any() for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list_objectives())
def test_a_batch_in_parts_has_the_loss_and_gradients_of_the_whole(teacher: Teacher, batch: Batch, name: str) -> None:
    adapter = student(teacher)
    objective = DistillationLoss(teacher, adapter, one(name))
    whole = objective(batch)["loss"]
    expected = gradients(adapter, whole)
    parts = [objective({n: v[i : i + 1] for n, v in batch.items()})["loss"] / 2 for i in range(2)]
    torch.testing.assert_close(sum(parts), whole)
    result = gradients(adapter, sum(parts))
    for n, value in expected.items():
        torch.testing.assert_close(result[n], value)


@pytest.mark.parametrize("name", list_objectives())
def test_a_step_of_sdxl(name: str) -> None:
    teacher = open_teacher("SDXL")
    adapter = student(teacher)
    batch = batch_of(teacher)
    assert {"pooled", "time_ids"} <= batch.keys()
    assert any(
        g.any() for g in gradients(adapter, DistillationLoss(teacher, adapter, one(name))(batch)["loss"]).values()
    )


def test_local_ignores_sites_below_min_tokens(teacher: Teacher, batch: Batch) -> None:
    every = student(teacher)
    sizes = {row.site: row.tokens for row in every.status(size=(16, 24))}
    some = student(teacher, min_tokens=max(t for t in sizes.values() if t))
    trained = gradients(some, DistillationLoss(teacher, some, one("local"))(batch)["loss"])
    assert {n for n in sizes if any(t.startswith(n) for t in trained)} == {
        n for n, t in sizes.items() if t == some.min_tokens
    }
    some.unmount()
    with pytest.raises(ValueError, match="No mixer runs at this size"):
        DistillationLoss(teacher, student(teacher, min_tokens=10_000), one("local"))(batch)


def test_objectives_of_others_and_their_mistakes(teacher: Teacher, batch: Batch) -> None:
    with pytest.raises(ValueError, match="Did you mean 'noise'"):
        create_objective("nois")
    with pytest.raises(ValueError, match="Did you mean 'max_tokens'"):
        create_objective("matrix", max_token=3)
    with pytest.raises(ValueError, match="has that name"):
        register_objective("noise")(type("Other", (), {}))

    class Greedy(type(create_objective("noise"))):
        needs = frozenset({"student"})

        def __call__(self, records: DistillationStep) -> Tensor:
            return records.teacher.prediction.mean()

    objective = DistillationLoss(teacher, student(teacher), one("noise"))
    objective._terms["noise"] = (LossTerm(), Greedy())
    with pytest.raises(ValueError, match="without 'teacher' in `needs`"):
        objective(batch)
