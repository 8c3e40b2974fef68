"""A child of workers.py: one engine on one device, probes on request.

Reads JSON lines on standard input: the setup, then ``{"id", "job"}``. Writes ``{"ready": true}``, then ``{"id",
"probe"}`` for each; or ``{"error"}``, and ends. It ends at once where its input does: its parent is done, or dead.
Whatever else is printed here goes to standard error, which the parent keeps as the log.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from dynrun.calibration.imatrix import read_imatrix
from dynrun.calibration.sequences import TokenSequence
from dynrun.errors import DynrunError
from dynrun.gguf.weights import WeightFile
from dynrun.llamacpp.engine import Engine
from dynrun.sensitivity.errors import Quantizer
from dynrun.sensitivity.sweep import Job, Sweep

Lines = SimpleQueue[str]


def main() -> None:
    """Serve until standard input ends or something fails."""
    # llama.cpp, its backends and their drivers print as they like: on their standard output nobody may read an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: Lines = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    try:
        _serve(lines, answers)
    except DynrunError as error:
        kind = type(error).__name__
        _say(answers, {"error": {"kind": kind, "message": error.message, "fix": error.fix}})
    except BaseException:
        traceback.print_exc()
    # The interpreter's own end may fail on the thread that reads, and hide the reason.
    os._exit(1)


def _listen(lines: Lines) -> None:
    for line in sys.stdin:
        lines.put(line)
    # In the middle of a decode too: nobody is left to read its result.
    os._exit(0)


def _serve(lines: Lines, answers: IO[str]) -> None:
    setup = json.loads(lines.get())
    reference, n_threads = Path(setup["reference"]), setup["n_threads"]
    sequences = [TokenSequence(id_, kind, tuple(tokens)) for id_, kind, tokens in setup["sequences"]]
    quantizer = Quantizer(WeightFile(reference), read_imatrix(Path(setup["imatrix"])), n_threads)
    with Engine.open(reference, n_ctx=setup["n_ctx"], n_threads=n_threads, device=setup["device"]) as engine:
        sweep = Sweep(engine, quantizer, sequences)
        _say(answers, {"ready": True})
        while True:
            request = json.loads(lines.get())
            probe = sweep.run(Job(**request["job"]))
            _say(answers, {"id": request["id"], "probe": asdict(probe)})


def _say(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
