"""What all tests share."""

import pytest

from hf_schedulefree.optim import kernels


@pytest.fixture(autouse=True)
def compiled_whatever_the_size(monkeypatch):
    """The models of the tests are tiny, but the code that large ones run is to be tested."""
    monkeypatch.setattr(kernels, "COMPILED_FROM", 0)
