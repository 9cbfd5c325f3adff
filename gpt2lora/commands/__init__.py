"""Commands for people; no stage depends on them."""
