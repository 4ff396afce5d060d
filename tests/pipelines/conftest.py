import pytest
import torch
from models import Mine


@pytest.fixture
def mine():
    torch.manual_seed(0)
    return Mine().eval().requires_grad_(False)
