import pytest
from small_models import write_gpt2, write_llama


@pytest.fixture(scope="module", params=[write_gpt2, write_llama], ids=["gpt2", "llama"])
def model_folder(request, tmp_path_factory):
    """The folder of a model of Conv1D layers, and of one of nn.Linear layers."""
    return request.param(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))
