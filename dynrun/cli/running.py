"""What `run` and `serve` share: options of where a model goes and how tokens are drawn, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import say
from dynrun.errors import UsageError
from dynrun.runtime.sampling import Sampling

if TYPE_CHECKING:
    from dynrun.runtime.events import Event
    from dynrun.runtime.opening import Where
    from dynrun.runtime.placement import Placement
    from dynrun.runtime.session import Session


@dataclass(frozen=True)
class Running:
    """Where a model goes, as the user wishes it, and how tokens are drawn."""

    ctx: int | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    mmproj: Path | None = None
    chat_template: Path | None = None
    rpc: tuple[str, ...] = ()
    replan: bool = False
    sampling: Sampling = field(default_factory=Sampling)

    def where(self, *, parallel: int = 1, prompt_cache_bytes: int | None = 0) -> Where:
        """For the planner, with the user's configuration."""
        from dynrun.config import load_config
        from dynrun.runtime.opening import Where
        from dynrun.runtime.placement import Wishes

        wishes = Wishes(
            n_ctx=self.ctx,
            parallel=parallel,
            type_k=self.type_k,
            type_v=self.type_v,
            mmproj=self.mmproj,
            prompt_cache_bytes=prompt_cache_bytes,
        )
        return Where(wishes, load_config().n_gpu_layers, self.rpc, self.replan)


def placing(
    ctx: Annotated[
        int | None,
        typer.Option("--ctx", min=1, help="Context in tokens, at most what the model has; default: planned."),
    ] = None,
    kv: Annotated[
        str, typer.Option("--kv", metavar="TYPE", help="Type of the KV cache: f16, q8_0, …; K,V for two of them.")
    ] = "f16",
    mmproj: Annotated[
        Path | None, typer.Option("--mmproj", metavar="FILE", help="The model's image encoder; one beside it is found.")
    ] = None,
    chat_template: options.ChatTemplate = None,
    rpc: Annotated[
        str,
        typer.Option("--rpc", metavar="HOST:PORT,…", help="llama.cpp RPC servers as devices (trusted networks only)."),
    ] = "",
    replan: Annotated[
        bool, typer.Option("--replan", help="Forget what worked after an out-of-memory, and plan anew.")
    ] = False,
) -> Running:
    """The options of where a model goes."""
    types = [name.strip().lower() for name in kv.split(",")]
    if len(types) > 2:
        raise UsageError(f"--kv {kv} names more than two types", fix="one for both, or K and V as in q8_0,f16")
    servers = tuple(name.strip().removeprefix("rpc:") for name in rpc.split(",") if name.strip())
    return Running(ctx, types[0], types[-1], mmproj, chat_template, servers, replan)


def sampling(
    temperature: Annotated[
        float | None, typer.Option("--temp", "--temperature", help="0 always takes the likeliest token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Draw from the K likeliest; 0 from all.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw from the likeliest that sum to P; 1 from all.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="Draw from those of at least P times the likeliest; 0 from all.")
    ] = None,
    repeat_penalty: Annotated[float | None, typer.Option("--repeat-penalty", help="1 for none.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=2**32 - 2, help="For the same answer again.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("-n", "--max-tokens", min=1, help="Tokens of an answer at most.")
    ] = None,
) -> Sampling:
    """Sampling options; what is not given is what the model recommends, or llama.cpp's default."""
    return Sampling(temperature, top_k, top_p, min_p, repeat_penalty, seed, max_tokens)


def placed(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the options of :func:`placing` in the place of ``settings``."""
    return options.with_options(command, {"": placing})


def sampled(command: Callable[..., None]) -> Callable[..., None]:
    """Those of :func:`sampling` too."""
    return options.with_options(command, {"": placing, "sampling": sampling})


def open_session(path: Path, settings: Running, *, reuse: bool) -> Session:
    """A session for the model at ``path``, with the user's configuration."""
    from dynrun.config import load_config
    from dynrun.runtime.opening import open_session

    threads, template = load_config().n_threads, settings.chat_template
    return open_session(path, settings.where(), n_threads=threads, chat_template=template, reuse=reuse)


def narrate(event: Event, name: str) -> None:
    """Tell what happens until a server answers, on stderr; other events are left alone."""
    from dynrun.runtime.events import Ready, Restarted, Retreated, Starting

    match event:
        case Starting(None):
            say(f"{name}: using the `dynrun serve` that runs already")
        case Starting(placement, remembered):
            assert placement is not None
            why = ", as it worked before (--replan forgets that)" if remembered else ""
            say(f"{name}: {summary(placement)}{why}")
        case Retreated(cause, placement):
            say(f"{cause}\ntrying again: {summary(placement)}")
        case Ready(_, n_ctx, elapsed_s):
            say(f"ready after {elapsed_s:.1f} s, {n_ctx:,} tokens of context")
        case Restarted():
            say("\nthe answer begins again")
        case _:
            pass


_WHERE = {
    "gpu": "all on the GPU",
    "gpu+ram": "on GPU and RAM",
    "ram": "in RAM",
    "disk": "partly read from the disk",
    "no": "larger than the memory",
}


def summary(placement: Placement) -> str:
    """A placement in one line."""
    choice = placement.choice
    parts = [f"{name} {n / 2**30:.1f} GiB" for name, n in placement.device_bytes.items() if n]
    moved = f", experts of {choice.n_cpu_moe} layers in RAM" if choice.n_cpu_moe else ""
    return f"{_WHERE[placement.verdict]} ({', '.join(parts)}{moved}), {choice.n_ctx:,} tokens of context"


@contextmanager
def crashes_told() -> Iterator[None]:
    """Where a server died, show the last lines of its log before the error."""
    from dynrun.llamacpp.server import ServerDiedError

    try:
        yield
    except ServerDiedError as error:
        _show_last(error.last_lines)
        raise


def _show_last(lines: Sequence[str]) -> None:
    if lines:
        say("the last lines of llama-server's log:")
    for line in lines:
        say(f"  | {line}")


def placement_json(placement: Placement | None) -> dict[str, Any]:
    """A placement as `run --json` gives it; empty for somebody else's server."""
    if placement is None:
        return {}
    return {
        "verdict": placement.verdict,
        "device_bytes": dict(placement.device_bytes),
        "kv_bytes": placement.kv_bytes,
        "argv": list(placement.argv),
        **placement.choice.to_json(),
    }
