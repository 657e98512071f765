"""Makes the models: degradation, data, losses, the loop."""
