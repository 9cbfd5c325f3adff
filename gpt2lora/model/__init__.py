"""The base model, in floats or quantised, and the low-rank adapter on it."""
