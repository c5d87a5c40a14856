"""The command `retrain`, and the options that it shares with `prune`. Nothing but click is imported at start-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .shared import DATA, FILE, IMAGES, JSON, RUN, bundle, edge, given, image_options, writable, write_json

__all__ = ["ROUNDS", "TRAINING", "retrain"]

TRAINING = bundle(
    click.option("--epochs", type=int, help="Retraining: passes over the samples (default 10)."),
    click.option("--batch", type=int, help="Retraining: samples per step (default 64)."),
    click.option("--learning-rate", type=float, help="Retraining: the largest learning rate (default 0.001 for adam, 0.01 for sgd)."),
    click.option("--optimizer", type=click.Choice(["adam", "sgd"]), help="Retraining: the optimiser (default adam)."),
    click.option("--momentum", type=float, help="Retraining: momentum of sgd (default 0.9)."),
    click.option("--weight-decay", type=float, help="Retraining: weight decay (default 0)."),
    click.option("--schedule", type=click.Choice(["cosine", "step", "constant"]), help="Retraining: the learning rate over time."),
    click.option("--milestones", metavar="SHARES", help="With --schedule step: x 0.1 at these shares of the epochs (default 0.5)."),
    click.option("--warmup", type=float, help="Retraining: epochs in which the learning rate rises from 0 (default 0)."),
    click.option("--clip", type=float, help="Retraining: largest norm of the gradients (default: no bound)."),
    click.option(
        "--loss", multiple=True, metavar="[OUTPUT=]KIND", help="Loss against the original's output: kl, bce, mse, cosine, none, auto."
    ),
    click.option("--label-weight", type=float, help="What labels count for beside the original's outputs, 0 to 1."),
    click.option("--validation", type=float, help="Share of the samples that is set aside to judge by (default 0.1)."),
    click.option("--patience", type=int, help="Stop after so many epochs without a better validation loss."),
    click.option("--augment", metavar="LIST", help="Change images at random while training: flip, crop, or flip,crop."),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to train (default cpu)."),
    click.option("--precision", type=click.Choice(["full", "mixed"]), help="mixed: bfloat16 where torch finds it safe, on a GPU only."),
    click.option(
        "--recalibrate",
        type=click.Choice(["auto", "on", "off"]),
        help="Measure statistics of BatchNormalization again (default auto: before retraining).",
    ),
    click.option("--checkpoint", type=float, help="Seconds between two notes of where training stands in --work-dir (default 60)."),
)
ROUNDS = bundle(
    click.option("--iterations", type=int, help="Rounds of score, mask and retraining (default 1)."),
    click.option("--rewind", type=FILE, help="A model file whose weights every round of retraining starts from."),
    click.option("--max-drop", metavar="POINTS", help="Stop when validation accuracy or agreement falls by more; keep the round before."),
)


@click.command()
@click.argument("model", type=FILE)
@DATA
@click.option("-o", "--output", type=FILE, help="Where the result goes; default MODEL with .retrained.onnx.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option("--teacher", type=FILE, help="The model before pruning, whose outputs are the aim; without it labels are.")
@click.option("--storage", type=click.Choice(["auto", "dense"]), help="auto packs sparse weights, dense stores zeros (default auto).")
@click.option("--recipe", type=FILE, help="Options from a TOML file; options given here win.")
@click.option("--work-dir", type=FILE, help="Note there how far training is; a stopped run goes on from it.")
@TRAINING
@bundle(IMAGES, RUN, JSON)
@edge
def retrain(model: Path, data: Path, output: Path | None, recipe: Path | None, quiet: bool, json_file: Path | None, **values: Any) -> None:
    """Train the weights of MODEL again on the samples in --data; weights that are 0 stay 0. Needs torch.

    The aim is what --teacher emits, so no labels are needed; without it the labels of the data.

    \b
    Examples:
      relief-onnx retrain model.pruned.onnx --teacher model.onnx --data train/
      relief-onnx retrain model.pruned.onnx --data labelled/ --epochs 20 --optimizer sgd
    """
    from relief_onnx.options import read_recipe
    from relief_onnx.ranks import is_first
    from relief_onnx.retraining import retrain as run

    from . import render

    target = output or model.with_suffix(".retrained.onnx")
    quiet = quiet or not is_first()
    writable(json_file, model, data, recipe, target, values["teacher"])
    with render.progress(quiet) as progress:
        result = run(
            model,
            data,
            output=target,
            images=image_options(values),
            recipe=read_recipe(recipe) if recipe is not None else None,
            save_report=None if str(json_file) == "-" else json_file,
            progress=progress,
            **given(values),
        )
    if str(json_file) == "-" and is_first():
        write_json(json_file, result.report)
    elif not quiet:
        render.retrain_report(result.report)
