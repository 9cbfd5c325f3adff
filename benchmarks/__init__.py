"""How the defaults of params.yaml were chosen: a corpus, a stand-in for GPT-2, and every method on it, measured.

harvest -> stand_in -> methods

Each is run as `python -m benchmarks.NAME` from the root of the repository; none of them needs DVC.
"""
