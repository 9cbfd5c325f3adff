"""The log-likelihood of tokens under a model."""
