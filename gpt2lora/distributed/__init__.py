"""Several processes that compute one result: their group, its sums, its start, and locks on GPUs."""
