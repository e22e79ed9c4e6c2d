"""Our engine in the comparison: the same load and the same engine as a worker's, without HTTP."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from turn import Facts, serve

import fastchat
from fastchat.engine.engine import Engine
from fastchat.engine.engine_config import EngineConfig
from fastchat.engine.events import SequenceRequest
from fastchat.engine.model_runner import KVShape
from fastchat.engine.sampling_params import SamplingParams
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.lean import make_lean
from fastchat.models.stored_form import Quantization
from fastchat.models.weights import load_model
from fastchat.native.build import kernels


class FastChat:
    """One engine, stepped by hand."""

    def __init__(self, flags: argparse.Namespace) -> None:
        torch.set_num_threads(flags.threads)
        quantization = None if flags.weights == "bfloat16" else Quantization(flags.weights)
        checkpoint = Checkpoint.open(Path(flags.model))
        model = load_model(checkpoint, dtype="bfloat16", quantization=quantization)
        make_lean(model)
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
        weight_bytes = sum(tensors.values())
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        cache_bytes = KVShape.of(model).bytes_per_token * flags.streams * flags.context
        # What random numbers write repeats itself, and drafts would guess it better than any real text.
        config = EngineConfig(
            max_context=flags.context, kv_cache_bytes=cache_bytes, max_running=flags.streams, speculation=False
        )
        self._engine = Engine(model, config)
        self.facts = Facts(
            version=fastchat.__version__,
            settings=f"{self._engine.limits.dtype}, {'C++ kernels' if kernels() is not None else 'torch only'}",
            weight_bytes=weight_bytes,
            read_bytes=weight_bytes - (0 if embedding.data_ptr() == head.data_ptr() else embedding.nbytes),
            cache_bytes=cache_bytes,
            vocab_size=self._engine.limits.vocab_size,
        )

    def generate(self, prompts: list[list[int]], answer_tokens: int) -> Iterator[list[int]]:
        """One item per step of the engine."""
        sampling = SamplingParams(temperature=0.0, max_tokens=answer_tokens, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            self._engine.add(SequenceRequest(str(number), tuple(prompt), sampling))
        while self._engine.has_work:
            events = self._engine.step()
            yield [int(event.sequence_id) for event in events for _ in event.token_ids]


if __name__ == "__main__":
    serve(FastChat)
