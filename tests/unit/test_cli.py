"""The command line as a whole: what it loads, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.commands import dynrun

HEAVY = ("torch", "textual", "numpy", "scipy", "llama_cpp", "gguf", "httpx2", "huggingface_hub", "jinja2")


def modules_after(*arguments: str) -> set[str]:
    """Which heavy modules a command has imported at its end."""
    program = (
        "import json, sys\n"
        "from dynrun.cli.app import main\n"
        "main(sys.argv[1:])\n"
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), ("make", "--help"), ("run", "--help"), ("eval", "kld", "--help"), ("make",), ("ls",)],
)
def test_what_needs_nothing_loads_nothing(arguments: tuple[str, ...]) -> None:
    assert not modules_after(*arguments)


@pytest.mark.parametrize("arguments", [("doctor", "--json"), ("make", "none.gguf", "--quant", "Q4_K_M")])
def test_torch_and_textual_are_loaded_only_where_they_are_needed(arguments: tuple[str, ...]) -> None:
    assert not modules_after(*arguments) & {"torch", "textual"}


def test_a_command_loads_no_other_one() -> None:
    program = (
        "import sys\n"
        "from dynrun.cli.app import main\n"
        "main(['ls', '--help'])\n"
        "known = [name for name in ('ls', 'make', 'eval_kld') if f'dynrun.cli.{name}' in sys.modules]\n"
        "print(*known, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["ls"]


def test_every_command_has_help_with_an_example() -> None:
    listing = dynrun("--help").stdout.split("Commands:")[1]
    commands = [line.split()[0] for line in listing.splitlines() if line.startswith("  ") and line[2] != " "]
    assert {"make", "quantize", "allocate", "sensitivity", "imatrix", "eval", "run", "ls", "doctor"} <= set(commands)
    for command in commands:
        words = ("eval", "kld") if command == "eval" else (command,)
        text = dynrun(*words, "--help").stdout
        assert "Example: dynrun" in text, command
        # The app shows everything on the terminal.
        assert "--json" in text or command == "tui", command


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("nosuch",), "No such command"),
        (("make",), "Missing argument 'MODEL'"),
        (("make", "demo", "--nosuch"), "No such option"),
        (("make", "demo", "--tokens", "many"), "Invalid value"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments: tuple[str, ...], line: str) -> None:
    ran = dynrun(*arguments)
    assert ran.exit_code == 2
    assert line in ran.error
    assert not ran.stdout


def test_without_arguments_the_help_is_shown() -> None:
    ran = dynrun()
    assert ran.exit_code == 2
    assert ran.stdout.startswith("Usage: dynrun")


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dynrun.cli.app", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert b"Traceback" not in errors
