"""`mixlab generate` and `mixlab plan`: large images, and what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.cli.app import Plugins, app, clean_errors, console, load_plugins, progress

SizeOption = Annotated[str, typer.Option("--size", help="width x height in pixels, as in 16384x8192")]
ModelOption = Annotated[str, typer.Option("--model", help="embedded, a folder, a Hub id, or random:SD-1.5")]
Adapter = Annotated[str | None, typer.Option(help="folder or Hub id of a distilled adapter, ours or LinFusion's")]
Mixer = Annotated[str | None, typer.Option(help="mount this mixer as it is, untrained")]
Memory = Annotated[str | None, typer.Option(help="what may be used, as in 24GB; savings are chosen so that it holds")]
Base = Annotated[int | None, typer.Option(min=1, help="side of the first stage; default: what the model was made for")]
Strengths = Annotated[str, typer.Option(help="share of the schedule that each later stage runs")]
Steps = Annotated[int, typer.Option(min=1, help="of the first stage")]
Guidance = Annotated[float, typer.Option(min=1.0, help="1 is none, in half the time")]
Mode = Annotated[str, typer.Option(help="progressive, or direct: from noise at the full size, for study")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where there is one")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU")]
PUBLISHED = "0.4,0.3,0.2,0.1"


@app.command()
def plan(
    size: SizeOption,
    model: ModelOption = "embedded",
    adapter: Adapter = None,
    mixer: Mixer = None,
    memory: Memory = None,
    base: Base = None,
    strengths: Strengths = PUBLISHED,
    steps: Steps = 50,
    guidance: Guidance = 7.5,
    mode: Mode = "progressive",
    tflops: Annotated[float | None, typer.Option(min=1e-6, help="rate to reckon with; default: measured")] = None,
    device: Device = None,
    dtype: Dtype = None,
    plugins: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
) -> None:
    """Tell what a large image needs, stage by stage, before any work; a GPU need not be there to plan for it."""
    load_plugins(plugins)
    with clean_errors():
        from experiments.highres import commands
        from unet_adapters.highres import Request

        chosen: dict[str, Any] = {"base": base, "steps": steps, "guidance": guidance, "mode": mode}
        request = Request("", size=commands.parse_size(size), strengths=commands.parse_strengths(strengths), **chosen)
        commands.plan(commands.Model(model, adapter, mixer, device, dtype), request, memory, tflops, console)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="what the image shows")],
    size: SizeOption = "1024x1024",
    out: Annotated[Path, typer.Option("--out", help="the PNG to write")] = Path("runs/image.png"),
    model: ModelOption = "embedded",
    adapter: Adapter = None,
    mixer: Mixer = None,
    memory: Memory = None,
    base: Base = None,
    strengths: Strengths = PUBLISHED,
    steps: Steps = 50,
    guidance: Guidance = 7.5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    negative: Annotated[str, typer.Option(help="what it does not show")] = "",
    mode: Mode = "progressive",
    enlarge: Annotated[str, typer.Option(help="a stage's image as pixels, or as latents")] = "pixels",
    residual: Annotated[float | None, typer.Option(help="power of DemoFusion's skip residual, as in 3")] = None,
    dilation: Annotated[int, typer.Option(min=1, help="of the last stage's inner convolutions")] = 1,
    image: Annotated[Path | None, typer.Option(help="a picture to make larger, or with --strength to change")] = None,
    strength: Annotated[float | None, typer.Option(help="how much of --image to change, up to 1")] = None,
    control: Annotated[str | None, typer.Option(help="a ControlNet's folder or Hub id")] = None,
    control_image: Annotated[Path | None, typer.Option(help="what the ControlNet looks at")] = None,
    control_scale: Annotated[float, typer.Option()] = 1.0,
    keep: Annotated[Path | None, typer.Option(help="folder of finished stages; default: beside the image")] = None,
    device: Device = None,
    dtype: Dtype = None,
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Make a large image in stages; stopped or killed, the same command goes on after the last finished stage."""
    load_plugins(plugins)
    with clean_errors():
        from experiments.highres import commands
        from unet_adapters.highres import Request

        if (control is None) != (control_image is None):
            raise ValueError("A ControlNet needs both: --control for the network and --control-image for its picture.")
        chosen: dict[str, Any] = {"base": base, "steps": steps, "guidance": guidance, "seed": seed, "mode": mode}
        chosen |= {"strengths": commands.parse_strengths(strengths), "enlarge": enlarge}
        chosen |= {"residual": residual, "dilation": dilation}
        request = Request(prompt, negative, commands.parse_size(size), **chosen)
        commands.make(
            commands.Model(model, adapter, mixer, device, dtype),
            request,
            out,
            progress,
            console,
            memory=memory,
            image=image,
            strength=strength,
            control=None if control is None or control_image is None else (control, control_image, control_scale),
            keep=keep,
        )
    console.print(f"Image: {out.resolve()}", soft_wrap=True)
