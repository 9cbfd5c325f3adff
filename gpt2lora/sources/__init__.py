"""Where models and texts come from: the hub, or this disk."""
