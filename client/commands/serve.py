"""`lightcl device serve`: an HTTP endpoint for programs on the same machine. Light at import."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from client.commands.predict import DeviceNumber, From
from client.commands.shared import state_folder


def serve(
    folder: From = None,
    device: DeviceNumber = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one, which is printed")] = 8090,
    threads: Annotated[int, typer.Option("--threads", min=1, max=256, help="Threads that compute the answers")] = 1,
) -> None:
    """Answer HTTP requests on 127.0.0.1 with the newest finished model of a device, while training goes on.

    POST /predict with an image file as the body: class, score and model version, as JSON. GET /health: the version that
    answers at present.
    """
    import torch

    from client.endpoint import Endpoint, Follower
    from lightcl.export.folders import find_model

    torch.set_num_threads(threads)
    place = state_folder(folder)
    if (place / "run.json").exists():  # one run, so its model stays at one place, which takes a while to find
        found = find_model(place, device)
        follower = Follower(lambda: found)
    else:
        follower = Follower(lambda: find_model(place, device))
    with follower, Endpoint(follower, port) as endpoint:
        sys.stdout.write(f"serving {place} at {endpoint.url}\n")
        if follower.model is None:
            sys.stdout.write(f"no model yet ({follower.problem}); waiting for the first one\n")
        sys.stdout.flush()
        endpoint.serve_forever()
