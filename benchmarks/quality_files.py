"""The files of benchmarks/quality.py: each method's types and rounding, and the file that they make.

Takes what all cells share and a budget, gives a GGUF; measures no divergence but what the product's own choice does.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from quality_bench import Bench, Method, Narrator, log
from quality_methods import least_squares_types, random_types
from quality_rows import NO_FEEDBACK, OURS, OURS_PLAIN, STOCK, STOCK_FEEDBACK
from quality_summary import RANDOM, WMSE_ROW

from dynrun import __version__
from dynrun.allocation.stage import Budget
from dynrun.choose import choose_scheme
from dynrun.errors import DoesNotFitError
from dynrun.gguf.layout import tensor_bytes
from dynrun.gguf.quantizable import quantizable
from dynrun.llamacpp.build import installation
from dynrun.quantize import Preset, Quantized, make_from_scheme, make_stock, scheme_bytes
from dynrun.rounding.store import Feedback
from dynrun.scheme import Scheme, read_scheme, write_scheme
from dynrun.target import Target

_FLOOR = 0.995


@dataclass(frozen=True)
class MadeFile:
    """A file, the KLD that is predicted for it, the seconds it took to choose its types and make it, and those of them
    in which it was made with feedback (None without)."""

    file: Quantized
    predicted_kld: float | None
    seconds: float
    rounded_s: float | None


def file_of(bench: Bench, budget: Budget, preset: Preset, method: Method) -> MadeFile:
    """The file of a method. Raises DoesNotFitError where it would be larger than it may be."""
    n_threads, quiet = bench.settings.config.n_threads, lambda *_: None
    started = time.monotonic()
    if method[0] == STOCK:
        stock = make_stock(bench.reference, preset, bench.imatrix, n_threads=n_threads, on_tensor=quiet)
        return MadeFile(stock, None, time.monotonic() - started, None)
    scheme = scheme_of(bench, budget, preset, method)
    _check_size(bench, scheme, preset, method)
    write_scheme(scheme, bench.scheme_path(budget.label, method))
    feedback = bench.feedback if scheme.feedback else None
    begun = time.monotonic()
    made = make_from_scheme(
        bench.reference, scheme, bench.imatrix, n_threads=n_threads, on_tensor=quiet, feedback=feedback
    )
    ended = time.monotonic()
    # What is known before the text at hand is touched: measured on the probe split where the search did so.
    predicted = scheme.predicted_kld if scheme.measured_kld is None else scheme.measured_kld
    return MadeFile(made, predicted, ended - started, ended - begun if feedback else None)


def _check_size(bench: Bench, scheme: Scheme, preset: Preset, method: Method) -> None:
    """At most the stock preset's bytes, but for its own types with our metadata."""
    if method[0] == STOCK_FEEDBACK:
        return
    size = scheme_bytes(bench.reference, scheme, bench.imatrix)
    if size > preset.size_bytes:
        raise DoesNotFitError(f"{method[0]} would have {size:,} bytes, {preset.ftype} has {preset.size_bytes:,}")
    if size < _FLOOR * preset.size_bytes:
        log(f"  mind: {size:,} bytes, less than {_FLOOR:.1%} of {preset.ftype}'s {preset.size_bytes:,}")


def scheme_of(bench: Bench, budget: Budget, preset: Preset, method: Method) -> Scheme:
    """The types of a method, and how they are rounded."""
    name = method[0]
    if name == OURS:
        return ours(bench, budget)
    if name == OURS_PLAIN:
        return ours_plain(bench, budget)
    if name == NO_FEEDBACK:
        return chosen(bench, budget, None)
    if name == STOCK_FEEDBACK:
        types = {tensor: preset.types[tensor] for tensor in quantizable(bench.reference.header)}
        return replace(_headed(bench, budget, types), feedback=bench.feedback.text)
    return control(bench, budget, method)


def chosen(bench: Bench, budget: Budget, feedback: Feedback | None) -> Scheme:
    """The scheme of `dynrun make` for a label; without ``feedback``, of `dynrun make --no-feedback`."""
    settings = bench.settings if feedback else replace(bench.settings, feedback=None)
    target = Target(quant=budget.label)
    inputs = (bench.reference, bench.imatrix, bench.texts, target, settings, Narrator(), log)
    return choose_scheme(*inputs, feedback=feedback).scheme


def ours(bench: Bench, budget: Budget) -> Scheme:
    """The scheme of `dynrun make` for a label, or the one of that name in --schemes."""
    if bench.schemes is None:
        return chosen(bench, budget, bench.feedback)
    path = bench.schemes / f"{bench.reference.name}-{budget.label}.scheme.toml"
    found = read_scheme(path, quantizable(bench.reference.header))
    # The imatrix and the covariance are this benchmark's, the same for all methods.
    return replace(
        found,
        calibration=bench.imatrix.dataset,
        imatrix_sha256=bench.imatrix.sha256,
        feedback=bench.feedback.text if found.feedback else "",
    )


def ours_plain(bench: Bench, budget: Budget) -> Scheme:
    """The types of the file of ``ours`` that was measured, or of one that would be, for plain rounding."""
    path = bench.scheme_path(budget.label, (OURS, None))
    # A file without rows beside it may be of other settings, or from before there was feedback.
    if path.is_file() and bench.has_rows(budget.label, (OURS, None)):
        found = read_scheme(path, quantizable(bench.reference.header))
    else:
        found = ours(bench, budget)
        write_scheme(found, path)
    # What was predicted and measured of it is with feedback.
    return replace(found, feedback="", feedback_except="", predicted_kld=None, measured_kld=None)


def control(bench: Bench, budget: Budget, method: Method) -> Scheme:
    """The scheme of a method that knows nothing of the divergence."""
    name, seed = method
    spare = budget.size_bytes - budget.fixed_bytes
    if name == RANDOM:
        elements = {tensor: info.n_elements for tensor, info in quantizable(bench.reference.header).items()}
        floor = math.ceil(_FLOOR * budget.size_bytes) - budget.fixed_bytes
        types = random_types(bench.sizes, elements, spare, floor, seed or 0)
    else:
        types = least_squares_types(bench.sizes, bench.errors, spare, by_row=name == WMSE_ROW)
    return _headed(bench, budget, {tensor: types[tensor] for tensor in bench.sizes})


def _headed(bench: Bench, budget: Budget, types: dict[str, str]) -> Scheme:
    tensors = bench.reference.header.tensors
    return Scheme(
        types=types,
        label=budget.label,
        architecture=bench.reference.header.architecture,
        source=bench.reference.name,
        source_sha256=bench.reference.sha256,
        budget_bytes=budget.size_bytes,
        size_bytes=budget.fixed_bytes + sum(tensor_bytes(tensors[name], one) for name, one in types.items()),
        calibration=bench.imatrix.dataset,
        imatrix_sha256=bench.imatrix.sha256,
        llama_cpp_commit=installation().commit,
        dynrun=__version__,
    )
