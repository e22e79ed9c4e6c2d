"""The program that the process client spawns in tests: one tiny engine on an inherited socket."""

import argparse
import socket

import torch

from fastchat.engine.process_server import serve_engine
from fastchat.errors import CheckpointError
from tests.engine.conftest import make_engine
from tests.engine.tiny_models import make_model


def make(fails: bool):
    if fails:
        raise CheckpointError("the folder is empty; copy a model into it")
    torch.set_num_threads(1)
    return make_engine(make_model("glm"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine-fd", type=int, required=True)
    parser.add_argument("--fails", action="store_true")
    arguments = parser.parse_args()
    with socket.socket(fileno=arguments.engine_fd) as connection:
        serve_engine(connection, lambda: make(arguments.fails))
