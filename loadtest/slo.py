"""Thresholds of a test: a YAML file, checked against the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loadtest.problems import BadSetup, read_yaml


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Latency(_Section):
    """Most milliseconds."""

    mean: float | None = Field(default=None, gt=0)
    p50: float | None = Field(default=None, gt=0)
    p90: float | None = Field(default=None, gt=0)
    p95: float | None = Field(default=None, gt=0)
    p99: float | None = Field(default=None, gt=0)
    max: float | None = Field(default=None, gt=0)


class Range(_Section):
    """Least and most; one of them at least."""

    min: float | None = Field(default=None, ge=0)
    max: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        return self


class Objectives(_Section):
    """Thresholds by the names of the result."""

    ttft_ms: Latency | None = None
    tpot_ms: Latency | None = None
    e2e_ms: Latency | None = None
    queue_ms: Latency | None = None
    completed: Range | None = None
    failed: Range | None = None
    rejected: Range | None = None
    unfinished: Range | None = None
    failure_ratio: Range | None = None
    rejection_ratio: Range | None = None
    completed_per_second: Range | None = None
    output_tokens_per_second: Range | None = None
    replay_match_ratio: Range | None = None


class Slo(Objectives):
    """Thresholds over all tenants, and of single ones."""

    tenants: dict[str, Objectives] = {}


@dataclasses.dataclass(frozen=True)
class Check:
    """One threshold and what was measured. `actual` None: there was nothing to measure."""

    tenant: str | None
    metric: str
    kind: str
    limit: float
    actual: float | None

    @property
    def passed(self) -> bool:
        """Whether it was kept. A threshold of something that never happened is missed."""
        if self.actual is None:
            return False
        return self.actual >= self.limit if self.kind == "min" else self.actual <= self.limit

    def __str__(self) -> str:
        who = f"tenant {self.tenant}" if self.tenant else "all tenants"
        actual = "nothing was measured" if self.actual is None else f"{self.actual:.6g}"
        bound = "at least" if self.kind == "min" else "at most"
        outcome = "kept" if self.passed else "MISSED"
        return f"{outcome}: {self.metric} of {who}: {actual}, {bound} {self.limit:g}"


def load(path: Path, tenants: Collection[str]) -> Slo:
    """Read thresholds. Raises `BadSetup`, also for a tenant that does not take part."""
    slo = read_yaml(path, "SLO file", Slo)
    unknown = sorted(set(slo.tenants) - set(tenants))
    if unknown:
        raise BadSetup(
            f"SLO file {path}: no tenant {', '.join(unknown)} in this test, only "
            f"{', '.join(sorted(tenants))}"
        )
    checks = list(_checks(slo, {"all": {}, "tenants": {}}))
    if not checks:
        raise BadSetup(f"SLO file {path} has no threshold; an example is ttft_ms: {{p95: 500}}")
    return slo


def evaluate(slo: Slo, result: Mapping[str, Any]) -> list[Check]:
    """Every threshold against a result."""
    return list(_checks(slo, result))


def _checks(slo: Slo, result: Mapping[str, Any]) -> Iterator[Check]:
    yield from _section(slo, None, result["all"])
    for name, objectives in slo.tenants.items():
        yield from _section(objectives, name, result["tenants"].get(name, {}))


def _section(
    objectives: Objectives, tenant: str | None, found: Mapping[str, Any]
) -> Iterator[Check]:
    for metric in Objectives.model_fields:
        wanted = getattr(objectives, metric)
        if wanted is None:
            continue
        for key, limit in wanted.model_dump(exclude_none=True).items():
            actual = found.get(metric)
            if isinstance(wanted, Latency):
                actual = None if actual is None else actual[key]
                yield Check(tenant, f"{metric} {key}", "max", limit, actual)
            else:
                yield Check(tenant, metric, key, limit, actual)
