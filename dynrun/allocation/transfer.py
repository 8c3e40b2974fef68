"""A known scheme for a model, nothing probed: its types as they stand, or others by its slopes at the model's errors.

Takes a scheme that names the model's tensors; decides which of the two it is, and computes what the second needs.
Measures no divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from dynrun.allocation.constraints import Constraints, check_patterns
from dynrun.artifacts import StageFolder, run_stage, stage_folder, write_json
from dynrun.calibration.imatrix import read_imatrix
from dynrun.calibration.stage import ImatrixStage
from dynrun.config import Config
from dynrun.errors import DoesNotFitError, UsageError
from dynrun.gguf.quantizable import candidate_types, quantizable
from dynrun.gguf.tensor_types import DEFAULT_MENU
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.build import installation
from dynrun.models import Reference
from dynrun.scheme import Scheme
from dynrun.scheme_types import Slopes
from dynrun.sensitivity.errors import Quantizer
from dynrun.sensitivity.slopes import Slope
from dynrun.sensitivity.stage import (
    TABLE_FILE,
    ProbeSettings,
    SensitivityStage,
    TensorSensitivity,
    all_errors,
    read_table,
    spread_of_most,
)

_ERRORS_FILE = "errors.jsonl"
_REVISION = 1


def follows(
    reference: Reference, imatrix: ImatrixStage, scheme: Scheme, menu: tuple[str, ...], constraints: Constraints
) -> bool:
    """Whether the scheme's types are of the menu and obey the rules. The default menu is no wish: a scheme of another
    one obeys it too. A wanted speed is never obeyed, as no scheme knows its own. Raises UsageError for a rule that
    matches no tensor.
    """
    tensors = quantizable(reference.header)
    check_patterns(constraints.rules, tensors)
    if constraints.min_speed is not None:
        return False
    entries = read_imatrix(imatrix.path).sums if menu != DEFAULT_MENU else {}
    for name, type_name in scheme.types.items():
        rules = [rule for rule in constraints.rules if rule.matches(name)]
        if not all(rule.admits(type_name) for rule in rules):
            return False
        if menu == DEFAULT_MENU or any(rule.kind == "pin" for rule in rules):
            continue
        if type_name not in candidate_types(tensors[name], menu, entries, reference.header.metadata):
            return False
    return True


def stands(scheme: Scheme, reference: Reference, size_bytes: int, limit: int | None, *, obeys: bool) -> bool:
    """Whether ``scheme`` is applied as it is, its types unchanged, rather than solved again by its slopes.

    It is where it has no slopes, and where it was made of this very model and still is the best one known: for every
    budget between the size of its file and the budget it was made for. ``size_bytes``: of its file; ``limit``: the
    wanted budget, None where none is; ``obeys``: :func:`follows`. Raises DoesNotFitError or UsageError where it has no
    slopes and is too large, or does not obey.
    """
    if scheme.slopes:
        best = limit is None or size_bytes <= limit <= max(size_bytes, scheme.budget_bytes)
        return scheme.source_sha256 == reference.sha256 and obeys and best
    if limit is not None and size_bytes > limit:
        raise DoesNotFitError(
            f"the scheme's file has {size_bytes:,} bytes, more than the {limit:,} that are wanted, and it has no slopes"
            " to choose other types by",
            fix="leave the size out, or take a scheme as `dynrun make` writes it",
        )
    if not obeys:
        raise UsageError(
            "the scheme does not do what --types, --pin, --min, --max or --min-speed ask for, and it has no slopes to"
            " choose other types by",
            fix="change its types by hand, leave these options out, or take a scheme as `dynrun make` writes it",
        )
    return True


def with_slopes(table: Mapping[str, TensorSensitivity], slopes: Slopes) -> dict[str, TensorSensitivity]:
    """``table`` with other ``slopes``: each tensor's price becomes its slope at its own error, times that error."""
    return {name: replace(row, slope=Slope(slopes[name]) if name in slopes else None) for name, row in table.items()}


def errors_folder(
    reference: Reference, imatrix: ImatrixStage, menu: tuple[str, ...], settings: ProbeSettings
) -> StageFolder:
    """Where the errors of these weights lie, computed or not."""
    inputs = {
        "reference": reference.sha256,
        "imatrix": imatrix.sha256,
        "menu": list(menu),
        "n_rows": settings.n_rows,
        "revision": _REVISION,
        "llama_cpp": installation().commit,
    }
    return stage_folder("errors", inputs)


def transferred(
    reference: Reference,
    imatrix: ImatrixStage,
    slopes: Slopes,
    menu: tuple[str, ...],
    settings: ProbeSettings,
    *,
    config: Config,
    on_error: Callable[[int, int], None],
) -> SensitivityStage:
    """The sensitivity table of a model of the shape that ``slopes`` were measured on: the errors are its own, computed
    for every type of the menu, or found. Interrupted, it goes on."""

    def work(folder: StageFolder) -> Mapping[str, Any]:
        entries = read_imatrix(imatrix.path)
        quantizer = Quantizer(WeightFile(reference.path), entries, config.n_threads)
        found = all_errors(reference, quantizer, entries, settings, menu, folder / _ERRORS_FILE, on_error)
        write_json(folder / TABLE_FILE, {name: {"slope": None, **asdict(errors)} for name, errors in found.items()})
        return {"error_spread": spread_of_most(found)}

    folder = errors_folder(reference, imatrix, menu, settings)
    outcome = run_stage(folder, work)
    path = folder / TABLE_FILE
    tensors = with_slopes(read_table(path), slopes)
    return SensitivityStage(tensors, path, 0.0, 0, 0.0, 0.0, outcome.result["error_spread"], outcome)
