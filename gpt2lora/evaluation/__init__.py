"""What is measured of a trained model, and how it is shown."""
