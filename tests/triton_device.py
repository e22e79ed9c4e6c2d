"""Where Triton's kernels run in tests: on a GPU, else in Triton's interpreter (`conftest.py`), else not at all."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with torch's CUDA build alone")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
