"""The page of `gpt2lora play`: base and tuned model side by side."""
