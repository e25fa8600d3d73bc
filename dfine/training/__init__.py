"""Steps, runs and optimizers."""
