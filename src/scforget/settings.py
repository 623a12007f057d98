"""The base of every settings class: strict, frozen, nothing unknown, nothing missing."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Settings as they stand in ``params.yaml``; subclasses give no defaults, so that DVC sees every value."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=True)
