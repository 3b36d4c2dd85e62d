"""Settings of every test."""

import torch

torch.set_num_threads(1)  # the test networks are tiny; more threads only wait for each other
