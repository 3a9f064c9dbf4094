"""Every global generator of random numbers as it was found, whatever happens in between."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def as_found() -> Iterator[None]:
    """The states of the generators of Python, NumPy, torch and CUDA devices are put back, after an exception too."""
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    of_cuda = torch.cuda.get_rng_state_all() if on_cuda else []
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if of_cuda:
            torch.cuda.set_rng_state_all(of_cuda)
