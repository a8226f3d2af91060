"""The report of a run: one self-contained HTML page, its figures as PNG files, and devices.csv.

It reads only the run folder (lightcl/records), so it can be built while a run is in progress or after it was killed.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2

from lightcl.metrics import FEW_TEST_IMAGES
from lightcl.records import load_run
from lightcl.records.folder import RunFolder
from lightcl.storage.files import write_atomically
from simulations.options import number_ranges
from simulations.reports import plots
from simulations.reports.devices import Column, columns_of, devices_csv, named_devices
from simulations.reports.figures import ReportedRun, reported
from simulations.reports.pictures import Picture, drawings_of, paint
from simulations.reports.wording import duration, energy, percent, points, signed_points, size

DISTRIBUTIONS_FROM = 51
"""With this many devices or more, the page shows distributions and names the worst, median and best device."""
MOST_STATIC_ROWS = 200
"""With more devices than this, the page's script renders a part of the table at a time."""
MOST_REASONS = 50
DEVICES_CSV = "devices.csv"


def build_report(folder: RunFolder) -> Path:
    """Writes `plots/*.png`, `devices.csv` and `report.html` into the run folder; returns the page.

    A run in progress, or one that was killed, is reported up to its last finished round. Raises RequestError where the
    folder holds no readable run.
    """
    run = reported(load_run(folder.path))
    large = len(run.run.histories) >= DISTRIBUTIONS_FROM
    pictures = paint(drawings_of(run, distributions=large))
    target = folder.path / "plots"
    target.mkdir(exist_ok=True)
    for picture in pictures:
        (target / f"{picture.name}.png").write_bytes(picture.light)
    columns = columns_of(run)
    write_atomically(folder.path / DEVICES_CSV, devices_csv(columns, run.run.histories))
    page = folder.path / "report.html"
    write_atomically(page, _render(run, pictures, columns, large=large))
    return page


def page_environment() -> jinja2.Environment:
    """Jinja over `templates/`, with the filters that all pages share."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        # Device names and reasons come from other machines.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "duration": duration,
        "size": size,
        "energy": energy,
        "signed": signed_points,
        "ranges": number_ranges,
        "base64": lambda data: base64.b64encode(data).decode("ascii"),
    }
    environment.globals |= {"percent": percent, "points": points, "energy": energy}
    return environment


def _render(run: ReportedRun, pictures: Sequence[Picture], columns: Sequence[Column], *, large: bool) -> str:
    devices = run.run.histories
    static = len(devices) <= MOST_STATIC_ROWS
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            reported=run,
            run=run.run,
            summary=run.summary,
            pictures={picture.name: picture for picture in pictures},
            columns=columns,
            named_devices=named_devices(run) if large else [],
            static_rows=devices if static else [],
            data_rows=None if static else [[column.rounded(d) for column in columns] for d in devices],
            devices_csv=DEVICES_CSV,
            few_test_images=FEW_TEST_IMAGES,
            most_reasons=MOST_REASONS,
            light=plots.LIGHT,
            dark=plots.DARK,
        )
    )
