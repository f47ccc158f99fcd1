"""Every rule finds the offence it is there for, and leaves honest code alone."""

from pathlib import Path
from textwrap import dedent

import pytest

from tests.structure import rules

FAMILY = rules.family_name({"llama", "qwen3", "qwen3_moe"})
LONG = "def f():\n" + "    x = 1\n" * rules.FUNCTION_LINES
TEN = ", ".join(f"a{i}" for i in range(rules.CONSTRUCTOR_PARAMETERS))

OFFENCES: list[tuple[rules.Rule, str, str]] = [
    (rules.function_length, "ops/a.py", LONG),
    (rules.function_length, "ops/a.py", LONG.replace("def", "async def")),
    (rules.file_length, "ops/a.py", "x = 1\n" * (rules.FILE_LINES + 1)),
    (rules.constructor_parameters, "a.py", f"class A:\n  def __init__(self, {TEN}, b): ..."),
    (rules.constructor_parameters, "a.py", f"class A:\n  def __init__(self, {TEN}, *, b): ..."),
    (rules.module_name, "ops/utils.py", ""),
    (rules.module_name, "common/rope.py", ""),
    (rules.module_name, "train/step_helpers.py", ""),
    (rules.module_name, "train/_misc.py", ""),
    (rules.module_name, "ops/rope_deprecated.py", ""),
    (rules.no_assert, "ops/a.py", "def f(x):\n  assert x > 0"),
    (rules.local_import, "ops/a.py", "def f():\n  import numpy"),
    (rules.local_import, "ops/a.py", "def f():\n  from numpy import array  # noqa: PLC0415"),
    (rules.local_import, "ops/a.py", "def f():\n  # a reason\n  x = 1\n  import numpy"),
    (rules.config_read, "layers/a.py", "class A:\n  def __call__(self, x): return self.config.y"),
    (rules.config_read, "layers/a.py", "class A:\n  def __call__(self, x): return self.c.y"),
    (rules.config_read, "models/a.py", "class A:\n  def __call__(self, config): return config.y"),
    (rules.config_read, "models/a.py", "class A:\n  def __call__(self, x): return x if run else 0"),
    (
        rules.config_read,
        "models/a.py",
        """
        class A:
            def __call__(self, x):
                return self.hidden(x)

            def hidden(self, x):
                return self.block.config.y
        """,
    ),
    (FAMILY, "layers/a.py", "kind = 'llama'"),
    (FAMILY, "layers/a.py", "kind = 'ropewalk.models.llama'"),
    (FAMILY, "layers/a.py", "from ropewalk.models import llama"),
    (FAMILY, "layers/a.py", "import ropewalk.models.qwen3_moe"),
    (FAMILY, "layers/a.py", "def is_llama(x): ..."),
    (FAMILY, "layers/a.py", "class LlamaBlock: ..."),
    (FAMILY, "layers/a.py", "f(qwen3=1)"),
    (FAMILY, "models/qwen3.py", "from ropewalk.models import llama"),
    (rules.forbidden_name, "data/a.py", "import pickle"),
    (rules.forbidden_name, "data/a.py", "from pickle import loads"),
    (rules.forbidden_name, "data/a.py", "import numpy as np\nnp.load(p, allow_pickle=True)"),
    (rules.forbidden_name, "data/a.py", "import yaml\nyaml.load(text, yaml.Loader)"),
    (rules.forbidden_name, "data/a.py", "import torch.nn"),
    (rules.forbidden_name, "data/a.py", "from transformers import AutoModel"),
    (rules.forbidden_name, "data/a.py", "from flax import linen"),
    (rules.forbidden_name, "data/a.py", "from flax import nnx\n@nnx.jit\ndef f(): ..."),
    (rules.forbidden_name, "layers/a.py", "class A:\n  def f(self): self.sow(1)"),
    (rules.forbidden_name, "ops/a.py", "from jax.experimental import pallas as pl"),
    (rules.forbidden_name, "ops/a.py", "from jax.experimental.pallas import tpu"),
    (rules.skipped_test, "a.py", "import pytest\n@pytest.mark.skip\ndef test_a(): ..."),
    (rules.skipped_test, "a.py", "import pytest\n@pytest.mark.skip(reason='slow')\ndef t(): ..."),
    (rules.skipped_test, "a.py", "from pytest import mark\n@mark.xfail\ndef test_a(): ..."),
    (rules.skipped_test, "a.py", "import pytest\npytest.importorskip('torch')"),
    (rules.skipped_test, "a.py", "import pytest as p\np.skip('flaky')"),
    (rules.skipped_test, "a.py", "import unittest\n@unittest.skipIf(True, 'slow')\ndef t(): ..."),
    (rules.skipped_test, "a.py", "import pytest\nx = pytest.param(1, marks=pytest.mark.skip)"),
]

HONEST: list[tuple[rules.Rule, str, str]] = [
    (rules.function_length, "ops/kernels/a.py", LONG),
    (rules.function_length, "ops/a.py", LONG.removesuffix("    x = 1\n")),
    (rules.file_length, "ops/a.py", "x = 1\n" * rules.FILE_LINES),
    (rules.constructor_parameters, "a.py", f"class A:\n  def __init__(self, {TEN}): ..."),
    (rules.constructor_parameters, "a.py", f"def f({TEN}, b, c): ..."),
    (rules.module_name, "ops/commonality.py", ""),
    (rules.no_assert, "ops/a.py", "def f(x):\n  raise ValueError(x)"),
    (rules.local_import, "ops/a.py", "import numpy"),
    (rules.local_import, "cli/a.py", "def f():\n  import numpy"),
    (rules.local_import, "ops/a.py", "def f():\n  import wandb  # optional dependency"),
    (rules.local_import, "ops/a.py", "def f():\n  # optional\n  import wandb\n  import wandb.x"),
    (rules.config_read, "train/a.py", "class A:\n  def __call__(self, x): return self.config.y"),
    (rules.config_read, "layers/a.py", "class A:\n  def __init__(self, config): self.y = config.y"),
    (rules.config_read, "layers/a.py", "class A:\n  def __call__(self, c): return self.configure"),
    (FAMILY, "models/llama.py", "kind = 'llama'\ndef llama(): ..."),
    (FAMILY, "layers/a.py", '"""Depth. llama has a unit of 1."""'),
    (FAMILY, "layers/a.py", "scaling = 'llama3'\ndef rope_llama3(): ..."),
    (FAMILY, "layers/a.py", "harmless = {'is_llama_config', 'LlamaTokenizer'}"),
    (FAMILY, "text/parts.py", "kind = 'llama'"),
    (FAMILY, "recipes/a.py", "kind = 'llama'"),
    (rules.forbidden_name, "data/a.py", "import yaml\nyaml.safe_load(text)"),
    (rules.forbidden_name, "data/a.py", "torchlike = 1\nfrom flax import nnx\nnnx.Module"),
    (rules.forbidden_name, "ops/kernels/a.py", "from jax.experimental import pallas as pl"),
    (rules.skipped_test, "a.py", "import pytest\npytest.skip('needs a GPU')"),
    (rules.skipped_test, "a.py", "data.skip(5)\nskip = 3"),
]


@pytest.mark.parametrize(("rule", "path", "text"), OFFENCES)
def test_rule_finds_the_offence(rule: rules.Rule, path: str, text: str) -> None:
    found = list(rule(rules.Source(Path(path), dedent(text))))
    assert len(found) == 1
    assert found[0].startswith(f"{path}:")


@pytest.mark.parametrize(("rule", "path", "text"), HONEST)
def test_rule_leaves_honest_code_alone(rule: rules.Rule, path: str, text: str) -> None:
    assert not list(rule(rules.Source(Path(path), dedent(text))))
