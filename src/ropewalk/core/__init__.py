"""The ground floor: configuration, errors, paths to leaves, dtypes, storage and logging. Knows no
model."""
