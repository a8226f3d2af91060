"""`lightcl device serve`: an HTTP endpoint for programs on the same machine. Light at import."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from client.commands.predict import DeviceNumber, From, find


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

    torch.set_num_threads(threads)
    place = find(folder, device)
    with Follower(place) as follower, Endpoint(follower, port) as endpoint:
        sys.stdout.write(f"serving device {place.about.device} at {endpoint.url}\n")
        sys.stdout.flush()
        endpoint.serve_forever()
