"""What is scored: the built-in test conversations, or a plain text as llama-perplexity cuts it.

Takes text and a model's vocabulary, gives token sequences with their scored positions; scores nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dynrun.calibration.dataset import builtin
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


def text_parts(vocabulary: Vocabulary, text: str, *, max_tokens: int, n_ctx: int) -> list[Scored]:
    """``text`` cut every ``n_ctx`` tokens, the second half of each chunk scored, ``max_tokens`` in all.

    The cut, the BOS token in the place of each chunk's first where the vocabulary wants one, and the positions are
    those of llama-perplexity (tools/perplexity/perplexity.cpp, kl_divergence), so that means agree with it.
    Raises UsageError for a text shorter than one chunk.
    """
    # common/arg.cpp drops one newline at the end of the file.
    tokens = vocabulary.tokenize(text.removesuffix("\n"), parse_special=False, add_special=True)
    n_chunks = min(len(tokens), max_tokens) // n_ctx
    if n_chunks == 0:
        raise UsageError(
            f"the text has {len(tokens)} tokens and {max_tokens} are asked for, a chunk takes {n_ctx}",
            fix="give a longer text, more --tokens or a smaller --ctx",
        )
    # The last position's successor lies in the next chunk: llama-perplexity does not score it either.
    outputs = tuple(range(n_ctx // 2, n_ctx - 1))
    found = []
    for i in range(n_chunks):
        chunk = tokens[i * n_ctx : (i + 1) * n_ctx]
        if vocabulary.adds_bos:
            chunk[0] = vocabulary.bos
        found.append(Scored(f"chunk {i}", tuple(chunk), outputs))
    return found


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises NotFoundError or DynrunError."""
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist", fix="check the path")
    try:
        # newline="": llama-perplexity reads the bytes as they are.
        with path.open(encoding="utf-8", newline="") as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text", fix="convert it to UTF-8") from error
    except OSError as error:
        raise DynrunError(f"{path} cannot be read: {error.strerror}", fix="check its permissions") from error
