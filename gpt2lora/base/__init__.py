"""The files of the base model, checked."""
