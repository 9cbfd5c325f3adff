"""What the project's figures and defaults rest on, measured.

harvest -> stand_in -> methods    the defaults of params.yaml: a corpus, a stand-in for GPT-2, every method on it
train, growth                     training against transformers' Trainer with PEFT, and how its cost grows
evaluation                        evaluation against the loop of transformers' documentation
tokenizing                        the stage tokenize: seconds and memory

Each is run as `python -m benchmarks.NAME` from the root of the repository; none of them needs DVC.
"""
