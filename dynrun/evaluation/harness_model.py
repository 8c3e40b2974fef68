"""A GGUF as lm-evaluation-harness wants a model: text in, likelihoods and generated text out.

Imported only where the harness is installed. Requests for likelihoods go to the engine, requests for text to a
llama-server that is started when the first of them comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx2
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dynrun.errors import MALFORMED, DynrunError
from dynrun.evaluation.harness import HarnessSettings
from dynrun.evaluation.likelihood import Pair, likelihoods
from dynrun.llamacpp.server import Server
from dynrun.llamacpp.vocabulary import Vocabulary

# What the harness lets a model write where a task does not say (lm_eval/models/huggingface.py).
_MAX_TOKENS = 256
# Options of a task that llama-server knows by the same name.
_SAMPLING = ("top_p", "top_k", "min_p")


class GgufModel(LM):  # type: ignore[misc,unused-ignore]
    """Use as a context manager: it holds a server from the first generated text on."""

    def __init__(
        self,
        model: Path,
        settings: HarnessSettings,
        *,
        n_threads: int,
        n_gpu_layers: int,
        say: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.model, self.settings, self._say = model, settings, say
        self._n_threads, self._n_gpu_layers = n_threads, n_gpu_layers
        self._open = ExitStack()
        self._served: tuple[Server, httpx2.Client] | None = None

    def __enter__(self) -> Self:
        self.vocabulary = self._open.enter_context(Vocabulary.load(self.model))
        trained = self.vocabulary.header.metadata.get(f"{self.vocabulary.header.architecture}.context_length")
        wanted = self.settings.n_ctx
        self.n_ctx = min(wanted, trained) if isinstance(trained, int) and trained > 0 else wanted
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    # -- likelihoods -----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each request's continuation after its context."""
        return self._likelihoods([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the context's length, as LM documents it."""
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    self._encode(request.args[0], bos=False), self._first_token, self.n_ctx, 1
                )
            ]
            for request in requests
        ]
        found = iter(self._likelihoods([(tuple(a), tuple(b)) for some in windows for a, b in some]))
        return [sum(next(found)[0] for _ in some) for some in windows]

    def _likelihoods(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        self._say(f"likelihoods of {len(pairs):,} continuations")
        found = likelihoods(self.model, pairs, n_threads=self._n_threads, n_gpu_layers=self._n_gpu_layers)
        return [(one.log_p, one.greedy) for one in found]

    def _pair(self, context: str, continuation: str) -> Pair:
        """As LM._encode_pair of the harness: spaces that end a context belong to what follows."""
        bare = context.rstrip()
        start = len(self._encode(bare)) if bare else 0
        whole = self._encode(context + continuation)
        if not start:
            whole, start = [self._first_token, *self._encode(context + continuation, bos=False)], 1
        # One token at least is scored, and the last ones that fit are read.
        start = min(start, len(whole) - 1)
        cut = max(0, len(whole) - self.n_ctx)
        return tuple(whole[min(cut, start - 1) : start]), tuple(whole[start:])

    def _encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Tokens, special ones parsed (a chat template writes them), with one BOS where the vocabulary wants it."""
        tokens = self.vocabulary.tokenize(text)
        wants = bos and self.vocabulary.adds_bos and tokens[:1] != [self.vocabulary.bos]
        return [self.vocabulary.bos, *tokens] if wants else tokens

    @property
    def _first_token(self) -> int:
        """What stands before a text without a context."""
        return self.vocabulary.bos if self.vocabulary.bos >= 0 else min(self.vocabulary.eog_tokens, default=0)

    # -- text ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, unless a task wants them drawn; several at a time."""
        self._say(f"answers to {len(requests):,} prompts")
        self._server()
        with ThreadPoolExecutor(self.settings.n_parallel) as pool:
            return list(pool.map(lambda request: self._generated(*request.args), requests))

    def _generated(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        n_predict = int(options.get("max_gen_toks") or options.get("max_tokens") or _MAX_TOKENS)
        n_predict = min(n_predict, self.n_ctx - 1)
        tokens = self._encode(context)[-(self.n_ctx - n_predict) :]
        drawn = options.get("do_sample") or options.get("temperature")
        body = {
            "prompt": tokens,
            "n_predict": n_predict,
            "stop": [until] if isinstance(until, str) else [stop for stop in until if stop],
            "temperature": float(options.get("temperature") or 1.0) if drawn else 0.0,
            "seed": 1234,
            **{key: options[key] for key in _SAMPLING if key in options},
        }
        return self._post("/completion", body, "content")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """By llama-server, with the template in the file."""
        body = {"messages": chat_history, "add_generation_prompt": add_generation_prompt}
        return self._post("/apply-template", body, "prompt")

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells models apart whose templates differ."""
        return self.model.name

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's text, for the harness's records."""
        return self.vocabulary.header.metadata.get("tokenizer.chat_template", "") if chat_template else ""

    def _server(self) -> tuple[Server, httpx2.Client]:
        if self._served is None:
            server = self._open.enter_context(
                Server(
                    self.model,
                    n_threads=self._n_threads,
                    n_ctx=self.n_ctx,
                    n_gpu_layers=self._n_gpu_layers,
                    n_parallel=self.settings.n_parallel,
                )
            )
            self._served = server, self._open.enter_context(server.client())
        return self._served

    def _post(self, path: str, body: dict[str, Any], wanted: str) -> str:
        server, client = self._server()
        try:
            answer = client.post(path, json=body)
        except httpx2.TransportError as error:
            raise server.death() or DynrunError(f"llama-server does not answer: {error}", log=server.log) from error
        if answer.status_code != httpx2.codes.OK:
            reason = answer.text[:200]
            raise DynrunError(f"llama-server refused a request of the harness: {reason}", log=server.log)
        try:
            return str(answer.json()[wanted])
        except MALFORMED as error:
            raise DynrunError(f"llama-server answers {path} without {wanted}", log=server.log) from error
