"""Base class of all sections of a scenario: typed, strict, frozen, without unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    # strict: neither true nor '2' nor 2.0 is the integer 2 (an integer is accepted as a float).
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
