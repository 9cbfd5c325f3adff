"""The schema of each section of params.yaml."""

from gpt2lora.pipeline.params import PresetParams
from gpt2lora.pipeline.schemas import METHODS, SECTIONS

SCHEMAS = {f"presets.{name}": PresetParams for name in ("gpt2", "sample", "local")}
SCHEMAS |= {f"methods.{name}": schema for name, schema in METHODS.items()}
SCHEMAS |= SECTIONS
