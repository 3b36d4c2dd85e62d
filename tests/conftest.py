"""Settings of every test."""

import pytest
import torch

torch.set_num_threads(1)  # the test networks are tiny; more threads only wait for each other


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="50 kills, 1,500 damaged files: minutes")


@pytest.fixture
def full(request) -> bool:
    return request.config.getoption("--full")
