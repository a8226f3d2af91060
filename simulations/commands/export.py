"""`lightcl export`: a trained model as one file for other runtimes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lightcl.errors import RequestError
from simulations.options import Command, Plugins, RunPath, command_app, console, use_plugins

app = command_app()


@app.command(cls=Command)
def export(
    run: RunPath,
    file_format: Annotated[
        str, typer.Option("--format", metavar="NAME", help="onnx, torchscript, safetensors or executorch")
    ],
    device: Annotated[
        int | None, typer.Option("--device", min=0, help="Number of the device; default: 0, or a board's own")
    ] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: <folder's name>-device-<N>, in this folder")
    ] = None,
    images: Annotated[
        int, typer.Option("--images", min=1, max=1_000_000, help="Real images on which the file is compared")
    ] = 1000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file")] = False,
    plugins: Plugins = None,
) -> None:
    """Export a device's newest model: network, head, preprocessing and label names in one file.

    The file is compared with PyTorch on real images of the run, and not kept if it answers otherwise. RUN may also be
    the state folder of a board.
    """
    from lightcl.data.sources import load_source
    from lightcl.export.checked import export as write
    from lightcl.export.checked import real_images
    from lightcl.export.folders import find_model
    from lightcl.export.formats import find_format
    from lightcl.export.model import read_model
    from lightcl.storage.state import StateError

    use_plugins(plugins or [])
    kind = find_format(file_format)
    about, folder = find_model(run, device)
    file = out_file or Path(f"{run.absolute().name}-device-{about.device}{kind.suffix}")
    if file.is_dir() or (file.exists() and not overwrite):
        what = "is a folder; name a file" if file.is_dir() else "exists; replace it with --overwrite"
        raise RequestError(f"--out: {file} {what}")
    try:
        model = read_model(about, folder)
    except StateError as error:  # no run was started, so none has failed
        raise RequestError(str(error)) from error
    scenario = about.scenario
    compared = write(
        model, file_format, file, real_images(load_source(scenario.source_request()), images, scenario.seed)
    )
    size = file.stat().st_size / 1e6
    lines = (
        f"{os.path.relpath(file)}: device {about.device}, {model.label}, {len(about.classes)} classes, {size:.1f} MB",
        f"compared with PyTorch on {compared.images} images: largest difference of a score {compared.largest:.1e}, "
        f"same prediction on {compared.same / compared.images:.1%}",
    )
    for line in lines:
        console().print(line, highlight=False, markup=False, soft_wrap=True)
