"""Progress on terminals and in log files."""

from __future__ import annotations

import io

from rich.console import Console

from experiments.core.progress import ProgressBars, ProgressLines, show_progress


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_log_gets_a_line_at_the_start_at_intervals_and_at_the_end() -> None:
    console = Console(file=io.StringIO())
    clock = Clock()
    lines = ProgressLines(console, interval=30, clock=clock)
    for step in range(101):
        clock.now = float(step)
        lines.update("distill", step, 100, f"distill: loss {step}")
    assert lines_of(console) == [
        "distill: loss 0: 0/100",
        "distill: loss 30: 30/100, 0:00:30 elapsed, about 0:01:10 left",
        "distill: loss 60: 60/100, 0:01:00 elapsed, about 0:00:40 left",
        "distill: loss 90: 90/100, 0:01:30 elapsed, about 0:00:10 left",
        "distill: loss 100: 100/100, took 0:01:40",
    ]
    assert lines.speed("distill") == 1.0


def test_the_estimate_begins_where_a_resumed_training_begins() -> None:
    console = Console(file=io.StringIO())
    clock = Clock()
    lines = ProgressLines(console, interval=10, clock=clock)
    lines.update("distill", 900, 1000)
    clock.now = 10.0
    lines.update("distill", 950, 1000)
    assert lines_of(console)[-1] == "distill: 950/1000, 0:00:10 elapsed, about 0:00:10 left"


def test_a_new_phase_of_a_task_is_counted_from_its_own_start() -> None:
    console = Console(file=io.StringIO())
    clock = Clock()
    update = ProgressLines(console, interval=10, clock=clock).callback("cell")
    update("distill", 0, 100)
    clock.now = 9.0
    update("distill", 99, 100)
    update("evaluate", 0, 4)
    clock.now = 11.0
    update("evaluate", 1, 4)
    assert lines_of(console)[-1] == "evaluate: 1/4, 0:00:02 elapsed, about 0:00:06 left"


def test_a_file_gets_lines_and_a_terminal_gets_bars() -> None:
    with show_progress(Console(file=io.StringIO())) as display:
        assert isinstance(display, ProgressLines)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with show_progress(console) as display:
        assert isinstance(display, ProgressBars)
        assert display.speed("load") is None
        display.update("load", 1, 2)
        display.update("load", 2, 2, "load: weights")
        display.update("other", 0, 1)
        display.remove("other")
        display.remove("other")
    assert "load: weights" in "\n".join(lines_of(console))
