"""`lightcl cache`: the outputs of frozen prefixes that are stored on this machine."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import typer

from lightcl.errors import RequestError, nearest
from simulations.options import Changes, Command, Plugins, ScenarioFile, command_app, console, read_scenario

MB = 1_000_000

app = command_app()
Key = Annotated[str | None, typer.Argument(metavar="[KEY]")]


@app.callback()
def _cache() -> None:
    """List, delete and fill the cache of prefix outputs (docs/how-to/cache-and-disk.md)."""


@app.command(cls=Command)
def ls() -> None:
    """List the stores: content, number of images, size and last use."""
    from lightcl.device.prefix import prefix_cache
    from simulations.tables import print_table

    out, cache = console(), prefix_cache()
    stores = cache.stores()
    rows = []
    for store in stores:
        about = store.about
        used = datetime.fromtimestamp(store.used).strftime("%Y-%m-%d %H:%M") if store.used else "-"
        rows.append([
            store.key, str(about.get("network", "?")), str(about.get("source", "?")), _view(about),
            f"{store.rows} of {about.get('count', '?')}", str(about.get("dtype", "?")), f"{store.size / MB:.1f}", used,
        ])  # fmt: skip
    if stores:
        headings = ("key", "network", "source", "view", "outputs", "type", "MB", "last use")
        print_table(out, headings, rows, left=(0, 1, 2, 3, 5, 7), widest=40)
    size = sum(store.size for store in stores)
    noun = "store" if len(stores) == 1 else "stores"
    out.print(
        f"{cache.folder}: {len(stores)} {noun}, {size / MB:.1f} MB", highlight=False, markup=False, soft_wrap=True
    )


@app.command(cls=Command)
def clear(key: Key = None) -> None:
    """Delete one store, or all of them. Runs that need the outputs compute them again."""
    from lightcl.device.prefix import prefix_cache

    cache = prefix_cache()
    known = [store.key for store in cache.stores()]
    if key is not None and key not in known:
        raise RequestError(
            f"KEY: the cache has no store {key!r}{nearest(key, known)} (`lightcl cache ls` lists the stores)"
        )
    freed = cache.clear(key)
    console().print(f"freed {freed / MB:.1f} MB", highlight=False)


@app.command(cls=Command)
def warm(scenario: ScenarioFile, changes: Changes = None, plugins: Plugins = None) -> None:
    """Compute all prefix outputs that a scenario's devices will need: of test images and of every view."""
    from rich.progress import Progress

    from lightcl.data.sources import load_source
    from lightcl.device import prefix

    loaded = read_scenario(scenario, changes, plugins)
    out, done = console(), 0
    source = load_source(loaded.source_request())
    with Progress(console=out, disable=not out.is_terminal, transient=True) as progress:
        bar = progress.add_task("prefix outputs", total=None)
        for step in prefix.warm(loaded, source):
            progress.update(bar, completed=step.done, total=step.images)
            done = step.done
    out.print(f"cached: {done} prefix outputs", highlight=False)


def _view(about: Any) -> str:
    """`plain`, or the number, augmentation and seed of the view."""
    view = about.get("view")
    if not view:
        return "plain"
    seed, number, augmentation, _ = view
    return f"{number} ({augmentation}, seed {seed})"
