"""The how-to pages run as they stand, in a folder outside the repository."""

from __future__ import annotations

import csv
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from experiments.ablation.grid import list_grids, load_grid
from experiments.cli import app
from experiments.cli.conformance import ConformanceResult, print_results
from experiments.config import EvaluationConfig, apply_overrides
from experiments.core.registries import OBJECTIVES
from experiments.distill.objectives import list_objectives
from experiments.distill.recipe import list_recipes, load_recipe
from mixers import entries, list_mixers, registry
from mixers.testing import MIXER_CHECKS, OPERATOR_CHECKS, CheckOutcome, conformance_cases

ROOT = Path(__file__).resolve().parents[1]
HOWTO = ROOT / "docs" / "howto"
ADD, CHECK, DATA = HOWTO / "add_a_mixer.md", HOWTO / "check_a_mixer.md", HOWTO / "data.md"
ABLATE, DISTIL, EVALUATE = HOWTO / "run_an_ablation.md", HOWTO / "distill.md", HOWTO / "evaluate.md"
LARGE = HOWTO / "large_images.md"
METRIC = HOWTO / "add_a_metric.md"
FILES = ("my_mixer.py", "my_grid.py", "power-attention/pyproject.toml")  # in the order of the page
TINY = (
    *("distillation.fit.steps=2", "distillation.fit.batch_size=2", "distillation.images=4"),
    *("evaluation.shapes=[]", "evaluation.generated.images=0", "evaluation.held_in_images=0"),
    *("evaluation.sizes=[64,128]", "evaluation.images=1", "evaluation.timesteps=[500]", "evaluation.sample_sizes=[64]"),
    *(
        'evaluation.prompts=["red apple, teal background"]',
        "evaluation.sample_steps=2",
        "evaluation.metrics.cost.sizes=[64]",
        "evaluation.metrics.cost.repeats=1",
        "evaluation.metrics.sites.images=1",
    ),
)


def blocks(page: Path, *languages: str) -> list[str]:
    """The page's blocks of code of these languages that start at the margin, in their order."""
    text = page.read_text(encoding="utf-8")
    return [code for language, code in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S) if language in languages]


def table(page: Path) -> list[dict[str, str]]:
    """The rows of the page's table of variants."""
    lines = page.read_text(encoding="utf-8").partition("| Variant |")
    rows = [line.strip("| ").split(" | ") for line in "".join(lines[1:]).split("\n\n")[0].splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def commands() -> list[str]:
    """The page's commands, step by step: check, break and check, ablate, and install and list."""
    return blocks(ADD, "bash")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The reader's folder, with the files of the page in it and `mixlab` beside it."""
    for name, code in zip(FILES, blocks(ADD, "python", "toml"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code, encoding="utf-8")
    script = tmp_path / "bin" / "mixlab"  # -P: as an installed script, it has the reader's folder not on its path
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -c "from experiments.cli import main; main()" "$@"\n')
    script.chmod(0o755)
    return tmp_path


def shell(command: str, folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as the reader does; the library is this tree, whatever is installed."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths))),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }
    return subprocess.run(["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True)


def assert_shown(output: str, shown: str) -> None:
    """Every line that the page shows is in the output, in this order; "…" stands for any lines."""
    lines = iter(line.rstrip() for line in output.splitlines())
    for wanted in shown.splitlines():
        assert wanted == "…" or wanted in lines, f"the page shows {wanted!r}, which is not next in\n{output}"


def test_step_2_the_mixer_keeps_its_promises(folder: Path) -> None:
    done = shell(commands()[0], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_shown(done.stdout, blocks(ADD, "text")[0])


def test_step_3_a_wrong_trait_is_caught_with_the_smallest_failing_case(folder: Path) -> None:
    assert shell(commands()[1], folder).returncode == 0
    done = shell(commands()[2], folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert_shown(done.stdout, blocks(ADD, "text")[1])
    failure = done.stdout.partition("-noncausal-normalized ")[2]
    name, told, _, *matrix = failure.splitlines()[:5]
    assert name == "check_never_looks_ahead"
    assert "with 2 tokens" in told
    first, second = ([float(weight) for weight in row.split()] for row in matrix)
    assert len(first) == len(second) == 2
    assert first[1] > 0, "the first token sees the second"
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow  # four cells on the teacher that ships
def test_step_4_the_mixer_in_an_ablation(folder: Path) -> None:
    settings = " ".join(f"--set {shlex.quote(setting)}" for setting in TINY)
    done = shell(f"{commands()[3].strip()} {settings}", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_shown(done.stdout, blocks(ADD, "text")[2])
    report = folder / "runs" / "mine" / "report"
    page, made = (report / "index.html").read_text(encoding="utf-8"), table(report / "report.md")
    shown = table(ADD)  # of the whole run, whose errors this short one does not have
    assert [row["Variant"] for row in shown] == [row["Variant"] for row in made]
    for ours, theirs in zip(shown, made, strict=True):
        assert ours["Variant"] in page
        assert set(ours) < set(theirs) and ours["Features"] == theirs["Features"]
    errors = [key for key in shown[0] if key.startswith("Error")]
    assert [shown[0][key] for key in errors] == [made[0][key] for key in errors] == ["0", "0"]


@pytest.mark.slow  # pip, and two starts of mixlab
def test_step_5_an_installed_package_needs_no_plugin(folder: Path) -> None:
    """The page's own package, built and installed by pip; offline, so with the build backend that is here."""
    pytest.importorskip("setuptools", "77", reason="pip builds the package with it, offline")
    copy, install = commands()[4], commands()[5].splitlines()[0]
    assert shell(copy.replace("mkdir", "mkdir -p"), folder).returncode == 0
    assert install.startswith("pip install ")
    offline = "-m pip install --no-index --no-deps --no-build-isolation --target site "
    built = shell(install.replace("pip install ", f"{shlex.quote(sys.executable)} {offline}"), folder)
    assert built.returncode == 0, built.stdout + built.stderr
    listed = shell(commands()[5].splitlines()[1], folder, folder / "site")
    assert listed.returncode == 0, listed.stdout + listed.stderr
    assert_shown(listed.stdout, blocks(ADD, "text")[-1])
    twice = shell(f"{commands()[5].splitlines()[1]} --plugin my_mixer.py", folder, folder / "site")
    assert twice.returncode == 2
    assert "my_mixer.PowerAttention has that name" in twice.stdout and "Traceback" not in twice.stdout + twice.stderr


@pytest.mark.parametrize(
    ("source", "arguments", "told"),
    [
        (None, "* --plugin mine.py", "Cannot load the plug-in mine.py: expected a .py file"),
        ("def (", "* --plugin mine.py", "Cannot load the plug-in mine.py: SyntaxError"),
        ("x = 1", "* --plugin mine.py", "The plug-in mine.py registers nothing"),
        ("x = 1 / 0", "* --plugin mine.py", "Cannot load the plug-in mine.py: ZeroDivisionError"),
        (
            "import mixers\nmixers.register_mixer('mine')(dict)",
            "* --plugin mine.py",
            "Cannot load the plug-in mine.py: ValueError: Cannot register <class 'dict'> as 'mine'",
        ),
        (None, "no_such_mixer", "No mixer matches 'no_such_mixer'"),
    ],
    ids=["missing", "syntax", "registers nothing", "raises", "no mixer", "unknown pattern"],
)
def test_what_a_user_can_mend_is_one_sentence(
    source: str | None, arguments: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if source is not None:
        Path("mine.py").write_text(source)
    done = CliRunner().invoke(app, ["check", *arguments.split()])
    assert done.exit_code == 2, done.output
    assert [line for line in done.output.splitlines() if line.startswith(f"error: {told}")]
    assert "Traceback" not in done.output


BROKEN = """
from mixers import TokenMixer, register_mixer

@register_mixer("broken", causalities=("noncausal",))
class Broken(TokenMixer):
    pass
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A plug-in, registered for one test, whose mixer has nothing of what a mixer must have, no docstring either."""
    list_mixers()
    monkeypatch.setattr(entries, "ENTRIES", dict(entries.ENTRIES))
    (tmp_path / "broken.py").write_text(BROKEN, encoding="utf-8")
    return str(tmp_path / "broken.py")


def test_a_mixer_that_cannot_be_built_fails_and_the_others_go_on(broken: str) -> None:
    listed = CliRunner().invoke(app, ["list", "broken", "--plugin", broken])
    assert listed.exit_code == 0, listed.output
    assert "see mixlab check" in listed.output
    done = CliRunner().invoke(app, ["check", "broken", "--plugin", broken])
    assert done.exit_code == 1, done.output
    assert "cannot be built: NotImplementedError (in positive, mixer.py line " in done.output
    assert "2 configurations: 2 of 2 checks failed." in done.output
    assert "Traceback" not in listed.output + done.output


def test_a_plug_in_of_the_same_file_name_takes_no_other_s_place(broken: str) -> None:
    assert registry.load_plugin(broken) == registry.load_plugin(broken) == ["broken"]  # the same file: loaded again
    other = Path(broken).parent / "other" / "broken.py"
    other.parent.mkdir()
    other.write_text(BROKEN, encoding="utf-8")
    with pytest.raises(ValueError, match="has that name"):
        registry.load_plugin(other)


def test_the_table_of_checks_fits_a_terminal() -> None:
    """All that is registered at 80 columns, in cells as full as they get."""
    counts = {"passed": 19, "failed": 12, "known": 1}
    outcomes = [CheckOutcome("check_flops", status, "told", 0.0) for status, n in counts.items() for _ in range(n)]
    everything = conformance_cases(list_mixers())
    console = Console(width=80, file=io.StringIO(), record=True)
    print_results([ConformanceResult(configuration, outcomes) for configuration in everything], console)
    table, _, rest = console.export_text().partition("passed checks; ")
    assert table.count("19 12✗ 1~") == len(everything)
    assert max(map(len, table.splitlines())) <= 80 and "…" not in table
    assert rest.startswith("N normalized, U not; – refused; ✗ failed; ~ known exception")
    assert f"{len(everything)} configurations: {12 * len(everything)} of {32 * len(everything)} checks failed." in rest


def test_a_single_mixer_is_shown_check_by_check() -> None:
    outcomes = [
        CheckOutcome(check.name, status, "told in full", 0.0)
        for check, status in zip(MIXER_CHECKS, ("passed", "failed", "known"), strict=False)
    ]
    console = Console(width=80, file=io.StringIO(), record=True)
    (chosen, *_) = conformance_cases(list_mixers()[:1])
    print_results([ConformanceResult(chosen, outcomes)], console)
    text = console.export_text()
    for check, status in zip(MIXER_CHECKS, ("1 ✓", "1/1 ✗", "1/1 ~"), strict=False):
        assert f"{status} {check.name}" in text
        assert check.summary.split(",")[0] in text
    assert f"failed {chosen} {MIXER_CHECKS[1].name}\ntold in full" in text


@pytest.mark.slow  # every check of a mixer and of an operator
def test_the_kit_s_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for code in blocks(CHECK, "python"):
        exec(compile(code, str(CHECK), "exec"), names)
    assert capsys.readouterr().out == "".join(blocks(CHECK, "text"))


def test_the_page_of_data_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for code in blocks(DATA, "python"):
        exec(compile(code, str(DATA), "exec"), names)
    assert capsys.readouterr().out == "".join(blocks(DATA, "text"))


def test_the_page_of_distillation_runs(tmp_path: Path) -> None:
    recipe = tmp_path / "my_recipe.yaml"
    recipe.write_text(*blocks(DISTIL, "yaml"), encoding="utf-8")
    tiny = ("before.0.fit.steps=1", "before.0.fit.batch_size=2", "fit.steps=2", "fit.batch_size=2", "images=4")
    settings = [word for setting in tiny for word in ("--set", f"distillation.{setting}")]
    done = CliRunner().invoke(app, ["distill", str(recipe), "--out", str(tmp_path / "mine"), *settings])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "mine" / "card.md").is_file() and (tmp_path / "mine" / "adapter").is_dir()


def test_an_objective_of_the_page_is_one_file_outside_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for registered in ("_items", "_origins"):  # so that the objective is gone after this test
        monkeypatch.setattr(OBJECTIVES, registered, dict(getattr(OBJECTIVES, registered)))
    plugin = tmp_path / "absolute.py"
    plugin.write_text(*blocks(DISTIL, "python"), encoding="utf-8")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(*blocks(DISTIL, "yaml"), encoding="utf-8")
    changes = ["before=[]", 'objectives={"absolute": 1}', "fit.steps=1", "fit.batch_size=2", "images=2"]
    settings = [word for change in changes for word in ("--set", f"distillation.{change}")]
    out = tmp_path / "run"
    done = CliRunner().invoke(app, ["distill", str(recipe), "--plugin", str(plugin), "--out", str(out), *settings])
    assert done.exit_code == 0, done.output
    assert "1 absolute" in (out / "card.md").read_text()


def test_the_page_of_distillation_names_every_objective_and_recipe() -> None:
    text = DISTIL.read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, re.M)) == list_objectives()
    assert all(f"`{name}`" in text for name in list_recipes())
    shown = [shlex.split(line, comments=True) for line in blocks(DISTIL, "bash")[0].splitlines()]
    for words in shown:  # every option that the page shows is one
        name, *settings = words[words.index("distill") + 1 :]
        if not name.endswith(".yaml"):
            load_recipe(name, [after for word, after in pairwise(settings) if word == "--set"])


@pytest.mark.parametrize("page", [EVALUATE, LARGE], ids=lambda page: page.stem)
def test_a_page_of_python_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)
    assert capsys.readouterr().out == "".join(blocks(page, "text"))


def test_the_page_of_large_images_asks_for_what_there_is() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for block in blocks(LARGE, "bash"):
        for line in block.replace("\\\n", "").splitlines():
            _, verb, *words = shlex.split(line, comments=True)
            assert commands[verb].make_context(verb, words).params["size"] in line


def test_the_page_of_evaluation_asks_for_what_there_is() -> None:
    """Every setting of the page's commands, checked without running them."""
    commands = [
        shlex.split(line) for block in blocks(EVALUATE, "bash") for line in block.replace("\\\n", "").splitlines()
    ]
    settings = [[word for before, word in pairwise(c) if before == "--set"] for c in commands]
    plans = [apply_overrides(EvaluationConfig(), asked) for asked in settings]
    assert plans[1].guidances == (1.5, 5.0, 7.5) and plans[2].generated.images == 30000


def test_the_kit_s_page_lists_every_check() -> None:
    functions = [*(check.run for check in MIXER_CHECKS), *OPERATOR_CHECKS]
    summaries = [" ".join((inspect.getdoc(f) or "").split("\n\n")[0].split()) for f in functions]
    wanted = [f"- `{f.__name__}`: {summary}" for f, summary in zip(functions, summaries, strict=True)]
    assert re.findall(r"^- `check_.*", CHECK.read_text(encoding="utf-8"), re.M) == wanted


def test_the_table_of_grids_is_true() -> None:
    told = re.findall(r"^\| `(\w+)` \| .* \| (\d+) \|$", ABLATE.read_text(encoding="utf-8"), re.M)
    rows = {name: sum(variant.trained for variant in load_grid(name).variants) for name in list_grids()}
    assert {name: int(count) for name, count in told} == {name: rows[name] for name, _ in told}
    assert rows.keys() - dict(told).keys() == {"compatibility", "demo"}


def test_the_page_of_metrics_lists_a_metric_of_ones_own(tmp_path: Path, folder: Path) -> None:
    (folder / "detail.py").write_text(blocks(METRIC, "python")[0], encoding="utf-8")
    done = shell(blocks(METRIC, "bash")[0], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_shown(done.stdout, blocks(METRIC, "text")[0])


@pytest.mark.slow  # cells on the teacher that ships
def test_the_page_of_metrics_runs(folder: Path) -> None:
    """The metric is settable, measured, and in the report, without a change of the library."""
    (folder / "detail.py").write_text(blocks(METRIC, "python")[0], encoding="utf-8")
    settings = " ".join(f"--set {shlex.quote(setting)}" for setting in TINY)
    done = shell(f"{blocks(METRIC, 'bash')[1].strip()} --only 'softmax*' {settings}", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    report = folder / "runs" / "detail" / "report"
    assert "## Error of detail" in (report / "report.md").read_text(encoding="utf-8")
    with (report / "results.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "detail"]
    assert {(row["size"], row["timestep"]) for row in rows} == {("64", "900"), ("128", "900")}
    assert {row["relative_error"] for row in rows if row["variant"] == "softmax"} == {"0.0"}
    without = shell("mixlab report runs/detail", folder)
    assert without.returncode == 0, without.stdout + without.stderr
    assert "rows of the metric &#39;detail&#39; are not reported" in (report / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow  # two runs of a few steps
def test_the_page_of_ablations_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_mixers()
    monkeypatch.setattr(entries, "ENTRIES", dict(entries.ENTRIES))
    monkeypatch.chdir(tmp_path)
    files = {"my_mixer.py": blocks(ADD, "python")[0]}
    files |= dict(zip(("my_grid.py", "against.py"), blocks(ABLATE, "python"), strict=True))
    for name, code in files.items():
        Path(name).write_text(code, encoding="utf-8")
    lines = [line for line in "".join(blocks(ABLATE, "bash")).splitlines() if ".py" in line]
    assert len(lines) == 2
    rows = ("linear attention, non-causal, normalized", "power attention, non-causal, normalized")
    for line, row, more in zip(lines, rows, ((), ("distillation.before.0.fit.steps=2",)), strict=True):
        command = shlex.split(line.replace(" --budget 5m", ""))[1:]  # which would take five minutes
        shorter = [part for setting in (*TINY, *more) for part in ("--set", setting)]
        done = CliRunner().invoke(app, [*command, *shorter])
        assert done.exit_code == 0, done.output
        assert row in Path(command[-1], "report", "index.html").read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["ablate", "my_grid.py", "--budget", "5 minutes"]).exit_code == 2
