"""Objectives: `(model, batch, key) -> LossOutput`, every number in it a pair (sum, weight)."""
