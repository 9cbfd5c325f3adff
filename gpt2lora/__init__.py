"""The library behind the stages, and the command `gpt2lora`."""
