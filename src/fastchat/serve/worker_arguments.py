"""The flags that both worker commands share, and what becomes of them.

FastChat's names and defaults, but for these: workers listen on this machine only; `--device` and `--dtype` choose by
themselves; there is no concurrency limit unless one is given; an event is sent for every token; `--worker-address`
follows from host and port.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastchat.config import Environment, expand_home, parse_bytes, parse_url, reachable_url
from fastchat.errors import ConfigError
from fastchat.models.stored_form import DEFAULT_GROUP_SIZE, GROUP_SIZES, Quantization
from fastchat.serve.arguments import (
    add_address_flags,
    add_controller_address_flag,
    add_drain_flag,
    add_log_flag,
    add_refused_flag,
    add_security_flags,
    cluster_token,
    flag_type,
)
from fastchat.serve.http_server import Listeners
from fastchat.serve.option_kind import as_bool
from fastchat.serve.settings import add_config_flag
from fastchat.worker.config import EngineSpec, ModelSpec, WorkerConfig

DEFAULT_PORT = 21002
DEFAULT_ADAPTER_BYTES = 512 * 2**20

_QUANTIZED = (
    "quantized checkpoints of this kind are not read; give the unquantized checkpoint's folder to --model-path, and "
    "--quantize int4 to make it as small"
)
_EXLLAMA = "there is no ExLlama engine; leave the flag out, the built-in engine serves the model"
_XFT = "there is no xFasterTransformer engine; leave the flag out, the built-in engine serves the model"
_REFUSED: tuple[tuple[str, bool, str], ...] = (
    ("--cpu-offloading", False, "weights stay on one device; use --device cpu, or a model that fits"),
    ("--gptq-ckpt", True, _QUANTIZED),
    ("--gptq-wbits", True, _QUANTIZED),
    ("--gptq-groupsize", True, _QUANTIZED),
    ("--gptq-act-order", False, _QUANTIZED),
    ("--awq-ckpt", True, _QUANTIZED),
    ("--awq-wbits", True, _QUANTIZED),
    ("--awq-groupsize", True, _QUANTIZED),
    ("--enable-exllama", False, _EXLLAMA),
    ("--exllama-max-seq-len", True, _EXLLAMA),
    ("--exllama-gpu-split", True, _EXLLAMA),
    ("--exllama-cache-8bit", False, _EXLLAMA),
    ("--enable-xft", False, _XFT),
    ("--xft-max-seq-len", True, _XFT),
    ("--xft-dtype", True, _XFT),
)


def add_worker_flags(parser: argparse.ArgumentParser) -> None:
    """Everything but the models' own flags."""
    add_address_flags(parser, port=DEFAULT_PORT)
    parser.add_argument(
        "--worker-address",
        type=flag_type(parse_url),
        help="URL by which the API server reaches this worker (default: made of --host and --port; with --host 0.0.0.0 "
        "it names this machine's address towards the controller)",
    )
    add_controller_address_flag(parser)
    add_pin_flag(parser)
    parser.add_argument(
        "--no-register", action="store_true", help="serve without telling a controller (default: register)"
    )
    add_serving_flags(parser)
    add_security_flags(parser)
    add_config_flag(parser)


def add_pin_flag(parser: argparse.ArgumentParser) -> None:
    """`--pin`."""
    parser.add_argument(
        "--pin",
        type=flag_type(model_names, join=",".join),
        default=(),
        metavar="A,B",
        help="names of models that stay in memory, whatever else is asked for (default: none)",
    )


def add_serving_flags(parser: argparse.ArgumentParser) -> None:
    """How models are run and served: a worker's flags that `fastchat serve` has too and hands on."""
    add_engine_flags(parser)
    add_drain_flag(parser)
    parser.add_argument(
        "--limit-worker-concurrency",
        type=flag_type(positive),
        metavar="N",
        help="answers computed at once, the others wait (default: no limit, the scheduler decides; FastChat's was 5)",
    )
    parser.add_argument(
        "--stream-interval",
        type=flag_type(positive),
        default=1,
        metavar="N",
        help="tokens that an event of a stream waits for (default: 1; FastChat's was 2)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed for requests that bring none, which makes each repeatable (default: a new one each time)",
    )
    parser.add_argument(
        "--embed-in-truncate",
        action="store_true",
        help="cut embedding inputs that are longer than the context (default: refuse them)",
    )
    parser.add_argument(
        "--idle-timeout",
        type=flag_type(positive),
        metavar="SECONDS",
        help="free the memory of a model that nobody has used for so long; the next request for it loads it again "
        "(default: never, only when another model needs the memory)",
    )
    parser.add_argument(
        "--adapter-dir",
        type=flag_type(adapter_dir),
        metavar="FOLDER",
        help="where adapters lie that an operator may add while it runs (default: none may be added)",
    )
    parser.add_argument(
        "--adapter-memory",
        type=flag_type(parse_bytes),
        default=DEFAULT_ADAPTER_BYTES,
        metavar="SIZE",
        help="with --adapter-dir: memory kept free for each model's adapters that are added (default: 512MiB)",
    )
    parser.add_argument(
        "--debug",
        type=flag_type(_debug),
        nargs="?",
        const="true",
        default="",
        metavar="BOOL",
        help="as --log-level debug (default: off)",
    )
    add_log_flag(parser)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """How a model is run, and FastChat's flags for it that are refused; the terminal has them too."""
    for flag, takes_value, reason in _REFUSED:
        add_refused_flag(parser, flag, reason=reason, takes_value=takes_value)
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="where to compute (default: auto, a GPU if there is one; FastChat's was cuda)",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="number type of the weights (default: auto, the checkpoint's on a GPU, the processor's fastest on a CPU)",
    )
    add_quantization_flags(parser)
    parser.add_argument(
        "--gpus", metavar="IDS", help="the GPUs to see, like 0 or 1 (default: all; sets CUDA_VISIBLE_DEVICES)"
    )
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="GPUs for one model; more than 1 is refused (default: 1)"
    )
    parser.add_argument(
        "--max-gpu-memory",
        type=flag_type(parse_bytes),
        metavar="SIZE",
        help="GPU memory for all models together, like 24GiB (default: 9/10 of what is free)",
    )
    parser.add_argument(
        "--memory",
        type=flag_type(parse_bytes),
        metavar="SIZE",
        help="on a CPU: memory for all models together, libraries included, like 20GiB (default: 9/10 of what is free)",
    )
    parser.add_argument(
        "--kv-cache-memory",
        type=flag_type(parse_bytes),
        metavar="SIZE",
        help="memory of one model's KV cache, like 2GiB (default: its share of what the weights leave)",
    )
    parser.add_argument(
        "--max-context",
        type=flag_type(positive),
        metavar="N",
        help="longest prompt and answer together, in tokens (default: the checkpoint's)",
    )
    parser.add_argument(
        "--max-batch-tokens",
        type=flag_type(positive),
        metavar="N",
        help="tokens computed in one step; fewer make answers flow more evenly beside long prompts (default: 512)",
    )
    parser.add_argument(
        "--engine-process",
        choices=["auto", "thread", "process"],
        default="auto",
        help="where an engine runs (default: auto, its own process on CUDA and a thread elsewhere)",
    )
    parser.add_argument(
        "--revision", default="main", help="only main: the files of the folder are used as they are (default: main)"
    )


def add_quantization_flags(parser: argparse.ArgumentParser) -> None:
    """In which form Linears are held."""
    parser.add_argument(
        "--quantize",
        choices=["int8", "int4"],
        help="quantize the weights while loading: int8 halves 16 bits, int4 nearly halves that (default: no)",
    )
    parser.add_argument("--load-8bit", action="store_true", help="the same as --quantize int8")
    parser.add_argument(
        "--quantize-group-size",
        type=int,
        choices=GROUP_SIZES,
        help=f"for int4: inputs that share a scale; fewer are more exact and larger (default: {DEFAULT_GROUP_SIZE})",
    )


def quantization(arguments: argparse.Namespace) -> Quantization | None:
    """What the flags ask for. Raises `ConfigError` where they contradict each other."""
    name = arguments.quantize
    if arguments.load_8bit:
        if name == "int4":
            raise ConfigError("--load-8bit and --quantize int4 contradict each other; give one of them.")
        name = "int8"
    if arguments.quantize_group_size is not None and name != "int4":
        raise ConfigError("--quantize-group-size works with --quantize int4 only.")
    return Quantization(name, arguments.quantize_group_size or DEFAULT_GROUP_SIZE) if name else None


def worker_config(
    arguments: argparse.Namespace, environment: Environment, listeners: Listeners, models: tuple[ModelSpec, ...]
) -> WorkerConfig:
    """The worker that the flags ask for."""
    controller_address = None if arguments.no_register else arguments.controller_address
    return WorkerConfig(
        models=models,
        address=arguments.worker_address
        or reachable_url(listeners.host, listeners.port, tls=arguments.ssl, peer_url=controller_address),
        cluster_token=cluster_token(arguments, environment),
        controller_address=controller_address,
        engine=serving_engine_spec(arguments),
        stream_interval=arguments.stream_interval,
        default_seed=arguments.seed,
        truncates_embedding_input=arguments.embed_in_truncate,
        idle_timeout_s=arguments.idle_timeout,
        pinned=arguments.pin,
        adapter_dir=arguments.adapter_dir,
    )


def serving_engine_spec(arguments: argparse.Namespace) -> EngineSpec:
    """How models are run that are served."""
    reserve_bytes = arguments.adapter_memory if arguments.adapter_dir is not None else 0
    engine = engine_spec(arguments, max_running=arguments.limit_worker_concurrency)
    return replace(engine, adapter_reserve_bytes=reserve_bytes)


def engine_spec(arguments: argparse.Namespace, *, max_running: int | None = None) -> EngineSpec:
    """What `add_engine_flags` were told."""
    return EngineSpec(
        device=arguments.device,
        dtype=arguments.dtype,
        quantization=quantization(arguments),
        engine_place=arguments.engine_process,
        max_context=arguments.max_context,
        max_batch_tokens=arguments.max_batch_tokens,
        max_running=max_running,
        kv_cache_bytes=arguments.kv_cache_memory,
        max_memory_bytes=arguments.memory,
        max_device_bytes=arguments.max_gpu_memory,
    )


def obey_early_flags(arguments: argparse.Namespace) -> None:
    """What must be decided before torch looks for GPUs. Raises `ConfigError` for what is not supported."""
    quantization(arguments)
    if arguments.num_gpus != 1:
        raise ConfigError(
            f"--num-gpus {arguments.num_gpus} is not supported: one model runs on one GPU; start one worker for "
            "each GPU with --gpus."
        )
    if arguments.revision != "main":
        raise ConfigError(
            f"--revision {arguments.revision} is not supported: models are folders on disk; give the folder of that "
            "revision to --model-path."
        )
    if arguments.gpus is not None:
        if len(arguments.gpus.split(",")) > 1:
            raise ConfigError(
                f"--gpus {arguments.gpus} is not supported: one model runs on one GPU; name one, and start one "
                "worker for each."
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = arguments.gpus


def _debug(text: str) -> str:
    """`true`, or nothing. FastChat took any word for a yes, `false` too."""
    return "true" if as_bool(text) else ""


def model_path(text: str) -> str:
    """A folder, as it was written."""
    if not text.strip():
        raise ConfigError("--model-path is empty; give the folder of a checkpoint.")
    return text


def adapter_dir(text: str) -> Path:
    """A folder that is there, by its whole path."""
    folder = expand_home(text).absolute()
    if not text.strip() or not folder.is_dir():
        raise ConfigError(f"--adapter-dir {text!r} is no folder; make it, or correct its name.")
    return folder


def model_names(text: str | None) -> tuple[str, ...]:
    """`a,b` as names; None gives none, and the folder's name is used."""
    return () if text is None else tuple(name.strip() for name in text.split(","))


def positive(text: str) -> int:
    """A whole number from 1."""
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise ConfigError(f"{text!r} is not a whole number from 1.")
    return int(text)


def add_model_flags(parser: argparse.ArgumentParser, *, is_repeatable: bool, default_model: str | None = None) -> None:
    """`--model-path`, `--model-names` and `--conv-template`, once or once for each model.

    `default_model` says what is served where no path is given; without it the path is required.
    """
    each: dict[str, Any] = {"action": "append"} if is_repeatable else {}  # Any: argparse's keywords
    again = ", once for each model" if is_repeatable else ""
    parser.add_argument(
        "--model-path",
        required=default_model is None,
        type=flag_type(model_path),
        metavar="FOLDER",
        help=f"a checkpoint{again}" + (f" (default: {default_model})" if default_model else ""),
        **each,
    )
    parser.add_argument(
        "--model-names",
        type=flag_type(model_names, join=",".join),
        metavar="A,B",
        help=f"names to serve it as{again} (default: the folder's name)",
        **each,
    )
    some = ", once for all or once for each model" if is_repeatable else ""
    parser.add_argument(
        "--conv-template",
        metavar="NAME",
        help=f"prompt format, by name or as a .json file{some} (default: the checkpoint's own)",
        **each,
    )
