"""Processes that compute nothing can read checkpoints, tokenize ChatGLM's way and render prompts without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.checkpoints import write_checkpoint

PROGRAM = """
import sys
from pathlib import Path
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.weight_files import find_weight_files
from fastchat.models.tokenizer import load_tokenizer
from fastchat.models.chat_template import load_chat_format
from fastchat.models.sampling_defaults import load_sampling_defaults
from fastchat.models.detokenizer import Detokenizer
from fastchat.models.interface import ChatMessage
checkpoint = Checkpoint.open(Path(sys.argv[1]))
find_weight_files(checkpoint.path)
load_sampling_defaults(checkpoint)
tokenizer = load_tokenizer(checkpoint)
prompt = load_chat_format(checkpoint, tokenizer).render([ChatMessage("user", "hi")])
Detokenizer(tokenizer, prompt).push(prompt)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_the_text_side_of_chatglm_needs_no_torch(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "chatglm3")
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path)], check=True, timeout=60)


def test_the_text_side_of_other_families_needs_no_torch(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2")
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path)], check=True, timeout=60)
