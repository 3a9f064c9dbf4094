"""Shared by all tests."""

import torch

import typecheck

typecheck.make_shapes_known()

pytest_plugins = ["pytester"]

# The models here are tiny: with two threads each of their operations waits for the second one to wake up.
torch.set_num_threads(1)
