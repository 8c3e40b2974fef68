"""The program `dynrun`: its commands, and how every error ends.

Command modules import what is heavy inside their functions: `--help` must answer at once.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from dynrun import __version__
from dynrun.cli import (
    allocate,
    bench,
    compare,
    convert,
    demo,
    doctor,
    eval_flips,
    eval_harness,
    eval_kld,
    eval_mmlu,
    eval_task,
    export,
    imatrix,
    lint,
    ls,
    make,
    plan,
    pull,
    push,
    quantize,
    rm,
    run,
    scheme,
    sensitivity,
    serve,
    show,
    tui,
    verify,
)
from dynrun.cli.command_line import ARGUMENTS
from dynrun.errors import INTERRUPTED_EXIT_CODE, DynrunError, UsageError

COMMANDS: tuple[Callable[..., None], ...] = (
    *(pull.pull, rm.rm),
    *(make.make, convert.convert, run.run, serve.serve, bench.bench, ls.ls, show.show, doctor.doctor, demo.demo),
    *(imatrix.imatrix, sensitivity.sensitivity, allocate.allocate, quantize.quantize),
    *(verify.verify, compare.compare, push.push),
    plan.plan,
    lint.lint,
    tui.tui,
)

app = typer.Typer(
    name="dynrun",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make, prove and run the best GGUF quantization of a model for a given size.",
)
for command in COMMANDS:
    app.command()(command)
evaluate = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure a model against its reference.")
evaluate.command("kld")(eval_kld.eval_kld)
evaluate.command("mmlu")(eval_mmlu.eval_mmlu)
evaluate.command("task")(eval_task.eval_task)
evaluate.command("flips")(eval_flips.eval_flips)
evaluate.command("harness")(eval_harness.eval_harness)
app.add_typer(evaluate, name="eval")
exports = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Hand a file to another program on this machine; with --json. Example: dynrun export lmstudio demo:Q3_K_M",
)
exports.command("ollama")(export.ollama)
exports.command("lmstudio")(export.lmstudio)
app.add_typer(exports, name="export")
schemes = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at schemes, compare them, take them out of GGUFs; each with --json. Example: dynrun scheme show S.toml",
)
schemes.command("show")(scheme.show)
schemes.command("diff")(scheme.diff)
schemes.command("from")(scheme.from_gguf)
app.add_typer(schemes, name="scheme")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dynrun {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; every error ends in one line on stderr and its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    ARGUMENTS.set(tuple(arguments))
    try:
        result: Any = typer.main.get_command(app).main(arguments, prog_name="dynrun", standalone_mode=False)
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
