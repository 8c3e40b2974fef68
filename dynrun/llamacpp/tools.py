"""A function for each of llama.cpp's programs: typed arguments in, parsed output out.

An exit code alone proves nothing here (llama-perplexity ends with 0 even where its base file is missing): every
function looks for what the program must have said or written, and raises ToolError where it is not there.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrun.artifacts import translated_os_errors
from dynrun.errors import MALFORMED, DoesNotFitError, DynrunError
from dynrun.llamacpp.build import installation
from dynrun.llamacpp.process import Completed, ToolError, new_log, scrubbed_environment, stream
from dynrun.paths import cache_dir

# On a disk with less free a large write has just failed.
_NO_ROOM = 1 << 20
# How often llama-completion's answer may be lost.
_TRIES = 6
_NUMBER = r"([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf))"


def _run(
    name: str,
    arguments: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    cancel: threading.Event | None = None,
    writes: Path | None = None,
) -> Completed:
    """``writes``: the folder that the program writes a file into."""
    argv = (installation().program(name), *arguments)
    # Away from the user's llama.cpp/config.ini, which sets any option that is not given (common/arg.cpp).
    environment = scrubbed_environment({"XDG_CONFIG_HOME": str(cache_dir() / "no-config")})
    told = on_line or (lambda _: None)
    done = stream(argv, told, log=new_log(name), env=environment, cwd=cwd, check=False, cancel=cancel)
    text = done.stdout[-4000:] + "\n".join(done.stderr_tail)
    if _disk_was_full(text, writes):
        raise DoesNotFitError(f"the disk became full while {name} was writing", fix="free some space", log=done.log)
    if done.exit_code:
        raise _failed(done, text)
    return done


def _disk_was_full(text: str, folder: Path | None) -> bool:
    """Whether that is why a program wrote ``text``; C++'s streams give no reason, but the disk is full still."""
    if "No space left on device" in text:
        return True
    return folder is not None and "iostream error" in text and shutil.disk_usage(folder).free < _NO_ROOM


def _failed(done: Completed, text: str) -> ToolError:
    reasons = [
        line.strip() for line in text.splitlines() if re.search(r"error|fail|assert|requires|invalid", line, re.I)
    ]
    name = Path(done.argv[0]).name
    return ToolError(f"{name} failed: {(reasons or ['it gave no reason'])[0][:300]}", done, fix="see its log")


def _unproven(done: Completed, what: str) -> ToolError:
    return ToolError(f"{Path(done.argv[0]).name} ended but {what}", done, fix="see its log")


# -- llama-quantize ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizePlan:
    """What a dry run says: the type of every tensor, by name."""

    types: Mapping[str, str]


_TENSOR_LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\S+), size = .*?MiB(?: -> .*?MiB \((\S+)\))?")


def quantize_dry_run(model: Path, ftype: str, *, imatrix: Path | None) -> QuantizePlan:
    """The tensor types of stock preset ``ftype`` for ``model``; they depend on whether there is an imatrix."""
    arguments: list[str | Path] = ["--dry-run", "--allow-requantize"]
    if imatrix is not None:
        arguments += ["--imatrix", imatrix]
    done = _run("llama-quantize", [*arguments, model, ftype])
    types = {}
    # Log lines of several origins are mixed on one line for a tensor that falls back: parse the joined text.
    for match in _TENSOR_LINE.finditer(_both(done)):
        types[match[1]] = _type_name(match[3] or match[2])
    if not types:
        raise _unproven(done, "listed no tensor")
    return QuantizePlan(types)


def _both(done: Completed) -> str:
    """All that a program printed, on either output."""
    text = done.log.read_text(encoding="utf-8", errors="replace") if done.log is not None else ""
    return text or done.stdout


def _type_name(text: str) -> str:
    """ggml's own spelling (``q4_K``, ``iq3_xxs``) as ours (``Q4_K``, ``IQ3_XXS``)."""
    return text.upper()


def quantize(
    model: Path,
    out: str,
    ftype: str,
    *,
    folder: Path,
    n_threads: int,
    imatrix: str | None = None,
    tensor_type_file: str | None = None,
    strings: Mapping[str, str] | None = None,
    on_tensor: Callable[[int, int], None] = lambda _d, _t: None,
) -> Completed:
    """Quantize ``model`` to ``folder/out``; ``imatrix`` and ``tensor_type_file`` are names in ``folder`` too.

    llama-quantize writes the imatrix's path into the file, so it must be relative for the bytes to be the same
    everywhere. ``strings`` are metadata entries to set, at most 127 bytes each.
    """
    arguments: list[str | Path] = []
    if imatrix is not None:
        arguments += ["--imatrix", imatrix]
    if tensor_type_file is not None:
        arguments += ["--tensor-type-file", tensor_type_file]
    for key, value in (strings or {}).items():
        if len(value.encode()) > 127:
            raise ValueError(f"{key} is longer than the 127 bytes that llama-quantize takes")
        arguments += ["--override-kv", f"{key}=str:{value}"]

    def watch(line: str) -> None:
        if match := re.match(r"\[ *(\d+)/ *(\d+)\]", line):
            on_tensor(int(match[1]), int(match[2]))

    arguments += [model, out, ftype, str(n_threads)]
    done = _run("llama-quantize", arguments, cwd=folder, on_line=watch, writes=folder)
    if not (folder / out).is_file() or "quantize time" not in _both(done):
        raise _unproven(done, "wrote no file")
    return done


# -- llama-imatrix -----------------------------------------------------------------------------------------------------


def collect_imatrix(
    model: Path,
    text: Path,
    out: Path,
    *,
    n_ctx: int,
    n_threads: int,
    parse_special: bool,
    process_output: bool = False,
    repack: bool = True,
) -> None:
    """llama.cpp's own imatrix of a flat text, in GGUF format. Without ``repack`` by the kernels that the engine uses,
    which on some CPUs (AMX) round otherwise."""
    arguments: list[str | Path] = [
        "-m",
        model,
        "-f",
        text,
        "-o",
        out,
        "-c",
        str(n_ctx),
        "-t",
        str(n_threads),
        "--no-ppl",
    ]
    # One chunk at a time: other batch shapes round otherwise.
    arguments += ["-b", str(n_ctx), "-ub", str(n_ctx)]
    arguments += ["--parse-special"] if parse_special else []
    arguments += ["--process-output"] if process_output else []
    arguments += [] if repack else ["--no-repack"]
    done = _run("llama-imatrix", arguments, writes=out.parent)
    if not out.is_file():
        raise _unproven(done, "wrote no imatrix")


# -- llama-perplexity --------------------------------------------------------------------------------------------------


# It may end, with code 0, before its logger has written the last lines (common/log.cpp).
_PERPLEXITY_TRIES = 5


@dataclass(frozen=True)
class PerplexityKld:
    """llama-perplexity's own statistics: KLDs in nats, ``same_top_p`` and ``rms_dp`` in percent."""

    mean_kld: float
    mean_kld_error: float
    same_top_p: float
    rms_dp: float


def perplexity_base(model: Path, text: Path, base: Path, *, n_ctx: int, n_threads: int) -> None:
    """Write the base file of log-probabilities that :func:`perplexity_kld` compares with."""
    common: list[str | Path] = ["-m", model, "-f", text, "-c", str(n_ctx), "-b", str(n_ctx), "-t", str(n_threads)]
    done = _run("llama-perplexity", [*common, "--kl-divergence-base", base], writes=base.parent)
    if "Final estimate" not in _both(done) or not base.is_file():
        raise _unproven(done, "gave no final estimate")


def perplexity_kld(model: Path, base: Path, *, n_ctx: int, n_threads: int) -> PerplexityKld:
    """KLD of ``model`` from the base file, as llama-perplexity computes it."""
    common: list[str | Path] = ["-m", model, "-c", str(n_ctx), "-b", str(n_ctx), "-t", str(n_threads), "--no-repack"]
    for _ in range(_PERPLEXITY_TRIES):
        done = _run("llama-perplexity", [*common, "--kl-divergence", "--kl-divergence-base", base])
        mean = re.search(rf"Mean +KLD: +{_NUMBER} ± +{_NUMBER}", done.stdout)
        same = re.search(rf"Same top p: +{_NUMBER}", done.stdout)
        rms = re.search(rf"RMS Δp +: +{_NUMBER}", done.stdout)
        if mean and same and rms:
            return PerplexityKld(float(mean[1]), float(mean[2]), float(same[1]), float(rms[1]))
    raise _unproven(done, "printed no statistics")


# -- the others --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchRow:
    """One test of llama-bench, ``pp512`` or ``tg128`` (``@ d4096``: behind so many tokens), and its speed in each
    repetition; mean and standard deviation in tokens per second."""

    test: str
    tokens_per_second: float
    stddev: float
    samples: tuple[float, ...]


def bench(
    model: Path,
    *,
    n_prompt: int,
    n_gen: int,
    repetitions: int,
    n_threads: int,
    n_depth: int = 0,
    options: Sequence[str] = (),
    cancel: threading.Event | None = None,
) -> list[BenchRow]:
    """llama-bench on ``model``, a row for each of the two sizes that is not 0; ``options`` say where the model goes;
    ``cancel``, once set, ends it."""
    sizes = ["-p", str(n_prompt), "-n", str(n_gen), "-d", str(n_depth), "-r", str(repetitions), "-t", str(n_threads)]
    done = _run("llama-bench", ["-m", model, *sizes, *options, "-o", "json"], cancel=cancel)
    try:
        return [_bench_row(row) for row in json.loads(done.stdout)]
    except MALFORMED as error:
        raise _unproven(done, "printed no results") from error


def _bench_row(row: Mapping[str, Any]) -> BenchRow:
    name = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
    depth = f" @ d{row['n_depth']}" if row["n_depth"] else ""
    samples = tuple(float(sample) for sample in row["samples_ts"])
    return BenchRow(name + depth, float(row["avg_ts"]), float(row["stddev_ts"]), samples)


def complete(model: Path, prompt: str, *, n_predict: int, n_threads: int) -> str:
    """The greedy continuation of ``prompt`` (plain text, no template) by llama-completion."""
    arguments: list[str | Path] = [
        "-m",
        model,
        "-p",
        prompt,
        "-n",
        str(n_predict),
        "-t",
        str(n_threads),
        "--temp",
        "0",
        "-no-cnv",
    ]
    for attempt in range(_TRIES):
        time.sleep(0.1 * (2**attempt - 1))
        done = _run("llama-completion", [*arguments, "--no-display-prompt", "-c", "1024"])
        # On a busy machine what its logger's thread still holds at the end is lost, the text too (common/log.cpp).
        if done.stdout.strip():
            return done.stdout
    raise _unproven(done, "answered nothing")


def merge_shards(first: Path, out: Path) -> None:
    """Merge the shards of a split GGUF into ``out``."""
    done = _run("llama-gguf-split", ["--merge", first, out], writes=out.parent)
    if not out.is_file():
        raise _unproven(done, "wrote no file")


def split_file(model: Path, prefix: Path, *, max_size: str) -> list[Path]:
    """Split ``model`` into shards of at most ``max_size`` (as ``2G``), named ``prefix-00001-of-0000N.gguf``."""
    done = _run("llama-gguf-split", ["--split", "--split-max-size", max_size, model, prefix], writes=prefix.parent)
    shards = sorted(prefix.parent.glob(f"{prefix.name}-*-of-*.gguf"))
    if not shards:
        raise _unproven(done, "wrote no shard")
    return shards


@dataclass(frozen=True)
class DeviceMemory:
    """MiB that a model needs on a device."""

    device: str
    model_mib: int
    context_mib: int
    compute_mib: int


def fit_params(model: Path, *, n_ctx: int) -> list[DeviceMemory]:
    """What llama-fit-params estimates for ``model`` with a context of ``n_ctx`` tokens."""
    done = _run("llama-fit-params", ["-m", model, "-c", str(n_ctx), "-fitp", "on"])
    rows = re.findall(r"^(\S+) (\d+) (\d+) (\d+)\s*$", done.stdout, re.M)
    if not rows:
        raise _unproven(done, "printed no estimate")
    return [DeviceMemory(name, int(a), int(b), int(c)) for name, a, b, c in rows]


def devices(rpc: Sequence[str] = ()) -> list[str]:
    """The GPU devices that the compiled llama.cpp sees, as it names them, and those of RPC servers (``host:port``)."""
    done = _run("llama-server", [*(("--rpc", ",".join(rpc)) if rpc else ()), "--list-devices"])
    text = _both(done)
    if "Available devices" not in text:
        raise _unproven(done, "listed no devices")
    listed = text.split("Available devices:")[1].splitlines()
    return [line.strip() for line in listed if re.match(r"\s+\S+: ", line)]


def write_tensor_types(types: Mapping[str, str], path: Path) -> None:
    """A file for ``--tensor-type-file``: an anchored pattern for each tensor, since llama-quantize searches."""
    lines = []
    for name, type_name in types.items():
        if name != name.lower() or re.search(r"\s|=", name):
            raise DynrunError(f"llama-quantize cannot be told the type of a tensor named {name!r}")
        lines.append(f"^{re.escape(name)}$={type_name.lower()}\n")
    with translated_os_errors(path):
        path.write_text("".join(lines), encoding="utf-8")
