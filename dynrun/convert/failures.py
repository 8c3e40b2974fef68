"""Why a conversion failed, in the converter's own words, and what to do about it."""

from __future__ import annotations

import re

from dynrun.convert.folder import Source
from dynrun.errors import DoesNotFitError, DynrunError, UsageError
from dynrun.llamacpp.process import Completed, exit_reason

_NEWER = "take a GGUF of the model, if its repository has one, or a dynrun with a newer llama.cpp"
# What the converter's last words have in them, and what to do.
_FIXES = (
    (r"Model (\S+) is not supported", "llama.cpp's converter does not know the architecture", _NEWER),
    (
        r"pre-tokenizer was not recognized",
        "llama.cpp's converter does not know this tokenizer",
        f"if the model is a fine-tune, put the tokenizer files of its base model into the folder; else {_NEWER}",
    ),
    (
        r"Quant(?:ization)? (?:method|format).*not.*supported|not yet implemented|in dequant_|multiple config groups",
        "llama.cpp's converter cannot unpack these weights",
        "take the repository with the model's unquantized weights",
    ),
    (
        r"Can not map tensor|Unprocessed",
        "it found weights that it has no place for",
        "the folder may hold an adapter or another model's weights",
    ),
)
_NO_PART = (
    r"--mtp / --no-nextn are not supported|_config not found in hparams|Model (\S+) is not supported",
    "llama.cpp's converter makes no such part of this architecture",
    "leave --part out",
)
_DEPTH = re.compile(r"^(?:\w+\.)*(?:\w*(?:Error|Exception|Exit|Interrupt)\b.*)$")


def explain(done: Completed, source: Source, part: str) -> DynrunError:
    """The error for a conversion of ``part`` that ended without a file."""
    text = "\n".join((*done.stderr_tail, done.stdout[-4000:]))
    if "No space left on device" in text:
        return DoesNotFitError(
            f"the disk became full while converting {source.folder}", fix="free some space", log=done.log
        )
    if done.exit_code == -9 or "MemoryError" in text or "Cannot allocate memory" in text:
        return DoesNotFitError(
            f"the memory was too small to convert {source.folder}", fix="close programs", log=done.log
        )
    if "DYNRUN-REFUSED-CODE" in text or "`trust_remote_code=True`" in text:
        return UsageError(
            f"{source.folder} cannot be converted without running the model's own code; nothing of it was run",
            fix="--trust-remote-code runs it",
            log=done.log,
        )
    reason = last_words(text) or exit_reason(done.exit_code)
    for pattern, what, fix in _FIXES if part == "model" else (_NO_PART, *_FIXES):
        if re.search(pattern, text):
            return DynrunError(f"{source.folder} was not converted: {what} ({reason})", fix=fix, log=done.log)
    return DynrunError(f"{source.folder} was not converted: {reason}", fix="see the log", log=done.log)


def last_words(text: str) -> str:
    """The exception or the logged error that a Python program ended with; of a bare assertion what it asserts."""
    lines = [line.strip() for line in text.splitlines()]
    for at, line in reversed(list(enumerate(lines))):
        if line == "AssertionError" and at:
            # Newer Pythons underline what failed.
            return next((f"{line}: {said}" for said in reversed(lines[:at]) if said.strip("^~ ")), line)[:240]
        if _DEPTH.match(line) or line.startswith(("ERROR:", "CRITICAL:")):
            return re.sub(r"^(?:ERROR|CRITICAL):[\w-]+:", "", line)[:240]
    return ""
