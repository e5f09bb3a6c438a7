"What tests of the recipes share"
import pytest
import torch


@pytest.fixture
def one_thread():
    "The same sums on every machine"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
