"""The sensitivity table as error-feedback rounding makes it: each type's error times what feedback leaves of it.

Slopes stay as they were measured with plain rounding. There δ is hardly correlated between columns, so that the
weighted error Σ h·δ² is the output's error δᵀHδ; feedback makes the second smaller and the first larger, and the KLD
follows the second (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dynrun.rounding.gains import gains
from dynrun.rounding.store import Feedback
from dynrun.sensitivity.stage import SensitivityStage


def with_feedback(
    table: SensitivityStage, feedback: Feedback, on_tensor: Callable[[int, int], None]
) -> SensitivityStage:
    """``table`` with errors after feedback; ratios that were measured before are found again."""
    ratios = gains(feedback, {name: list(row.errors) for name, row in table.tensors.items()}, on_tensor)
    tensors = {
        name: replace(row, errors={t: error * ratios[name][t] for t, error in row.errors.items()})
        for name, row in table.tensors.items()
    }
    return replace(table, tensors=tensors)
