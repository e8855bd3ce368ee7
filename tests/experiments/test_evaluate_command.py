"""`mixlab evaluate`: an adapter's folder in, a record, a protocol and pictures out; what is wrong is one sentence."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.teacher.load import open_teacher
from tests.experiments.students import student

SMALL = [
    *("sizes=[64]", "shapes=[[64,80]]", "site_sizes=[64]", "images=2", "timesteps=[500]", "sample_steps=2"),
    *('prompts=["red apple, teal background"]', "sample_sizes=[64]", "guidances=[1.5]"),
    *("metrics.images=2", "speed_sizes=[64]", "speed_repeats=1"),
]


def run(adapter: Path, teacher: Path, out: Path, *settings: str) -> tuple[int, str]:
    options = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    done = CliRunner().invoke(app, ["evaluate", str(adapter), "--teacher", str(teacher), "--out", str(out), *options])
    assert "Traceback" not in done.output
    return done.exit_code, " ".join(done.output.split())


def test_an_adapter_of_one_s_own(tiny_teacher: Path, tmp_path: Path) -> None:
    student(open_teacher(str(tiny_teacher))).save_pretrained(tmp_path / "adapter")
    code, told = run(tmp_path / "adapter", tiny_teacher, tmp_path / "out")
    assert code == 0, told
    assert "64 × 80" in told and "frechet" in told and "Record:" in told
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["protocol"] == json.loads((tmp_path / "out" / "protocol.json").read_text())["hash"]
    assert {"fidelity", "timesteps", "sites", "images", "speed"} < set(record)
    assert {row["guidance"] for row in record["images"]} == {3.0, 1.5}
    for place in ("samples/64", "samples/guidance-1.5/64", "teacher/samples/64", "teacher/samples/guidance-1.5/64"):
        assert (tmp_path / "out" / place / "0.png").is_file()
    code, told = run(tmp_path / "adapter", tiny_teacher, tmp_path / "out", "seed=1")
    assert code == 2 and "measured by another protocol: seeds was [0] and is now [1]" in told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (['metrics.features=["vgg"]'], "No feature network 'vgg'"),
        (["metrics.data=coco:nowhere"], "Cannot open nowhere as COCO"),
        (["metrics.imagess=3"], "Did you mean 'images'?"),
        (["sizes=[]", "shapes=[]"], "sizes and shapes are empty"),
        (["metrics.images=1"], "two pictures"),
        ([], "not an adapter"),
        (["timesteps=[1000]"], "timesteps.0"),
        (["timesteps=[]"], "timesteps"),
        (["sizes=[-64]"], "sizes.0"),
        (["speed_sizes=[3]"], "speed_sizes.0"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(
    settings: list[str], told: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    code, output = run(tmp_path, tiny_teacher, tmp_path / "out", *settings)
    assert code == 2 and told in output, output
    assert not (tmp_path / "out" / "protocol.json").exists()
