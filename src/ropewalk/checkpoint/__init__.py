"""Saved models and train states: native checkpoints, and the formats of others. Knows no
training."""
