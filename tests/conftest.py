"""What all tests share."""

import pytest

from hf_schedulefree.optim import kernels


@pytest.fixture(autouse=True, scope="session")
def compiled_whatever_the_size():
    """The models of the tests are tiny, but the code that large ones run is to be tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "COMPILED_FROM", 0)
        yield
