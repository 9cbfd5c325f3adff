"""The schema of each section of params.yaml."""

from gpt2lora.model.lora import LoraParams
from gpt2lora.model.quantization import QuantizationParams
from gpt2lora.pipeline.params import PresetParams
from gpt2lora.training.config import TrainParams
from stages.evaluate import EvaluateParams
from stages.prepare import PrepareParams
from stages.tokenize import TokenizeParams
from stages.train import NoParams

SCHEMAS = {
    "presets.gpt2": PresetParams,
    "presets.sample": PresetParams,
    "presets.local": PresetParams,
    "methods.lora": NoParams,
    "methods.qlora": QuantizationParams,
    "methods.full": NoParams,
    "prepare": PrepareParams,
    "tokenize": TokenizeParams,
    "lora": LoraParams,
    "train": TrainParams,
    "evaluate": EvaluateParams,
}
