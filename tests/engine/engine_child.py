"""The program that the process client spawns in tests: one tiny engine on an inherited socket."""

import argparse
import socket
import sys
import threading

import torch

from fastchat.engine.process_server import serve_engine
from fastchat.errors import CheckpointError
from tests.engine.conftest import make_engine
from tests.engine.tiny_models import make_model

MAX_CONTEXT = 2**15


def make_roomy_engine(model):
    """With room for an answer of many seconds."""
    return make_engine(model, max_context=MAX_CONTEXT, num_blocks=MAX_CONTEXT // 4)


def hang(*_):
    say("hanging")
    threading.Event().wait()


def say(word: str):
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def make(behaviour: str):
    if behaviour == "fails":
        raise CheckpointError("the folder is empty; copy a model into it")
    if behaviour == "loads for ever":
        say("loading")
        threading.Event().wait()
    torch.set_num_threads(1)
    model = make_model("glm")
    if behaviour == "hangs":
        model.get_input_embeddings().register_forward_pre_hook(hang)
    return make_roomy_engine(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine-fd", type=int, required=True)
    parser.add_argument("--behaviour", default="well")
    arguments = parser.parse_args()
    with socket.socket(fileno=arguments.engine_fd) as connection:
        serve_engine(connection, lambda: make(arguments.behaviour), close_timeout_s=1.0)
