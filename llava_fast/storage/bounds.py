"""Upper bounds for values in JSON files: far above any published model, and low enough that reading a config never
exhausts memory or time before the weights are checked."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Size = Annotated[int, Field(ge=1, le=2**20)]
Layers = Annotated[int, Field(ge=1, le=1024)]
Pixels = Annotated[int, Field(ge=1, le=2**14)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
