"""Native checkpoints: round trips across shardings, keep-policy, other models, several processes."""
