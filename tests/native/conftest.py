"""Every test here runs once per form of the kernels: each level this machine can build and run, and pure torch."""

import shutil

import pytest
import torch

from fastchat.native import build

FORMS = ["torch", *build.LEVELS]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """The form in use during the test."""
    if request.param != "torch":
        if not build.has_level(request.param, build.cpu_flags()):
            pytest.skip(f"this CPU has no {request.param}")
        if not any(shutil.which(name) for name in build.COMPILERS):
            pytest.skip("there is no C++ compiler")
    monkeypatch.setenv(build.VARIABLE, "0" if request.param == "torch" else request.param)
    build.loaded_library.cache_clear()
    assert (build.kernels() is None) == (request.param == "torch")
    yield request.param
    build.loaded_library.cache_clear()


@pytest.fixture(autouse=True)
def one_thread():
    """Small products gain nothing by threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2])
def num_threads(one_thread, request):
    """The number of torch's threads during the test."""
    torch.set_num_threads(request.param)
    return request.param
