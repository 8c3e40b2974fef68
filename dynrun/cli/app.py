"""The program `dynrun`: its commands, and how every error ends.

Command modules import what is heavy inside their functions: `--help` must answer at once.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from dynrun import __version__
from dynrun.cli import tui
from dynrun.cli.command_line import ARGUMENTS
from dynrun.cli.commands import add_commands
from dynrun.errors import INTERRUPTED_EXIT_CODE, DynrunError, UsageError


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dynrun {__version__}")
        raise typer.Exit


def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make, prove and run the best GGUF quantization of a model for a given size; without a command, the app."""
    if context.invoked_subcommand is None:
        if tui.on_terminal():
            tui.tui()
        print(context.get_help())
        raise typer.Exit(UsageError.exit_code)


def _app(arguments: Sequence[str]) -> typer.Typer:
    """With the command that ``arguments`` name; with all of them where they name none."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback(invoke_without_command=True)(_options)
    word = arguments[0] if arguments else "tui" if tui.on_terminal() else ""
    add_commands(app, word)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; every error ends in one line on stderr and its exit code."""
    if argv is not None:
        return _run(list(argv))
    exit_code = _run(sys.argv[1:])
    # Python would look through all that there is for garbage once more at its end: a tenth of a second.
    gc.freeze()
    return exit_code


def _run(arguments: list[str]) -> int:
    ARGUMENTS.set(tuple(arguments))
    try:
        result: Any = typer.main.get_command(_app(arguments)).main(arguments, prog_name="dynrun", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except DynrunError as error:
        print(f"dynrun: {error}", file=sys.stderr)
        return error.exit_code
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("dynrun: interrupted; run the same command again and it goes on", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except TyperException as error:
        return _usage(error, arguments)
    except BrokenPipeError:
        # The reader of our output has gone (`dynrun … | head`); there is nobody to tell.
        sys.stderr.close()
        return 1
    except Exception:
        return _unexpected()


def _usage(error: TyperException, arguments: Sequence[str]) -> int:
    message = str(getattr(error, "format_message", error.__str__)())
    if message.startswith("Usage:"):
        # No arguments at all: the message is the help.
        print(message)
        return UsageError.exit_code
    words = [word for word in arguments[:2] if word.isalpha()]
    print(f"dynrun: {message} — see {' '.join(['dynrun', *words, '--help'])}", file=sys.stderr)
    return UsageError.exit_code


def _unexpected() -> int:
    from dynrun.llamacpp.process import new_log

    text = traceback.format_exc()
    reason = text.strip().splitlines()[-1]
    try:
        log = new_log("crash")
        log.write_text(text, encoding="utf-8")
        print(f"dynrun: unexpected error: {reason} — please report it with the log: {log}", file=sys.stderr)
    except (OSError, DynrunError):
        print(f"dynrun: unexpected error: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
