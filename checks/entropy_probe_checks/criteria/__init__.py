"""One pure function a criterion, report → Verdict, one file a family.

`CRITERIA` holds those of the acceptance suite by name, `GATES` those that ask for bounds of the user's.
"""

from __future__ import annotations

from entropy_probe_checks.criteria import (
    audit,
    gate,
    importance,
    prediction,
    registry,
    scaling,
    sequences,
    ustatistic,
    zero_check,
)
from entropy_probe_checks.criteria.verdicts import Criterion

_FAMILIES = (
    zero_check, scaling, registry, ustatistic, importance, sequences, prediction, audit
)  # fmt: skip
CRITERIA: dict[str, Criterion] = {
    item.name: item
    for family in _FAMILIES
    for item in vars(family).values()
    if isinstance(item, Criterion)
}
GATES: dict[str, Criterion] = {
    item.name: item for item in vars(gate).values() if isinstance(item, Criterion)
}
