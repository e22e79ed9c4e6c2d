"""transformers' continuous batching in the comparison, one event per token."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from turn import Facts, serve

PAGE_TOKENS = 32
STEP_TOKENS = 512


class Transformers:
    """One manager, whose thread runs until the process ends."""

    def __init__(self, flags: argparse.Namespace) -> None:
        torch.set_num_threads(flags.threads)
        model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.bfloat16, attn_implementation="sdpa")
        num_blocks = flags.streams * -(-flags.context // PAGE_TOKENS)
        self._manager = model.eval().init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=False),
            ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=num_blocks,
                max_batch_tokens=STEP_TOKENS,
                use_async_batching=False,
            ),
        )
        self._manager.start()
        config = model.config
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * 2
        token_bytes *= config.hidden_size // config.num_attention_heads
        weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self.facts = Facts(
            version=transformers.__version__,
            settings=f"continuous batching, sdpa, pages of {PAGE_TOKENS}, {STEP_TOKENS} tokens per step",
            weight_bytes=weight_bytes,
            read_bytes=weight_bytes,
            cache_bytes=num_blocks * PAGE_TOKENS * token_bytes,
            vocab_size=config.vocab_size,
        )

    def generate(self, prompts: list[list[int]], answer_tokens: int) -> Iterator[list[int]]:
        """One item per event: the manager tells each stream's tokens apart."""
        number_of = {}
        for number, prompt in enumerate(prompts):
            name = self._manager.add_request(prompt, max_new_tokens=answer_tokens, streaming=True, eos_token_id=-1)
            number_of[name] = number
        num_seen = [0] * len(prompts)
        while any(count < answer_tokens for count in num_seen):
            event = self._manager.get_result(timeout=120)
            if event is None or event.error:
                raise RuntimeError(f"no event: {event and event.error}")
            number = number_of[event.request_id]
            num_new = len(event.generated_tokens) - num_seen[number]
            num_seen[number] += num_new
            yield [number] * num_new


if __name__ == "__main__":
    serve(Transformers)
