"""Optimizers, schedules and gradient clipping: optax chains over a flat dict of parameters."""
