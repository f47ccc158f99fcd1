"""The parts that families are made of: NNX modules that hold parameters and know no model's
name."""
