"""The vocabulary and its special tokens: are they there, in range, and does a turn end where the model stops?"""

from __future__ import annotations

from collections.abc import Iterator

from dynrun.lint.finding import Finding, Subject, shown

_PREFIX = "tokenizer.ggml."
# The gguf package's TokenType.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPECIAL = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "fim_pre", "fim_suf", "fim_mid")
# Texts that llama.cpp ends a turn at whatever the metadata say (llama_vocab::impl::load of src/llama-vocab.cpp).
END_OF_TURN = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "</s>"}
    | {"<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>"}
    | {"<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["}
)


def check_tokens(subject: Subject) -> Iterator[Finding]:
    """Length of the vocabulary and its lists, and every special token's id."""
    metadata, tokens = subject.header.metadata, subject.tokens
    model = metadata.get(f"{_PREFIX}model")
    if model in (None, "none", "no_vocab"):
        yield Finding("vocabulary-missing", "error", f"{_PREFIX}model", "a tokenizer", shown(model or "none"))
        return
    if not tokens:
        yield Finding("vocabulary-missing", "error", f"{_PREFIX}tokens", "a list of tokens", "none")
        return
    yield from _lengths(subject)
    for name in _SPECIAL:
        key = f"{_PREFIX}{name}_token_id"
        number = metadata.get(key)
        if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
            yield Finding("token-out-of-range", "error", key, f"0 to {len(tokens) - 1}", shown(number))
    if metadata.get(f"{_PREFIX}eos_token_id") is None:
        yield Finding("eos-missing", "error", f"{_PREFIX}eos_token_id", "the id of the token that ends a text", "none")
    elif subject.token("eos") and _kind(subject, "eos") == _NORMAL:
        found = f"{shown(subject.token('eos'))}, a normal token"
        yield Finding("eos-not-control", "error", f"{_PREFIX}eos_token_id", "a control token", found)
    if metadata.get(f"{_PREFIX}add_bos_token") is True and not subject.token("bos"):
        yield Finding("bos-missing", "error", f"{_PREFIX}bos_token_id", "a token, as add_bos_token is true", "none")
    padding = metadata.get(f"{_PREFIX}padding_token_id")
    if padding is not None and padding == metadata.get(f"{_PREFIX}eos_token_id"):
        expected = "another token than EOS: fine-tuning on padded batches unlearns to stop"
        yield Finding("padding-is-eos", "info", f"{_PREFIX}padding_token_id", expected, shown(subject.token("eos")))


def _lengths(subject: Subject) -> Iterator[Finding]:
    n_tokens, tensors = len(subject.tokens), subject.header.tensors
    for name in ("scores", "token_type"):
        values = subject.header.metadata.get(_PREFIX + name)
        if isinstance(values, list) and len(values) != n_tokens:
            yield Finding("vocabulary-lengths", "error", _PREFIX + name, f"{n_tokens} values", f"{len(values)} values")
    embeddings = tensors.get("token_embd.weight")
    if embeddings is not None and len(embeddings.shape) == 2 and embeddings.shape[1] != n_tokens:
        found = f"{embeddings.shape[1]} rows"
        yield Finding("vocabulary-embeddings", "error", "token_embd.weight", f"{n_tokens} rows, one a token", found)


def _kind(subject: Subject, name: str) -> int:
    """The type of a special token; control where the header says nothing."""
    kinds = subject.header.metadata.get(f"{_PREFIX}token_type")
    number = subject.header.metadata.get(f"{_PREFIX}{name}_token_id")
    if not isinstance(kinds, list) or not isinstance(number, int) or not 0 <= number < len(kinds):
        return _CONTROL
    return int(kinds[number]) if isinstance(kinds[number], int) else _CONTROL


def ends_a_turn(subject: Subject, token: str) -> bool:
    """Whether llama.cpp stops at ``token``."""
    return token in END_OF_TURN or token in {subject.token(name) for name in ("eos", "eot", "eom")}


def control_tokens(subject: Subject) -> list[str]:
    """Tokens that are no text: control and user-defined ones of more than one character, longest first."""
    kinds = subject.header.metadata.get(f"{_PREFIX}token_type")
    if not isinstance(kinds, list) or len(kinds) != len(subject.tokens):
        return []
    pairs = zip(subject.tokens, kinds, strict=True)
    found = {text for text, kind in pairs if kind in (_CONTROL, _USER_DEFINED) and len(text.strip()) > 1}
    return sorted(found, key=lambda text: (-len(text), text))
