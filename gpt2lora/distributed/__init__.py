"""Several processes that compute one result: their group, its start, its failures, and locks on GPUs."""
