import pytest
import torch
from small_models import fill_factors_b, new_adapter


@pytest.fixture
def tuned_model(tiny_model) -> torch.nn.Module:
    """The tiny model with an adapter that already changes its logits."""
    network = new_adapter(tiny_model)
    fill_factors_b(network, 0.5)
    return network
