"""Settings of every test."""

import os

import pytest
import torch

torch.set_num_threads(1)  # the test networks are tiny; more threads only wait for each other
if "PYTEST_XDIST_WORKER" in os.environ:  # -n: the programs that tests start share the cores too
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="50 kills, 1,500 damaged files: minutes")


@pytest.fixture
def full(request) -> bool:
    return request.config.getoption("--full")
