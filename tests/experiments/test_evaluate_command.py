"""`mixlab evaluate`: an adapter's folder in, a record, a protocol and images out; errors are one sentence."""

import errno
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from experiments.cli import app
from experiments.core.locks import lock_folder
from experiments.teacher.load import open_teacher
from tests.experiments.students import student

SMALL = (
    "sizes=[64]",
    "shapes=[[64,80]]",
    "images=2",
    "held_in_images=0",
    "timesteps=[500]",
    "sample_steps=2",
    'prompts=["a red apple, teal background"]',
    "sample_sizes=[64]",
    "guidances=[1.5]",
    "generated.images=4",
    "metrics.sites.sizes=[64]",
    "metrics.cost.sizes=[64]",
    "metrics.cost.repeats=1",
)


def run(adapter: Path, teacher: Path, out: Path, *settings: str) -> tuple[int, str]:
    options = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    done = CliRunner().invoke(app, ["evaluate", str(adapter), "--teacher", str(teacher), "--out", str(out), *options])
    assert "Traceback" not in done.output
    return done.exit_code, " ".join(done.output.split())


def test_an_adapter_from_a_folder(tiny_teacher: Path, tmp_path: Path) -> None:
    student(open_teacher(str(tiny_teacher))).save_pretrained(tmp_path / "adapter")
    code, output = run(tmp_path / "adapter", tiny_teacher, tmp_path / "out")
    assert code == 0, output
    assert "Fréchet distance" in output and "Record:" in output
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["protocol"] == json.loads((tmp_path / "out" / "protocol.json").read_text())["hash"]
    assert {"fidelity", "timesteps", "sites", "frechet_distance", "text_image_score", "cost"} < set(record["metrics"])
    assert {row["guidance"] for row in record["metrics"]["kernel_distance"]} == {3.0, 1.5}
    for place in ("samples/64", "samples/guidance-1.5/64", "teacher/samples/64", "teacher/samples/guidance-1.5/64"):
        assert (tmp_path / "out" / place / "0.png").is_file()
    code, output = run(tmp_path / "adapter", tiny_teacher, tmp_path / "out", "seed=1")
    assert code == 2 and "measured by another protocol: seeds was [0] and is now [1]" in output


def test_a_folder_has_the_results_of_one_adapter(tiny_teacher: Path, tmp_path: Path) -> None:
    few = ("generated.images=0", "images=1", "held_in_images=0", "sizes=[64]", 'metrics={"fidelity": {}}')
    source = open_teacher(str(tiny_teacher))
    adapters = {"first": student(source), "second": student(source), "third": student(source)}
    with torch.no_grad():
        next(adapters["second"].student.parameters()).add_(1)
    adapters["third"].min_tokens = 9
    for name, adapter in adapters.items():
        adapter.save_pretrained(tmp_path / name)
    assert run(tmp_path / "first", tiny_teacher, tmp_path / "out", *few)[0] == 0
    record = (tmp_path / "out" / "evaluation.json").read_bytes()
    for name in ("second", "third"):
        code, output = run(tmp_path / name, tiny_teacher, tmp_path / "out", *few)
        assert code == 2 and "holds a run of another adapter" in output and "--out" in output
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == record
    with lock_folder(tmp_path / "out", "test"):
        code, output = run(tmp_path / "first", tiny_teacher, tmp_path / "out", *few)
    assert code == 2 and "Another evaluation is running" in output
    assert run(tmp_path / "first", tiny_teacher, tmp_path / "out", *few)[0] == 0, "the same one, again"


def test_an_adapter_in_linfusions_format(tiny_teacher: Path, tmp_path: Path) -> None:
    student(open_teacher(str(tiny_teacher))).save_linfusion(tmp_path / "adapter")
    code, output = run(tmp_path / "adapter", tiny_teacher, tmp_path / "out", "generated.images=0")
    assert code == 0, output


def test_a_full_disk_is_one_sentence(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def fail(*_: object, **__: object) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: {errno.ENOSPC} No space left on device")

    student(open_teacher(str(tiny_teacher))).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("unet_adapters.files.save_file", fail)
    code, output = run(tmp_path / "adapter", tiny_teacher, tmp_path / "out", "generated.images=0")
    assert code == 2 and "No space left on device" in output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['generated.features=["vgg"]'], "No feature network 'vgg'"),
        (["generated.data=coco:nowhere"], "Cannot open nowhere as COCO"),
        (["generated.imagess=3"], "Did you mean 'images'?"),
        (["metrics.frechet={}"], "Did you mean 'frechet_distance'?"),
        (['metrics.sites={"size": 3}'], "Did you mean 'sizes'?"),
        (["sizes=[]", "shapes=[]"], "sizes and shapes are empty"),
        (["generated.images=1"], "two images"),
        ([], "holds no adapter: expected adapter.json"),
        (["timesteps=[1000]"], "timesteps.0"),
        (["timesteps=[]"], "timesteps"),
        (["sizes=[-64]"], "sizes.0"),
        (["metrics.cost.sizes=[3]"], "sizes.0"),
    ],
)
def test_invalid_input_is_one_sentence(settings: list[str], message: str, tiny_teacher: Path, tmp_path: Path) -> None:
    code, output = run(tmp_path, tiny_teacher, tmp_path / "out", *settings)
    assert code == 2 and message in output, output
    assert not (tmp_path / "out" / "protocol.json").exists()


def export(prompts: Path, layout: str, teacher: Path, out: Path, *more: str) -> tuple[int, str]:
    options = ["--layout", layout, "--teacher", str(teacher), "--out", str(out), "--set", "sample_steps=1", *more]
    done = CliRunner().invoke(app, ["export", str(prompts), *options])
    assert "Traceback" not in done.output
    return done.exit_code, " ".join(done.output.split())


def test_images_for_geneval(tiny_teacher: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "evaluation_metadata.jsonl"
    records = [{"tag": "counting", "prompt": "red apple"}, {"tag": "colors", "prompt": "blue heart"}]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, output = export(prompts, "geneval", tiny_teacher, tmp_path / "out")
    assert code == 0, output
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").glob("0*/**/*.*"))
    assert files == [
        path
        for k in range(2)
        for path in (f"0000{k}/metadata.jsonl", *(f"0000{k}/samples/000{n}.png" for n in range(4)))
    ]
    assert json.loads((tmp_path / "out" / "00001" / "metadata.jsonl").read_text()) == records[1]
    code, output = export(tmp_path / "out" / "00001" / "samples" / "0000.png", "geneval", tiny_teacher, tmp_path)
    assert code == 2 and "as geneval's prompts" in output


def test_images_for_dpg(tiny_teacher: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "apple.txt").write_text("red apple")
    code, output = export(tmp_path / "prompts", "dpg", tiny_teacher, tmp_path / "out")
    assert code == 0, output
    with Image.open(tmp_path / "out" / "apple.png") as grid:
        assert grid.size == (128, 128)
    code, output = export(tmp_path / "prompts", "dqg", tiny_teacher, tmp_path / "other")
    assert code == 2 and "Did you mean 'dpg'" in output


def test_images_of_two_exports_are_not_mixed(tiny_teacher: Path, tmp_path: Path) -> None:
    """One thing changes at a time: a folder's images are of one model, one list of prompts and one set of settings."""
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "0.txt").write_text("red apple")
    student(open_teacher(str(tiny_teacher))).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    assert export(prompts, "dpg", tiny_teacher, out)[0] == 0
    changes = {
        "seed": ("--set", "seed=1"),
        "steps": ("--set", "sample_steps=2"),
        "guidance": ("--set", "guidance=1.5"),
        "size": ("--size", "32"),
        "model": ("--adapter", str(tmp_path / "adapter")),
    }
    for name, options in changes.items():
        code, output = export(prompts, "dpg", tiny_teacher, out, *options)
        assert code == 2 and f"holds images of another export: {name} differ" in output, output
    (prompts / "0.txt").write_text("blue heart")
    code, output = export(prompts, "dpg", tiny_teacher, out)
    assert code == 2 and "another export: prompts differ" in output, output


def test_an_export_that_was_killed_leaves_no_half_image(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "0.txt").write_text("red apple")

    def half(image: Image.Image, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"half of an image")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", half)
        code, output = export(prompts, "dpg", tiny_teacher, tmp_path / "out")
    assert code == 2 and "No space left on device" in output
    assert not list((tmp_path / "out").glob("*.png"))
    assert export(prompts, "dpg", tiny_teacher, tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
