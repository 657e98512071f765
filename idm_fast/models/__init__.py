"""Networks as plain torch modules: used for training, and the numerical truth for every faster form."""
