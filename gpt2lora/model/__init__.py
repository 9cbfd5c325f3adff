"""The base model, in floats or quantized, and the low-rank adapter on it."""
