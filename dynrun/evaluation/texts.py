"""What is scored: the built-in test conversations, and plain texts as llama-perplexity cuts them.

Takes text and a model's vocabulary, gives token sequences with their scored positions; scores nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from dynrun.calibration.dataset import BUILTIN_NAME, builtin
from dynrun.calibration.sequences import Tokenizer, TokenSequence, beginnings
from dynrun.calibration.splits import split_of_source
from dynrun.calibration.template import ChatTemplate
from dynrun.errors import DynrunError, NotFoundError, UsageError
from dynrun.llamacpp.vocabulary import Vocabulary
from dynrun.scoring.reference import Scored


def conversation_parts(vocabulary: Vocabulary, template: ChatTemplate, *, max_tokens: int, n_ctx: int) -> list[Scored]:
    """The shipped test split through the model's template.

    Raises UsageError where ``max_tokens`` is too small for even one conversation.
    """
    tokenizer = Tokenizer(vocabulary, template, n_ctx)
    found = beginnings(tokenizer, split_of_source(builtin(), "test"), max_tokens=max_tokens)
    if not found:
        raise UsageError(f"{max_tokens} tokens are too few to score anything", fix="ask for 16 or more")
    return scored(found)


def scored(sequences: Iterable[TokenSequence]) -> list[Scored]:
    """Every position whose successor is known."""
    return [Scored(one.id, one.tokens, tuple(range(len(one.tokens) - 1)), one.kind) for one in sequences]


def text_parts(vocabulary: Vocabulary, text: str, *, max_tokens: int, n_ctx: int, name: str = "") -> list[Scored]:
    """``text`` cut every ``n_ctx`` tokens, the second half of each chunk scored, ``max_tokens`` in all.

    The cut, the BOS token in the place of each chunk's first where the vocabulary wants one, and the positions are
    those of llama-perplexity (tools/perplexity/perplexity.cpp, kl_divergence), so that means agree with it.
    ``name`` becomes the domain. Raises UsageError for a text shorter than one chunk.
    """
    # common/arg.cpp drops one newline at the end of the file.
    tokens = vocabulary.tokenize(text.removesuffix("\n"), parse_special=False, add_special=True)
    n_chunks = min(len(tokens), max_tokens) // n_ctx
    if n_chunks == 0:
        raise UsageError(
            f"{name or 'the text'} has {len(tokens)} tokens and {max_tokens} are asked for, a chunk takes {n_ctx}",
            fix="give a longer text, more --tokens or a smaller --ctx",
        )
    # The last position's successor lies in the next chunk: llama-perplexity does not score it either.
    outputs = tuple(range(n_ctx // 2, n_ctx - 1))
    found = []
    for i in range(n_chunks):
        chunk = tokens[i * n_ctx : (i + 1) * n_ctx]
        if vocabulary.adds_bos:
            chunk[0] = vocabulary.bos
        found.append(Scored(f"chunk {i}", tuple(chunk), outputs, name))
    return found


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises NotFoundError, UsageError for an empty one or other bytes, DynrunError."""
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist", fix="check the path")
    try:
        # newline="": llama-perplexity reads the bytes as they are.
        with path.open(encoding="utf-8", newline="") as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text", fix="convert it to UTF-8") from error
    except OSError as error:
        raise DynrunError(f"{path} cannot be read: {error.strerror}", fix="check its permissions") from error
    if not text.strip():
        raise UsageError(f"{path} is empty", fix="give a text to score")
    return text


def all_parts(
    vocabulary: Vocabulary, template: ChatTemplate, texts: Sequence[str], *, max_tokens: int, n_ctx: int
) -> list[Scored]:
    """What ``texts`` name, ``max_tokens`` of each: ``builtin``, the shipped test split, or a file of plain text.

    Each text is a domain of its own; the shipped test split alone has its kinds of conversations as domains. Raises
    UsageError for a text that is named twice, and what :func:`read_text` and :func:`text_parts` raise.
    """
    contents = {name: None if name == BUILTIN_NAME else read_text(Path(name).expanduser()) for name in texts}
    if len(contents) < len(texts):
        raise UsageError("a text is named twice", fix="name each text once")
    found: list[Scored] = []
    for name, content in contents.items():
        size = {"max_tokens": max_tokens, "n_ctx": n_ctx}
        if content is not None:
            found += text_parts(vocabulary, content, name=_short(name, texts), **size)
            continue
        own = conversation_parts(vocabulary, template, **size)
        found += own if len(contents) == 1 else [replace(part, domain=BUILTIN_NAME) for part in own]
    return found


def _short(name: str, texts: Sequence[str]) -> str:
    """A file's name without its folder, where no other text has the same."""
    short = Path(name).name
    return short if sum(Path(text).name == short for text in texts) == 1 else name
