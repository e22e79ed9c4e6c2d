"""The program that the process client spawns in tests of adapters: one tiny checkpoint and its side for adapters."""

import argparse
import socket
from pathlib import Path

import torch

from fastchat.engine.engine import Engine
from fastchat.engine.engine_config import EngineConfig
from fastchat.engine.process_server import serve_engine
from fastchat.models.adapters import ModelAdapters
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.lean import make_lean
from fastchat.models.weights import load_model

MAX_CONTEXT = 8192


def make_adapted_engine(folder: Path) -> Engine:
    checkpoint = Checkpoint.open(folder)
    model = load_model(checkpoint, device="cpu", dtype="float32")
    make_lean(model)
    config = EngineConfig(MAX_CONTEXT, kv_cache_bytes=2**23, max_running=16)
    return Engine(model, config, ModelAdapters(model, checkpoint))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine-fd", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with socket.socket(fileno=arguments.engine_fd) as connection:
        serve_engine(connection, lambda: make_adapted_engine(arguments.folder))
