"""A small model for the commands that load one."""

import pytest

from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A small ChatGLM2 with room for a long answer, in a folder called like the guide's."""
    folder = tmp_path_factory.mktemp("models") / "chatglm2-6b"
    return write_checkpoint(folder, "chatglm2", layout="bin", num_shards=3, config={"seq_length": 32768})
