"""Errors that a user can mend. Each says what failed, the numbers that disagree, and the key to
change."""


class UserError(ValueError):
    """A mistake in a recipe, a file or a command; the command line prints it as one paragraph, exit
    code 2."""


class ConfigError(UserError):
    """A key or value in a recipe or a model config."""


class DataError(UserError):
    """A data file, column or tokenizer that cannot be read or does not fit."""


class ModelError(UserError):
    """A model directory, family or weight that is unknown, missing or misshapen."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, absent or belongs to another model."""


class LayoutError(UserError):
    """A mesh, sharding rule or batch that does not divide over the devices."""


class TrainingError(UserError):
    """A run that cannot go on: losses stayed non-finite, or the data ended before the last step."""
