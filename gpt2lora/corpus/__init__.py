"""From a user's files and the hub's rows to the three splits."""
