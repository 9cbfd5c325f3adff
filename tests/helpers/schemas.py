"""The schema of each section of params.yaml."""

from gpt2lora.model.lora import Lora
from gpt2lora.model.quantization import Quantization
from gpt2lora.pipeline.params import Preset
from gpt2lora.training.config import Train
from stages.evaluate import Evaluate
from stages.prepare import Prepare
from stages.tokenize import Tokenize
from stages.train import Plain

SCHEMAS = {
    "presets.gpt2": Preset,
    "presets.sample": Preset,
    "presets.local": Preset,
    "methods.lora": Plain,
    "methods.qlora": Quantization,
    "methods.full": Plain,
    "prepare": Prepare,
    "tokenize": Tokenize,
    "lora": Lora,
    "train": Train,
    "evaluate": Evaluate,
}
