"""`dynrun show`: what a model is, and the chat template that is in force."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import emit, megabytes

if TYPE_CHECKING:
    from pathlib import Path

    from dynrun.calibration.conversation import Conversation
    from dynrun.gguf.header import Header


def show(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF, or a name that `dynrun ls` shows, or demo.")],
    template: Annotated[
        bool, typer.Option("--template", help="Print the chat template, a rendered example, and where it came from.")
    ] = False,
    chat_template: options.ChatTemplate = None,
    as_json: options.AsJson = False,
) -> None:
    """What a model is; with --template, what its chat template makes of a conversation.

    Reads the header alone, however large the model. Example: dynrun show demo --template
    """
    from dynrun.gguf.quant_label import label_of
    from dynrun.gguf.shards import read_whole_header
    from dynrun.models import resolve

    found = resolve(model)
    header = read_whole_header(found.path)
    data = {
        "name": found.name,
        "path": str(found.path),
        "size_bytes": header.file_bytes,
        "bpw": header.bpw,
        "architecture": header.architecture,
        "quant": label_of(header),
        "tensors": len(header.tensors),
        "n_ctx_train": header.metadata.get(f"{header.architecture}.context_length"),
        "template": _template(header, chat_template, rendered=template or as_json),
    }
    emit(as_json, data, lambda: _show(data, template))


def _template(header: Header, override: Path | None, *, rendered: bool) -> dict[str, str | None]:
    """Origin, source, and where ``rendered`` an example, or the error that it ends in."""
    from dynrun.calibration.template import template_of
    from dynrun.errors import DynrunError

    example = error = None
    with template_of(header, _token(header, "bos"), _token(header, "eos"), override) as read:
        if rendered:
            try:
                example = read.render(_example(read.source or ""))
            except DynrunError as failure:
                # A template that fails is what one wants to see here.
                error = failure.message
    return {"origin": read.origin, "source": read.source, "example": example, "error": error}


def _token(header: Header, name: str) -> str:
    """The text of a special token; empty where the header has none."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    number = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if isinstance(tokens, list) and isinstance(number, int) and 0 <= number < len(tokens):
        return str(tokens[number])
    return ""


def _example(source: str) -> Conversation:
    """A short conversation with what the template knows of: tools only where it does."""
    from dynrun.calibration.conversation import Conversation

    asked: list[dict[str, Any]] = [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "What is the weather like in Bergen?"},
    ]
    answered: list[dict[str, Any]] = [{"role": "assistant", "content": "It rains, at 9 °C."}]
    if "tools" not in source:
        return Conversation("example", "example", [*asked, *answered])
    parameters = {"type": "object", "properties": {"place": {"type": "string", "description": "A town"}}}
    weather = {"name": "weather", "description": "The weather at a place", "parameters": parameters}
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"place": "Bergen"}}}
    called: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "rain, 9 °C"},
    ]
    tools = [{"type": "function", "function": weather}]
    return Conversation("example", "example", [*asked, *called, *answered], tools=tools)


def _show(data: dict[str, Any], whole: bool) -> None:
    template = data["template"]
    size = f"{megabytes(data['size_bytes'])}, {data['bpw']:.2f} bpw"
    print(_visible(f"{data['name']}: {data['architecture'] or 'no model'}, {data['quant']}, {size}"))
    print(f"{data['tensors']} tensors, trained on {data['n_ctx_train'] or 'an unknown number of'} tokens of context")
    print(data["path"])
    print(f"chat template: {_visible(template['origin'])}")
    source = _visible(template["source"] or "")
    if whole:
        example = _visible(template["example"] or f"(none: {template['error']})")
        print(f"\n--- template\n{source or '(none)'}\n\n--- example\n{example}")
    elif source:
        first = source.lstrip().splitlines()[0]
        print(f"  {first if len(first) <= 110 else first[:109] + '…'}")


def _visible(text: str) -> str:
    # Escape sequences in a model's template must not reach the terminal.
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
