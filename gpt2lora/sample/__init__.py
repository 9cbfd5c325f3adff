"""The embedded sample: a corpus and a model made of installed documentation."""
