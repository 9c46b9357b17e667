"""A verdict: which backend runs a class of calls on a machine, and the measurements behind that."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

BACKENDS = ("reference", "native", "cublas", "eight_bit", "varlen", "xformers", "padded", "triton")


class Verdict(BaseModel):
    """The result of testing one class of calls. Only `backend` and `configs` decide what runs.

    configs: kernel -> launch configuration. error, reference_error: ||found - exact|| / ||exact|| against float64, the
    largest over the outputs. ms, reference_ms: medians; spread_ms: the larger of their interquartile ranges. found: the
    date; by: "first use" (only shipped configurations) or "tune" (all listed ones). refused: candidate -> why.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True)

    backend: str
    configs: dict[str, dict[str, int]] = Field(default_factory=dict)
    op: str = ""
    error: float | None = None
    reference_error: float | None = None
    ms: float | None = None
    reference_ms: float | None = None
    spread_ms: float | None = None
    found: str = ""
    by: str = ""
    refused: dict[str, str] = Field(default_factory=dict)

    def __str__(self) -> str:
        form, errors, times, when = self.columns()
        found = [form, errors and f"error {errors}", times and f"{times} ms", when, *self._refusals()]
        return ", ".join(filter(None, found))

    def columns(self) -> tuple[str, str, str, str]:
        """(backend, error and the reference's, milliseconds and the reference's, when and by what it was found)."""
        settings = (f"{name}={value}" for config in self.configs.values() for name, value in config.items())
        errors = "" if self.error is None else f"{self.error:.1e} (reference {self.reference_error or 0:.1e})"
        times = "" if self.ms is None else f"{self.ms:.3g} (reference {self.reference_ms or 0:.3g})"
        return " ".join((self.backend, *settings)), errors, times, " ".join(filter(None, (self.found, self.by)))

    def _refusals(self) -> list[str]:
        """Why the other backends were rejected, one configuration each."""
        return [f"not {name}: {why}" for name, why in self.refused.items() if " " not in name]

    def model_post_init(self, _: Any) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}: choose one of {', '.join(BACKENDS)}")
