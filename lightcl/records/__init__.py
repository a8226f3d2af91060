"""The record of a run: its folder, its typed rows, and `load_run`, which reads them back."""

from lightcl.records.reading import DeviceHistory, Run, load_run
from lightcl.records.rows import DeviceRow, Failure, Figures, Results, RoundRow

__all__ = ["DeviceHistory", "DeviceRow", "Failure", "Figures", "Results", "RoundRow", "Run", "load_run"]
