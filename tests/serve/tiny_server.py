"""A tiny model with a tokenizer and a chat template in a Hugging Face directory, and a real server
of it in a thread of this process."""

import asyncio
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import uvicorn
from flax import nnx

from ropewalk import models
from ropewalk.checkpoint.pretrained import Pretrained
from ropewalk.layers.lm import parameters
from ropewalk.serve import wire
from ropewalk.serve.launch import build
from ropewalk.serve.openai import Server
from ropewalk.serve.options import Options
from ropewalk.text.tokenizer import byte_tokenizer

LENGTH = 1024
# Qwen's, in short: it mentions its way to call tools, and that it may think.
TEMPLATE = """{%- if tools %}<|system|>You may call: <tool_call>{"name": ..., "arguments": ...}\
</tool_call>
{%- for tool in tools %} {{ tool | tojson }}{% endfor %}
{% endif -%}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>\
{% endfor %}
{% endfor -%}
{% if add_generation_prompt %}<|assistant|>{% endif %}{# </think> #}"""
# gpt-oss's, in short: channels, and tools that have a description.
CHANNELED = (
    TEMPLATE.replace("<|assistant|>", "{{ reasoning_effort }}<|start|>assistant").replace(
        "{{ tool |", "{{ tool.function.description + '' }}{{ tool |"
    )
    + "{# <|channel|>final<|message|> to=functions.name message.thinking #}"
)
CONFIG: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": LENGTH, "tie_word_embeddings": False,
}  # fmt: skip


def tiny_model(directory: Path, family: str = "llama") -> Path:
    """Writes the model; its weights are random and far from zero, so that it says something."""
    made = models.family(family)
    config = made.Config.parse(CONFIG, "tiny")
    model = made.Model(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    params = {
        path: jax.numpy.asarray(
            value if value.ndim < 2 else rng.normal(0, 0.3, value.shape).astype(np.float32)
        )
        for path, value in parameters(model).items()
    }
    tokenizer = byte_tokenizer()
    tokenizer.roles = dataclasses.replace(tokenizer.roles, chat_template=TEMPLATE)
    return Pretrained(made, config, params, tokenizer, "tiny").save(directory)


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """The address of a running server."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    web = uvicorn.Server(wire.config(server.app))
    thread = threading.Thread(target=lambda: asyncio.run(web.serve([listening])))
    thread.start()
    while not web.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        web.should_exit = True
        thread.join(timeout=60)
        listening.close()


def options(directory: Path, **more: Any) -> Options:
    return Options(str(directory), name="tiny", slots=4, queue=64, **more)


def tiny(directory: Path, keys: tuple[str, ...] = (), **more: Any) -> Server:
    return build(options(tiny_model(directory), **more), keys)
