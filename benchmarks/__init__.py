"""Measurements behind the project's figures and defaults.

training    training against transformers' Trainer, plain and compiled: speed and memory, and how the cost grows
methods     every method at its best learning rate, over several seeds
evaluation  evaluation against the loop of transformers' documentation
tokenizing  the stage tokenize: seconds and memory

Each is run as `python -m benchmarks.NAME` from the root of the repository; none of them needs DVC.
"""
