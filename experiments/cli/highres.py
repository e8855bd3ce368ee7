"""`mixlab generate` and `mixlab plan`: large images, and what they will need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.cli.app import Plugins, app, clean_errors, console, load, progress

Size = Annotated[str, typer.Option(help="width x height in pixels, as in 16384x8192")]
Model = Annotated[str, typer.Option(help="embedded, a folder, a Hub id, or random:SD-1.5 for an architecture alone")]
Adapter = Annotated[str | None, typer.Option(help="folder or Hub id of a distilled adapter, ours or LinFusion's")]
Mixer = Annotated[str | None, typer.Option(help="mount this mixer as it is, untrained")]
Memory = Annotated[str | None, typer.Option(help="what may be used, as in 24GB; savings are chosen so that it holds")]
Base = Annotated[int | None, typer.Option(min=1, help="side of the first stage; default: what the model is made for")]
Steps = Annotated[int, typer.Option(min=1, help="of the whole schedule")]
Guidance = Annotated[float, typer.Option(min=1.0)]
Mode = Annotated[str, typer.Option(help="progressive, or direct: from noise at the full size, for study")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default: float32 on a CPU, else bfloat16")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where there is one")]


@app.command("plan")
def plan_image(
    size: Size = "1024x1024",
    model: Model = "embedded",
    adapter: Adapter = None,
    mixer: Mixer = None,
    memory: Memory = None,
    base: Base = None,
    steps: Steps = 50,
    guidance: Guidance = 7.5,
    mode: Mode = "progressive",
    dtype: Dtype = None,
    device: Device = None,
    plugins: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
) -> None:
    """Say what an image will need in memory, and which savings make it fit; nothing is generated."""
    from experiments.highres.make import Where, plan, plan_table

    load(plugins)
    with clean_errors():
        where = Where(model=model, adapter=adapter, mixer=mixer, device=device, dtype=dtype)
        wanted = _request("", size, mode=mode, base=base, steps=steps, guidance=guidance)
        found = plan(where, wanted, _bytes(memory))
    console.print(plan_table(found))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="what the image shows")],
    size: Size = "256x256",
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("image.png"),
    model: Model = "embedded",
    adapter: Adapter = None,
    mixer: Mixer = None,
    memory: Memory = None,
    base: Base = None,
    steps: Steps = 50,
    guidance: Guidance = 7.5,
    mode: Mode = "progressive",
    seed: int = 0,
    negative: Annotated[str, typer.Option(help="what it shall not show")] = "",
    enlarge: Annotated[str, typer.Option(help="between stages: pixels or latents")] = "pixels",
    residual: Annotated[float | None, typer.Option(help="power of DemoFusion's skip residual; default: none")] = None,
    dilation: Annotated[int, typer.Option(min=1, help="of convolutions early in the last stage; 1: none")] = 1,
    image: Annotated[Path | None, typer.Option(help="enlarge this picture; with --strength, change it")] = None,
    strength: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="how much --image is changed")] = None,
    keep: Annotated[Path | None, typer.Option(help="folder of finished stages; default: beside the image")] = None,
    dtype: Dtype = None,
    device: Device = None,
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Make a large image in stages, each kept: start it again after a stop, and it goes on after the last one."""
    from experiments.highres.make import Where, make, measure_rate, opened, plan_table, planned, read_picture, timed

    load(plugins)
    with clean_errors():
        where = Where(model=model, adapter=adapter, mixer=mixer, device=device, dtype=dtype)
        switches = {"enlarge": enlarge, "residual": residual, "dilation": dilation, "negative_prompt": negative}
        wanted = _request(prompt, size, mode=mode, base=base, steps=steps, guidance=guidance, seed=seed, **switches)
        budget, picture = _bytes(memory), read_picture(image, strength)
        with opened(where) as pipe:
            plan = planned(pipe, wanted, budget)
            plan = timed(plan, measure_rate(pipe, plan.stages[0].stage.size))
            console.print(plan_table(plan))
            with progress() as bars:
                tasks: dict[str, Any] = {}

                def report(what: str, done: int, total: int) -> None:
                    if what not in tasks:
                        tasks[what] = bars.add_task(what, total=total)
                    bars.update(tasks[what], completed=done)

                stages = keep or out.with_suffix(".stages")
                result = make(pipe, wanted, plan, stages, report, image=picture, strength=strength)
        out.parent.mkdir(parents=True, exist_ok=True)
        result.save(out)
    found = f" {result.resumed} of {len(result.stages)} stages were there." if result.resumed else ""
    console.print(f"Image: {out.resolve()}.{found} Stages: {stages.resolve()}", soft_wrap=True)


def _request(prompt: str, size: str, **options: Any) -> Any:
    from experiments.highres.units import parse_size
    from unet_adapters.highres import Request

    return Request(prompt=prompt, size=parse_size(size), **options)


def _bytes(memory: str | None) -> int | None:
    from experiments.highres.units import parse_bytes

    return None if memory is None else parse_bytes(memory)
