import pytest
import torch

from fedlora_mini.data import load


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny():
    """Three sites of eight 32-pixel phantoms."""
    return load("phantom", size=32, sites=3, unseen=1, per_site=8, val=2, test=4)
