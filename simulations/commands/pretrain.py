"""`lightcl pretrain`: weights for the frozen prefix."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from lightcl.errors import RequestError, nearest
from simulations.options import Command, Plugins, command_app, command_line, console, use_plugins

if TYPE_CHECKING:
    from lightcl.pretraining import EpochReport

app = command_app()


@app.command(cls=Command)
def pretrain(
    source: Annotated[str, typer.Option(help="digits, cifar10, cifar100, fashion-mnist, parquet or image-folder")],
    weights: Annotated[
        Path, typer.Option("--out", help="The .safetensors file to write; the model card is written beside it")
    ],
    path: Annotated[Path | None, typer.Option(help="The images, for parquet and image-folder")] = None,
    data_name: Annotated[str, typer.Option(help="Name of the data in the model card; default: the path's name")] = "",
    width: Annotated[int, typer.Option(min=4, help="Channels of the first layer")] = 20,
    stem: Annotated[str, typer.Option(help="cifar or imagenet")] = "cifar",
    image_size: Annotated[int | None, typer.Option(min=8, help="Resize images to N x N pixels")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images")] = 12,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Peak of the one-cycle schedule")] = 0.2,
    fp32: Annotated[
        bool, typer.Option("--fp32", help="Without bf16 autocast, which is used where the machine is faster in it")
    ] = False,
    no_flip: Annotated[bool, typer.Option("--no-flip", help="Without horizontal flips (digits, letters)")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and order")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Torch threads; default: all cores")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing weights")] = False,
    plugins: Plugins = None,
) -> None:
    """Train a network on labeled images, to be frozen as the shared prefix.

    After an interruption, the same command continues from the last epoch.
    """
    import torch

    from lightcl.data.sources import SourceRequest, load_source, source_names
    from lightcl.device.arithmetic import bf16_pays
    from lightcl.device.hardware import choose_accelerator
    from lightcl.networks.resnet import Stem
    from lightcl.pretraining import Recipe
    from lightcl.pretraining import pretrain as run

    use_plugins(plugins or [])
    _check_choice("--source", source, source_names())
    _check_choice("--stem", stem, get_args(Stem))
    if not (isfinite(learning_rate) and learning_rate > 0):
        raise RequestError(f"--learning-rate {learning_rate:g}: expected a number above 0")
    card = weights.with_suffix(".md")
    for file in (weights, card):
        _check_file(file, overwrite)
    if threads:
        torch.set_num_threads(threads)
    images = load_source(SourceRequest(source, path, image_size))
    recipe = Recipe(
        width=width, stem=cast(Stem, stem), epochs=epochs, batch_size=batch_size, peak_learning_rate=learning_rate,
        bf16=not fp32 and bf16_pays(choose_accelerator("auto")) == "yes", flip=not no_flip, seed=seed,
    )  # fmt: skip
    name = data_name or (path.name if path else source)
    accuracy = run(images, recipe, weights, data=name, command=command_line(), report=_print_epoch)
    console().print(f"top-1 {accuracy:.2%}; weights: {weights}; card: {card}", highlight=False, markup=False)


def _check_choice(option: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise RequestError(f"{option} {given!r}: unknown{nearest(given, allowed)} (allowed: {', '.join(allowed)})")


def _check_file(file: Path, overwrite: bool) -> None:
    if file.is_dir():
        raise RequestError(f"--out: {file} is a folder")
    if file.exists() and not overwrite:
        raise RequestError(f"--out: {file} exists; replace it with --overwrite")


def _print_epoch(epoch: EpochReport) -> None:
    left = epoch.seconds * (epoch.epochs - epoch.epoch) / 60
    console().print(
        f"epoch {epoch.epoch}/{epoch.epochs}: loss {epoch.loss:.3f}, top-1 {epoch.accuracy:.1%}, "
        f"{epoch.seconds:.0f} s, about {left:.0f} min left",
        highlight=False,
    )
