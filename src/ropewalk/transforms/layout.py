"""The layout of a run: mesh, rules, how the stack is run and what it keeps. The only code that sets
these on a model."""

from typing import Any, Literal

import jax
import pydantic
from flax import nnx

from ropewalk.core.config import Config
from ropewalk.core.errors import LayoutError
from ropewalk.core.log import log
from ropewalk.layers import dispatch
from ropewalk.layers.attention import Attention
from ropewalk.layers.lm import LM
from ropewalk.layers.mla import LatentAttention
from ropewalk.layers.moe import MoE
from ropewalk.ops import attention
from ropewalk.parallel import mesh
from ropewalk.parallel.axes import Placement
from ropewalk.parallel.remat import Remat
from ropewalk.parallel.rules import RULES


class Layout(Config):
    """How a model lies on devices and runs there; a bare string names the rules. None of it changes
    the mathematics, but for experts that drop tokens."""

    rules: Literal["fsdp", "tensor", "fsdp_tensor", "fsdp_expert"] = "fsdp"
    """the table that spreads parameters and activations over the mesh"""
    mesh: dict[str, int] | None = None
    """devices along each axis, -1 for the rest; by default what the rules need"""
    stack: Literal["scan", "unroll"] = "scan"
    """one compiled block looped over, or every block compiled in place"""
    remat: Remat = "none"
    """what the backward pass computes again"""
    attention: Literal["auto", "reference", "sequential", "library"] = "auto"
    experts: Literal["auto", "dense", "dropless", "capacity"] = "auto"
    """how tokens come to the experts that they choose: `dense` runs every expert on every token;
    `capacity` drops the choices that find no place, which does change the mathematics"""
    capacity_factor: float = pydantic.Field(default=1.25, gt=0)
    """capacity: places of an expert in a row, over its fair share of the row's choices"""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _by_name(cls, values: Any) -> Any:
        return {"rules": values} if isinstance(values, str) else values

    def place(self) -> Placement:
        """The mesh over all devices, with the rules. Raises LayoutError when it does not fit
        them."""
        sizes = self.mesh or mesh.default_sizes(self.rules, jax.device_count())
        built, rules = mesh.build(sizes), RULES[self.rules]
        named = {axis for axes in rules.values() for axis in axes}
        idle = [axis for axis, size in built.shape.items() if size > 1 and axis not in named]
        if idle:
            raise LayoutError(
                f"layout.mesh has {built.shape[idle[0]]} devices along `{idle[0]}`, and "
                f"layout.rules = {self.rules} spreads nothing over it: they would repeat each "
                "other's work. Choose rules that name it, or other axes"
            )
        return Placement(built, rules)

    def apply(self, model: LM, placement: Placement) -> LM:
        """Sets how the model runs where it is placed; returns the same model."""
        model.layers.run = self.stack
        model.layers.remat = self.remat
        name, attend = attention.choose(self.attention, placement.platform, placement.mesh.size)
        if self.attention == "auto":
            log.debug("attention: auto chose %s for %s", name, placement.platform)
        dispatched = dispatch.choose(self.experts, self.capacity_factor)
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Attention | LatentAttention):
                module.attend = attend
            elif isinstance(module, MoE):
                module.dispatch = dispatched
        return model
