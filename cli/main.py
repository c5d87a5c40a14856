"""The commands. Each parses, makes one call into the library, and renders; errors of the library become one sentence here.

Nothing but click is imported at start-up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import training
from .shared import DATA, FILE, IMAGES, JSON, RUN, bundle, edge, given, image_options, writable, write_json

__all__ = ["main"]


class _Granularity(click.ParamType):  # type: ignore[type-arg]
    """One granularity, or channel and a finer one in any order."""

    name = "granularity"
    choices = ("connection", "weight", "channel", "channel+connection", "channel+weight")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from relief_onnx.options import granularity_of

        found = granularity_of(value)
        if found not in self.choices:
            self.fail(f"{value!r} is not one of {', '.join(self.choices)}.", param, ctx)
        return found


_GRANULARITY = click.option(
    "--granularity",
    type=_Granularity(),
    metavar="G",
    help="What is ranked and removed: connection (the default; of a convolution, whole kernels), weight (single weights), channel (a "
    "smaller and faster dense model), or channel+connection, channel+weight: channels first, the others inside those that stay.",
)
_CRITERION = click.option(
    "--criterion",
    type=click.Choice(["flow", "flow-obs", "relief", "relief-fast", "magnitude", "wanda"]),
    help="What ranks connections: flow, the share of the network's output that passes through (the default); flow-obs, which chooses again "
    "by what is lost after repair (the default with --repair); or a score within the neuron.",
)
_OUTPUT_WEIGHT = click.option(
    "--output-weight", multiple=True, metavar="NAME=W", help="Weight of an output for flow (default 1 each); may be given several times."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="relief-onnx", prog_name="relief-onnx")
def main() -> None:
    """Make trained ONNX models smaller: measure in onnxruntime what every connection contributes, and remove what does not matter.

    \b
    Example:
      relief-onnx prune model.onnx --data calib/
    """


@main.command()
@click.argument("model", type=FILE)
@bundle(DATA)
@click.option("-o", "--output", type=FILE, help="Where the result goes; default MODEL with .pruned.onnx.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option(
    "--alpha",
    type=float,
    help="Share to keep, above 0 and up to 1: of the flow (default 0.995), or by another criterion of each neuron's contribution.",
)
@click.option("--alpha-conv", type=float, help="The same, for convolutions only (default --alpha; 0.98 by other criteria than flow).")
@click.option(
    "--alpha-fc", type=float, help="The same, for fully connected layers only (default --alpha; 0.95 by other criteria than flow)."
)
@click.option(
    "--keep",
    metavar="PERCENT",
    help="Instead of alpha: keep this share of the weights, 30% for example; at channel granularity, of the MACs.",
)
@click.option("--pattern", metavar="N:M", help="Instead of alpha: of every M inputs of a neuron keep N, as 2:4 for sparse tensor cores.")
@_CRITERION
@_OUTPUT_WEIGHT
@_GRANULARITY
@click.option(
    "--alpha-channel",
    type=float,
    help="Share of importance that the channels kept carry (default --alpha; where none is given 0.98 by flow, 0.9 by other criteria).",
)
@click.option("--round-to", type=int, help="Keep a multiple of so many channels, for speed (default 8; 1 switches it off).")
@click.option(
    "--allow-state-change",
    is_flag=True,
    default=None,
    help="With channels: inputs and outputs that are states of LSTM, GRU or RNN nodes may lose hidden units; the report says which.",
)
@click.option(
    "--repair",
    type=click.Choice(["none", "least-squares", "distill", "labels"]),
    help="What happens to the weights that are left: least-squares solves for them again; distill trains them on the original's outputs, "
    "labels on the labels of the data (both need torch).",
)
@training.ROUNDS
@training.TRAINING
@click.option(
    "--mean-shift",
    type=click.Choice(["auto", "on", "off"]),
    help="Move the mean of what is removed into biases (default auto: with flow only).",
)
@click.option("--bias", type=click.Choice(["keep", "prune"]), help="Whether biases may be removed (default keep).")
@click.option("--skip-rule", type=click.Choice(["off", "branch", "both"]), help="The paper's rule for residual connections (default off).")
@click.option(
    "--silent",
    type=click.Choice(["keep", "remove"]),
    help="Units that are 0 on all samples: leave them to their scores, or always remove them (default keep).",
)
@click.option("--preset", type=click.Choice(["paper"]), help="All choices of arXiv 2109.10795 at once.")
@click.option("--skip", help="Leave alone the nodes or weights whose name matches this regular expression.")
@click.option("--only", help="Prune only the nodes or weights whose name matches this regular expression.")
@click.option("--storage", type=click.Choice(["auto", "dense"]), help="auto packs sparse weights, dense stores zeros (default auto).")
@click.option("--save-masks", type=FILE, help="Write the masks of the rule as .npz.")
@click.option("--scores", type=FILE, help="Scores from `relief-onnx score`, instead of measuring.")
@click.option("--recipe", type=FILE, help="Options from a TOML file; options given here win.")
@click.option("--work-dir", type=FILE, help="Keep probe, scores, masked and pruned model there; a stopped run goes on from its scores.")
@bundle(IMAGES, RUN, JSON)
@edge
def prune(
    model: Path, data: Path, output: Path | None, force: bool, quiet: bool, json_file: Path | None, recipe: Path | None, **values: Any
) -> None:
    """Remove the connections of MODEL that do not matter on the samples in --data.

    Writes MODEL.pruned.onnx beside MODEL, verified in onnxruntime, with the same names, inputs, outputs, metadata and opset.

    \b
    Examples:
      relief-onnx prune model.onnx --data calib/
      relief-onnx prune model.onnx --data calib/ --keep 30% -o small.onnx --json report.json
      relief-onnx prune model.onnx --data calib/ --granularity channel --alpha 0.95
    """
    from relief_onnx import pipeline
    from relief_onnx.options import read_recipe
    from relief_onnx.ranks import is_first

    from . import render

    target = output or model.with_suffix(".pruned.onnx")
    masks = values["save_masks"]
    quiet = quiet or not is_first()
    read = (model, data, recipe, values["scores"], values["rewind"])
    writable(json_file, *read, target, masks)
    writable(masks, *read, target)
    with render.progress(quiet) as progress:
        result = pipeline.prune(
            model,
            data,
            output=target,
            force=force,
            images=image_options(values),
            recipe=read_recipe(recipe) if recipe is not None else None,
            save_report=None if str(json_file) == "-" else json_file,
            progress=progress,
            **given(values),
        )
    if str(json_file) == "-" and is_first():
        write_json(json_file, result.report)
    elif not quiet:
        render.prune_report(result.report)


main.add_command(training.retrain)


@main.command()
@click.argument("model", type=FILE)
@bundle(DATA)
@click.option("-o", "--output", type=FILE, help="Where the result goes; default MODEL with .int8.onnx.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option(
    "--activations",
    type=click.Choice(["uint8", "int8", "none"]),
    help="Type of the values between layers (default uint8); none: int8 weights only, which are floats again when the model is loaded.",
)
@click.option(
    "--per-channel/--per-tensor", default=None, help="A scale for each neuron or filter, or one for each weight (default per channel)."
)
@click.option(
    "--method",
    type=click.Choice(["minmax", "entropy", "percentile"]),
    help="How onnxruntime finds the range of activations (default minmax).",
)
@click.option("--skip", help="Leave alone the nodes or weights whose name matches this regular expression.")
@click.option("--only", help="Quantise only the nodes or weights whose name matches this regular expression.")
@click.option("--storage", type=click.Choice(["auto", "dense"]), help="auto packs sparse weights, dense stores zeros (default auto).")
@click.option("--original", type=FILE, help="The model before pruning: agreement is then with it.")
@bundle(IMAGES, RUN, JSON)
@edge
def quantize(model: Path, data: Path, output: Path | None, quiet: bool, json_file: Path | None, **values: Any) -> None:
    """Store the weights of MODEL, pruned or not, as int8, and compute with 8 bits where onnxruntime can; calibrated on --data.

    Writes MODEL.int8.onnx beside MODEL, verified in onnxruntime; zeros stay zeros, and sparse weights stay packed.

    \b
    Examples:
      relief-onnx quantize model.pruned.onnx --data calib/ --original model.onnx
      relief-onnx quantize model.onnx --data calib/ --activations none
    """
    from relief_onnx.quantization import quantize as run

    from . import render

    target = output or model.with_suffix(".int8.onnx")
    writable(json_file, model, data, target, values["original"])
    with render.progress(quiet) as progress:
        result = run(
            model,
            data,
            output=target,
            images=image_options(values),
            save_report=None if str(json_file) == "-" else json_file,
            progress=progress,
            **values,
        )
    if str(json_file) == "-":
        write_json(json_file, result.report)
    elif not quiet:
        render.quantize_report(result.report)


@main.command()
@click.argument("model", type=FILE)
@bundle(DATA)
@click.option("-o", "--output", type=FILE, required=True, help="The .npz to write.")
@click.option("--force", is_flag=True, help="Overwrite OUTPUT.")
@_CRITERION
@_OUTPUT_WEIGHT
@_GRANULARITY
@bundle(IMAGES, RUN)
@edge
def score(model: Path, data: Path, output: Path, force: bool, quiet: bool, **values: Any) -> None:
    """Measure once how much every connection of MODEL contributes, for `prune --scores`.

    \b
    Example:
      relief-onnx score model.onnx --data calib/ -o scores.npz
    """
    from relief_onnx import pipeline
    from relief_onnx.model import check_target
    from relief_onnx.scoring import write_scores

    from . import render

    check_target(output, force)
    writable(output, model, data)
    with render.progress(quiet) as progress:
        found = pipeline.score(model, data, images=image_options(values), progress=progress, **given(values))
    write_scores(found, output)
    if not quiet:
        # The scores hold for this granularity only, so the command that uses them has to name it.
        granularity = f" --granularity {values['granularity']}" if values["granularity"] else ""
        click.echo(
            f"Scores of {len(found)} layers are in {output}; use them with: "
            f"relief-onnx prune {model} --data {data} --scores {output}{granularity}"
        )


@main.command()
@click.argument("model", type=FILE)
@bundle(JSON)
@edge
def inspect(model: Path, json_file: Path | None) -> None:
    """Show what can be pruned in MODEL, what is coupled, what cannot be pruned and why. Needs no data.

    \b
    Example:
      relief-onnx inspect model.onnx
    """
    from relief_onnx.overview import overview

    from . import render

    writable(json_file, model)
    document = overview(model)
    write_json(json_file, document)
    if str(json_file) != "-":
        render.overview(document)


@main.command()
@click.argument("first", metavar="A", type=FILE)
@click.argument("second", metavar="B", type=FILE)
@bundle(DATA, IMAGES, RUN, JSON)
@edge
def compare(first: Path, second: Path, data: Path, quiet: bool, json_file: Path | None, **values: Any) -> None:
    """Compare models A and B on the samples in --data: agreement, accuracy where labelled, size, MACs, latency.

    \b
    Example:
      relief-onnx compare model.onnx model.pruned.onnx --data test/
    """
    from relief_onnx.overview import comparison

    from . import render

    writable(json_file, first, second, data)
    with render.progress(quiet) as progress:
        document = comparison(first, second, data, images=image_options(values), progress=progress, **values)
    write_json(json_file, document)
    if not quiet and str(json_file) != "-":
        render.comparison(document)


@main.command("check-data")
@click.argument("model", type=FILE)
@click.argument("path", type=FILE)
@bundle(IMAGES, JSON)
@edge
def check_data(model: Path, path: Path, json_file: Path | None, **values: Any) -> None:
    """Show what the data loader sees in PATH, and whether it fits MODEL.

    \b
    Example:
      relief-onnx check-data model.onnx calib/
    """
    from relief_onnx.overview import data_overview

    from . import render

    writable(json_file, model, path)
    document = data_overview(model, path, image_options(values))
    write_json(json_file, document)
    if str(json_file) != "-":
        render.data(document)


if __name__ == "__main__":
    main()
