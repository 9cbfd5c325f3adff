"""Text from a trained model: the prompts of `generate`, and the page of `play`, base and tuned model side by side."""
