"""What the commands share: options in bundles, errors as one sentence, where results may go.

Nothing but click is imported at start-up.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["DATA", "FILE", "IMAGES", "JSON", "RUN", "bundle", "edge", "given", "image_options", "writable", "write_json"]

Command = TypeVar("Command", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


def edge(command: Command) -> Command:
    """Turn a ReliefError into its sentence on standard error and its exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from relief_onnx.errors import NothingPrunedError, ReliefError

        try:
            return command(*args, **kwargs)
        except ReliefError as error:
            click.echo(f"Error: {_sentence(str(error))}", err=True)
            if isinstance(error, NothingPrunedError):
                for weight, reason in error.reasons:
                    click.echo(f"  {weight}: {reason}", err=True)
            sys.exit(error.exit_code)

    return run  # type: ignore[return-value]


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


def bundle(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a number or a list such as 0.485,0.456,0.406") from error


DATA = bundle(
    click.option("--data", type=FILE, required=True, help="Folder or file of samples: .npy, .npz, images, .csv, ONNX test data."),
)
IMAGES = bundle(
    click.option("--mean", callback=_numbers, help="Per channel, subtracted after scaling: 0.485,0.456,0.406."),
    click.option("--std", callback=_numbers, help="Per channel, divided by: 0.229,0.224,0.225."),
    click.option("--scale", type=float, help="Pixel values are multiplied by it (default 1/255 for float inputs)."),
    click.option("--layout", type=click.Choice(["auto", "nchw", "nhwc"]), default="auto", help="Axis order of image inputs."),
    click.option("--color", type=click.Choice(["auto", "rgb", "bgr", "gray"]), default="auto", help="Channel order of image inputs."),
)
RUN = bundle(
    click.option("--samples", type=int, help="Use only that many samples, drawn with --seed."),
    click.option("--seed", type=int, help="Seed of every random choice (default 0)."),
    click.option("--threads", type=int, help="Threads for onnxruntime and scoring (default: one per core)."),
    click.option("--quiet", is_flag=True, help="Print nothing but errors."),
)


JSON = bundle(click.option("--json", "json_file", type=FILE, help="Write the result as JSON; - for standard output."))


def image_options(values: dict[str, Any]) -> Any:
    from relief_onnx.data import ImageOptions

    return ImageOptions(**{key: values.pop(key) for key in ("mean", "std", "scale", "layout", "color")})


def write_json(target: Path | None, document: Any) -> None:
    if target is None:
        return
    from relief_onnx.model import write_atomically
    from relief_onnx.report import to_json

    if str(target) == "-":
        click.echo(to_json(document), nl=False)
    else:
        write_atomically(target, to_json(document))


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Options as the library takes them: one that may be repeated and was not given is not there."""
    return {key: value for key, value in values.items() if value != ()}


def writable(target: Path | None, *taken: Path | None) -> None:
    """Find out before the work that a result has nowhere to go, or would replace one of the other files of this command."""
    from relief_onnx.errors import OutputError
    from relief_onnx.model import check_target

    if target is None or str(target) == "-":
        return
    if any(other is not None and target.resolve() == other.resolve() for other in taken):
        raise OutputError(f"{target} is given for two things at once; choose another name for one of them")
    check_target(target, force=True)
