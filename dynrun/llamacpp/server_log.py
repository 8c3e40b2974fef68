"""What llama-server's log says: why it died, and whether memory ran out.

Takes text, gives a :class:`Death`. The messages are those of llama.cpp's src/llama.cpp, src/llama-model-loader.cpp,
ggml/src/ggml-backend.cpp and tools/server/server.cpp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dynrun.llamacpp.process import exit_reason

Kind = Literal["memory", "model", "killed", "aborted", "other"]


@dataclass(frozen=True)
class Death:
    """Why a server ended: ``cause`` in words, what to do, and the kind; ``host``: it was the RAM that ran out."""

    cause: str
    fix: str
    kind: Kind
    host: bool = False


# "0.00.005.166 E gguf_init_from_file: failed to open …" (common/log.cpp); aborts and loader errors come without prefix.
_LINE = re.compile(r"^\d+\.\d\d\.\d{3}\.\d{3} ([A-Z]) (.*)$")
_FUNCTION = re.compile(r"^(?:(?:srv|cmn|slot) +)?[\w ()]+?: (?:error(?: loading model)?: )?")
_MEMORY = re.compile(
    r"cudaMalloc failed|out of memory|insufficient memory|OutOfDeviceMemory|bad_alloc|cannot allocate memory"
    r"|failed to allocate .*buffer|unable to allocate",
    re.IGNORECASE,
)
# An allocation's own assertion; the line that says why may be lost with the logger's thread.
_LONE_ASSERTION = re.compile(r"GGML_ASSERT\(ctx->mem_buffer != NULL\)")
# Of the memory that the CPU uses; pinned memory of a GPU's driver lies there too.
_HOST = re.compile(
    r"ggml_aligned_malloc|mem_buffer|\bCPU(_\w+)? buffer|CUDA_Host|bad_alloc|cannot allocate memory|pinned", re.I
)
_ABORT = re.compile(r"GGML_ASSERT|GGML_ABORT|CUDA error|terminate called|what\(\):")
# ggml/src/ggml-rpc/transport.cpp; the line of the abort itself may come before it, or be lost with the logger's thread.
_HUNG_UP = re.compile(r"(?:recv|send) failed \(bytes_")
_MALFORMED = re.compile(r"invalid magic|corrupted or incomplete|not within the file bounds|failed to read")
_TEMPLATE = re.compile(r"common_chat_templates_init: error: |failed to apply template: ")
# Characters of a line that are looked at.
_LONGEST = 2000
_SMALLER = "use a smaller context (--ctx), a smaller quant, or free some memory"


def cause_of_death(log_text: str, exit_code: int) -> Death:
    """Read the cause out of a server's log; ``exit_code`` as subprocess gives it, negative for a signal."""
    errors = _error_lines(log_text)
    if memory := _memory_line(errors):
        return Death(f"memory ran out: {_plain(memory)}", _SMALLER, "memory", bool(_HOST.search(memory)))
    if "failed to load model" in log_text:
        # The first error says what is wrong with the file, the later ones only that it was not loaded.
        reason = _plain(errors[0]) if errors else "no reason given"
        return Death(f"the model could not be loaded: {reason}", _model_fix(reason), "model")
    if "supplied chat template is not supported" in log_text:
        reason = next((_plain(line) for line in errors if _TEMPLATE.search(line)), "no reason given")
        return Death(f"the chat template is of no use: {reason}", "correct the template or leave it out", "other")
    if exit_code == -9:
        cause = "it was killed (SIGKILL), probably by the system because the machine's memory ran out"
        return Death(cause, _SMALLER, "killed", host=True)
    if exit_code == -6:
        return _aborted(errors)
    telling = [line for line in errors if "exiting due to" not in line]
    last = f": {_plain(telling[-1])}" if telling else ""
    fix = "choose another --port" if "couldn't bind" in last else "see its log"
    return Death(f"it ended with {exit_reason(exit_code)}{last}", fix, "other")


def _aborted(errors: list[str]) -> Death:
    words = _plain(next((line for line in errors if _ABORT.search(line)), errors[-1] if errors else "no reason given"))
    if _HUNG_UP.search(words):
        words = f"Remote RPC server hung up: {words}"
    fix = "start the RPC server again" if "RPC" in words else "report it with the log"
    return Death(f"it aborted (SIGABRT): {words}", fix, "aborted")


def _memory_line(errors: list[str]) -> str:
    """The first line that says that memory ran out; empty where none does."""
    found = (line for pattern in (_MEMORY, _LONE_ASSERTION) for line in errors if pattern.search(line))
    return next(found, "")


def _error_lines(log_text: str) -> list[str]:
    """Lines of level E and, of those without a level, the ones that speak of a fault."""
    found = []
    for whole in log_text.splitlines():
        line = whole[:_LONGEST]
        match = _LINE.match(line)
        if match and match[1] == "E":
            found.append(match[2].strip())
        elif not match and re.search(
            r"error|fail|crash|assert|abort|terminate|what\(\)|bad_alloc|memory", line, re.IGNORECASE
        ):
            found.append(line.strip())
    return found


def _plain(line: str) -> str:
    return _FUNCTION.sub("", line, count=1)[:300]


def _model_fix(reason: str) -> str:
    if "unknown model architecture" in reason:
        return "the pinned llama.cpp does not know this architecture"
    return "download or make the file again" if _MALFORMED.search(reason) else "see its log"


def memory_ran_out(log_text: str) -> Death | None:
    """What a server says that had no memory for a request, and lives on; None where it says nothing of the kind."""
    return cause_of_death(log_text, 0) if _memory_line(_error_lines(log_text)) else None


def last_lines(log_text: str, n: int = 8) -> tuple[str, ...]:
    """The last lines that are not empty."""
    return tuple(line.rstrip()[:200] for line in log_text.splitlines() if line.strip())[-n:]
