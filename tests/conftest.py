"""Shared by all tests."""

import torch

pytest_plugins = ["pytester"]

# The models here are tiny: with two threads each of their operations waits for the second one to wake up.
torch.set_num_threads(1)
