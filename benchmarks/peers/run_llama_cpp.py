"""llama.cpp in the comparison, through the C interface that llama-cpp-python binds.

Batches are as its own server makes them: prompts come first, as many whole ones as make a physical batch; then every
decode step has one token of each stream. Each stream has its own part of the KV cache, and the attention kernel is
llama.cpp's choice.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Iterator
from importlib.metadata import version

import llama_cpp
import numpy as np
from turn import Facts, serve

BATCH_TOKENS = 512
"""llama.cpp's default for a physical batch (`n_ubatch`)."""

CACHE_BYTES_PER_VALUE = 2


class LlamaCpp:
    """One model and one context."""

    def __init__(self, flags: argparse.Namespace) -> None:
        llama_cpp.llama_backend_init()
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, None)
        model = llama_cpp.llama_model_load_from_file(flags.model.encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"{flags.model} cannot be loaded")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = flags.streams * flags.context
        settings.n_seq_max = flags.streams
        settings.n_batch = settings.n_ubatch = max(BATCH_TOKENS, flags.streams)
        settings.n_threads = settings.n_threads_batch = flags.threads
        settings.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            raise RuntimeError("no context; is there enough memory?")
        self._batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)
        vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        row = llama_cpp.llama_model_n_head_kv(model) * (
            llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model)
        )
        token_bytes = 2 * llama_cpp.llama_model_n_layer(model) * row * CACHE_BYTES_PER_VALUE
        features = llama_cpp.llama_print_system_info().decode().split(":", 1)[1].split("|")
        self.facts = Facts(
            version=f"llama-cpp-python {version('llama-cpp-python')}",
            settings=f"batches of {settings.n_ubatch}, built with "
            + " ".join(feature.split("=")[0].strip() for feature in features if feature.strip()),
            weight_bytes=llama_cpp.llama_model_size(model),
            read_bytes=llama_cpp.llama_model_size(model),
            cache_bytes=settings.n_ctx * token_bytes,
            vocab_size=vocab_size,
        )

    def generate(self, prompts: list[list[int]], answer_tokens: int) -> Iterator[list[int]]:
        """One item per call of llama_decode."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        last = [0] * len(prompts)
        per_batch = max(1, BATCH_TOKENS // len(prompts[0]))
        for begin in range(0, len(prompts), per_batch):
            numbers = list(range(begin, min(begin + per_batch, len(prompts))))
            for number, token_id in zip(numbers, self._prefill(prompts, numbers), strict=True):
                last[number] = token_id
            yield numbers
        everyone = list(range(len(prompts)))
        for step in range(1, answer_tokens):
            position = len(prompts[0]) + step - 1
            last = self._decode([(number, position, last[number], True) for number in everyone])
            yield everyone

    def _prefill(self, prompts: list[list[int]], numbers: list[int]) -> list[int]:
        """Some whole prompts, or the pieces of one that is longer than a batch; the first token of each."""
        tokens = [
            (number, place, token_id, place == len(prompts[number]) - 1)
            for number in numbers
            for place, token_id in enumerate(prompts[number])
        ]
        first: list[int] = []
        for begin in range(0, len(tokens), BATCH_TOKENS):
            first += self._decode(tokens[begin : begin + BATCH_TOKENS])
        return first

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (stream, position, token id, whether the next token is wanted); the most probable next tokens."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        num_wanted = 0
        for index, (number, position, token_id, is_wanted) in enumerate(tokens):
            batch.token[index] = token_id
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = number
            batch.logits[index] = is_wanted
            num_wanted += is_wanted
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode says {code}")
        if not num_wanted:
            llama_cpp.llama_synchronize(self._context)
            return []
        address = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        logits = np.ctypeslib.as_array(address, shape=(num_wanted, self.facts.vocab_size))
        chosen: list[int] = logits.argmax(axis=1).tolist()
        return chosen


if __name__ == "__main__":
    serve(LlamaCpp)
