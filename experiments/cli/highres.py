"""`mixlab plan` and `mixlab generate`: large images, and what they need before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.app import Plugins, WeightVariant, app, clean_errors, console, load_plugins, progress
from experiments.cli.option_checks import check_file, check_finite, check_folder

SizeOption = Annotated[str, typer.Option("--size", help="width x height in pixels, such as 16384x8192")]
ModelOption = Annotated[str, typer.Option("--model", help="embedded, a folder, a Hub id, or random:SD-1.5")]
AdapterOption = Annotated[str | None, typer.Option("--adapter", help="folder or Hub id of a distilled adapter")]
MixerOption = Annotated[str | None, typer.Option("--mixer", help="mount this mixer, untrained")]
MemoryOption = Annotated[str | None, typer.Option("--memory", help="memory budget, such as 24GB; default: no limit")]
BaseSizeOption = Annotated[
    int | None, typer.Option("--base-size", min=1, help="side of the first stage; default: that of the training images")
]
StrengthsOption = Annotated[str, typer.Option("--strengths", help="share of the schedule that each later stage runs")]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="scheduler steps of the whole schedule")]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        min=1.0,
        help="guidance scale; 1 is none, at half the time; default: that of the model's pipeline",
        callback=check_finite,
    ),
]
ModeOption = Annotated[
    str, typer.Option("--mode", help="progressive, or direct: from noise at the full size, for study")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda; default: a GPU if there is one")]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: bfloat16, float32 on a CPU")
]
SkipResidualOption = Annotated[
    float | None,
    typer.Option(
        "--skip-residual",
        min=0.0,
        help="power of DemoFusion's skip residual, such as 3; default: none",
        callback=check_finite,
    ),
]
StrengthOption = Annotated[
    float | None,
    typer.Option("--strength", help="how much to change --image, above 0 and up to 1", callback=check_finite),
]
ControlScaleOption = Annotated[
    float, typer.Option("--control-scale", help="factor of the ControlNet's residuals", callback=check_finite)
]
StageDirOption = Annotated[
    Path | None,
    typer.Option(
        "--stage-dir", help="folder for finished stages; default: NAME.stages beside the image", callback=check_folder
    ),
]
MAX_SEED = 2**63 - 1  # of torch's generators
DEFAULT_STRENGTHS = "0.4,0.3,0.2,0.1"


@app.command()
def plan(
    size: SizeOption,
    model: ModelOption = "embedded",
    adapter: AdapterOption = None,
    mixer: MixerOption = None,
    memory: MemoryOption = None,
    base_size: BaseSizeOption = None,
    strengths: StrengthsOption = DEFAULT_STRENGTHS,
    steps: StepsOption = 50,
    guidance: GuidanceOption = None,
    mode: ModeOption = "progressive",
    tflops: Annotated[
        float | None,
        typer.Option(
            min=1e-6, help="throughput, 10^12 operations per second; default: measured", callback=check_finite
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    variant: WeightVariant = None,
    plugins: Plugins = [],  # noqa: B006 - typer reads the default and never changes it
) -> None:
    """Print what a large image needs, stage by stage, before any work; the GPU need not be present."""
    load_plugins(plugins)
    with clean_errors():
        from experiments.highres import commands, options, pipelines

        request = commands.GenerationRequest(
            prompt="",
            size=options.parse_size(size),
            base_size=base_size,
            strengths=options.parse_strengths(strengths),
            steps=steps,
            guidance=guidance,
            mode=mode,  # type: ignore[arg-type]  # checked by the request
        )
        commands.plan_image(
            pipelines.PipelineOptions(model, adapter, mixer, device, dtype, variant), request, memory, tflops, console
        )


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="what the image shows")],
    size: SizeOption = "1024x1024",
    out: Annotated[Path, typer.Option("--out", help="the PNG to write", callback=check_file)] = Path("runs/image.png"),
    model: ModelOption = "embedded",
    adapter: AdapterOption = None,
    mixer: MixerOption = None,
    memory: MemoryOption = None,
    base_size: BaseSizeOption = None,
    strengths: StrengthsOption = DEFAULT_STRENGTHS,
    steps: StepsOption = 50,
    guidance: GuidanceOption = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="seed of the noise")] = 0,
    negative: Annotated[str | None, typer.Option(help="what the image does not show")] = None,
    mode: ModeOption = "progressive",
    upscale: Annotated[str, typer.Option(help="upscale between stages as pixels or as latents")] = "pixels",
    skip_residual: SkipResidualOption = None,
    dilation: Annotated[int, typer.Option(min=1, help="dilation of the last stage's inner convolutions")] = 1,
    image: Annotated[Path | None, typer.Option(help="an image to enlarge, or to change with --strength")] = None,
    strength: StrengthOption = None,
    control: Annotated[str | None, typer.Option(help="folder or Hub id of a ControlNet")] = None,
    control_image: Annotated[Path | None, typer.Option(help="input image of the ControlNet")] = None,
    control_scale: ControlScaleOption = 1.0,
    stage_dir: StageDirOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    variant: WeightVariant = None,
    plugins: Plugins = [],  # noqa: B006
) -> None:
    """Generate a large image in stages; if it is stopped, the same command resumes after the last finished stage."""
    load_plugins(plugins)
    with clean_errors():
        from experiments.highres import commands, options, pipelines

        request = commands.GenerationRequest(
            prompt=prompt,
            negative_prompt=negative,
            size=options.parse_size(size),
            base_size=base_size,
            strengths=options.parse_strengths(strengths),
            steps=steps,
            guidance=guidance,
            seed=seed,
            skip_residual=skip_residual,
            dilation=dilation,
            mode=mode,  # type: ignore[arg-type]  # checked by the request
            upscale=upscale,  # type: ignore[arg-type]
        )
        commands.generate_image(
            pipelines.PipelineOptions(model, adapter, mixer, device, dtype, variant),
            request,
            out,
            progress,
            console,
            memory=memory,
            image=image,
            strength=strength,
            control=commands.ControlNetOptions.from_options(control, control_image, control_scale, variant),
            stage_dir=stage_dir,
        )
