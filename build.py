#!/usr/bin/env python3
"""Set dynrun up on a fresh machine: `python3 build.py`; then `python3 build.py demo` and `python3 build.py test`.

Makes .venv, installs the locked packages, compiles the pinned llama.cpp once per machine (cached), installs the
bindings on top of it. Every step that is done already is skipped. Standard library only.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("dynrun needs Python 3.11 or newer; this is {}.{}. Run build.py with it.".format(*sys.version_info[:2]))

import argparse
import shutil
import time

from dynrun.artifacts import file_lock
from dynrun.config import available_cores
from dynrun.errors import INTERRUPTED_EXIT_CODE, DynrunError
from dynrun.llamacpp import environment, source
from dynrun.llamacpp.backends import BACKENDS, choose_backend
from dynrun.llamacpp.build import compile_llama_cpp, discard_builds, find_compiler
from dynrun.paths import repository_root

CHECKS = (
    ("-m", "ruff", "format", "--check", "."),
    ("-m", "ruff", "check", "."),
    ("-m", "mypy"),
    # It has no module that runs as a program.
    ("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"),
    # Without the default choice of markers: everything; some workers, as much of it waits for child processes.
    ("-m", "pytest", "-m", "", "-n", str(min(available_cores(), 4)), "--dist", "worksteal"),
)


class Progress:
    """One line that changes on a terminal; elsewhere a line for each step, and now and then one inside a long step."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.last = 0.0
        self.live = sys.stdout.isatty()
        self.kind = ""

    def __call__(self, text: str, lasting: bool) -> None:
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print("\r\x1b[2K" + (text + "\n" if lasting else text[:width]), end="", flush=True)
            return
        kind, now = text.split(":")[0], time.monotonic()
        if lasting or kind != self.kind or now - self.last >= 20:
            print(text, flush=True)
            self.kind, self.last = kind, now

    def end(self) -> None:
        if self.live:
            print("\r\x1b[2K", end="")


def positive(text: str) -> int:
    """A number of jobs, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="build.py", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("then", nargs="?", choices=("setup", "demo", "test"), default="setup", help="what to do after the set-up")
    backends = ("auto", *BACKENDS)
    add("--backend", choices=backends, default="auto", help="default: what this machine has a device for")
    add("--jobs", type=positive, default=available_cores(), help="parallel compile jobs (default: all cores)")
    add("--clean", action="store_true", help="remove .venv, the unpacked source and all compiled builds first")
    add("--verbose", action="store_true", help="show every compile step")
    return parser.parse_args(argv)


def set_up(options: argparse.Namespace, progress: Progress) -> environment.Venv:
    root = repository_root()
    with file_lock(root / ".build.lock", waiting="another build.py is working in this clone; waiting for it"):
        if options.clean:
            environment.discard_venv()
            source.discard_source()
            discard_builds()
        pin = source.read_pin()
        choice = choose_backend(options.backend)
        # Before the downloads, not after them.
        find_compiler()
        progress(f"backend: {choice.backend} ({choice.reason})", True)
        venv = environment.make_venv(progress)
        environment.install_locked(venv, progress)
        environment.install_torch(venv, pin, choice, progress)
        archive = source.fetch_archive(pin, venv.python)
        unpacked = source.unpack_source(pin, archive)
        installed = compile_llama_cpp(
            pin, unpacked, choice, tools=venv.bin, jobs=options.jobs, report=progress, verbose=options.verbose
        )
        environment.install_bindings(venv, pin, archive, unpacked, progress)
        environment.install_dynrun(venv, progress)
        environment.finish(venv, installed)
        seconds = int(time.monotonic() - progress.started)
        progress(f"ready after {seconds // 60}:{seconds % 60:02d} — .venv/bin/dynrun --help", True)
    return venv


def test(venv: environment.Venv) -> int:
    worst = 0
    for check in CHECKS:
        print(f"== {' '.join(check)}", flush=True)
        worst = environment.exec_in(venv, check) or worst
    return worst


def main(argv: list[str]) -> int:
    options = parse(argv)
    progress = Progress()
    try:
        venv = set_up(options, progress)
    except DynrunError as error:
        progress.end()
        print(f"build.py: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        progress.end()
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.end()
        print("build.py: interrupted; run it again and it goes on", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    if options.then == "demo":
        return environment.exec_in(venv, ("-m", "dynrun.cli.app", "demo"))
    return test(venv) if options.then == "test" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
