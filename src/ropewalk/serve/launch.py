"""From a model's name to a listening server, and its end."""

import asyncio
import errno
import os
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import uvicorn

from ropewalk.checkpoint.pretrained import Pretrained, load
from ropewalk.core.compilation import keep_programs, release_compiler_memory
from ropewalk.core.errors import ConfigError, LayoutError
from ropewalk.core.log import log
from ropewalk.core.memory import free_memory
from ropewalk.layers.lm import LM, with_parameters
from ropewalk.parallel import mesh
from ropewalk.parallel.axes import Placement
from ropewalk.parallel.rules import RULES
from ropewalk.serve import wire
from ropewalk.serve.engine import Engine
from ropewalk.serve.generation import Host
from ropewalk.serve.grammar import Grammars
from ropewalk.serve.metrics import Metrics
from ropewalk.serve.openai import Server
from ropewalk.serve.options import Options
from ropewalk.serve.service import Service
from ropewalk.serve.sizes import Sizes

# Most tokens of a sequence, and tokens that a draft model guesses, where nothing is said.
_LENGTH, _DRAFTS = 4096, 4
# Of the memory that is free when the weights are there, how much pages may take: the rest is for
# what a step computes.
_SHARE = 0.7
_KEY = "ROPEWALK_API_KEY"


def launch(options: Options) -> None:
    """Serves until it is told to stop. Raises UserError for what cannot be served."""
    keep_programs()
    if options.cache not in ("", "int8"):
        raise ConfigError(f"--cache {options.cache}: use int8, or leave it out")
    keys = _keys(options.api_key_file)
    listening = _listen(options.host, options.port)
    server = build(options, keys)
    port = listening.getsockname()[1]
    web = uvicorn.Server(wire.config(server.app))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        serving = asyncio.ensure_future(web.serve(sockets=[listening]))
        while not web.started and not serving.done():
            await asyncio.sleep(0.01)
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, lambda: loop.create_task(stop()))
        base = f"http://{options.host}:{port}"
        log.info(
            "%s is served at %s (Ctrl+C ends it); try\n  curl %s/v1/chat/completions -H "
            '\'content-type: application/json\' -d \'{"model": "%s", "messages": [{"role": "user", '
            '"content": "Hello"}]}\'',
            server.host.name, base, base, server.host.name,
        )  # fmt: skip
        await serving

    async def stop() -> None:
        if server.draining:
            log.info("stopping now: %d answers are cut", server.host.service.open)
        else:
            log.info("stopping: what is being answered has %g s to end", options.drain)
        await server.drain()
        web.should_exit = True

    asyncio.run(run())


def build(options: Options, keys: tuple[str, ...] = ()) -> Server:
    """The server of a model, its programs compiled."""
    placement = _placement(options.rules)
    lm = load(options.model, options.dtype or None, placement)
    tokenizer = lm.require_tokenizer()
    name = options.name or _name(options.model)
    engine = _engine(lm, options, placement)
    # Its process takes a second to start: beside the compiler, not beside the first request.
    ends = any(token < engine.vocab for token in tokenizer.eos_ids)
    grammars = Grammars(tokenizer, engine.vocab) if ends else None
    started = time.monotonic()
    for done, total in engine.warm():
        _progress(f"compiling programs: {done} of {total}, {time.monotonic() - started:.0f} s")
    _progress("", end=True)
    release_compiler_memory()
    metrics = Metrics(name)
    service = Service(engine, options.queue, metrics, options.trace)
    host = Host(name, tokenizer, service, grammars, metrics, int(time.time()))
    return Server(host, keys, options.drain)


def _name(model: str) -> str:
    """The last part of a path, or of a preset's name."""
    # Links stay: those of a cache lead to files that are named by a digest.
    path = os.path.abspath(Path(model).expanduser())
    return Path(path).name.removesuffix(".gguf")


def _placement(rules: str) -> Placement | None:
    """Raises LayoutError for rules that there are not."""
    if not rules:
        return None
    if rules not in RULES:
        raise LayoutError(f"--rules {rules}: use {', '.join(RULES)}, or none for one device")
    devices = jax.devices()
    sizes = mesh.default_sizes(rules, len(devices))
    return Placement(mesh.build(sizes, devices), RULES[rules], f"--rules {rules}")


def _engine(lm: Pretrained, options: Options, placement: Placement | None) -> Engine:
    draft = _draft(lm, options, placement)
    length = options.max_length or min(lm.config.longest(), _LENGTH)
    drafts = options.drafts
    if drafts is None:
        drafts = 0 if draft is None else _DRAFTS
    memory = int(_SHARE * free_memory(jax.local_devices() if placement else jax.devices()[:1]))
    cache = options.cache or None
    sizes = Sizes(options.slots, length, drafts=drafts, memory=memory, cache=cache)
    engine = Engine(_handed(lm), sizes, draft)
    held = engine.pages_bytes / 2**30
    log.info("the cache takes %.2f GiB of %.2f that may be taken", held, memory / 2**30)
    return engine


def _draft(lm: Pretrained, options: Options, placement: Placement | None) -> LM | None:
    """The model that guesses ahead, if there is one. Raises ConfigError for other tokens."""
    if not options.draft_model or options.drafts == 0:
        return None
    draft = load(options.draft_model, options.dtype or None, placement)
    if draft.require_tokenizer().vocabulary != lm.require_tokenizer().vocabulary:
        raise ConfigError(
            f"{options.draft_model} has other tokens than {options.model}, and cannot guess for "
            "it: take a --draft-model with the same tokenizer"
        )
    return _handed(draft)


def _handed(lm: Pretrained) -> LM:
    """The model, of which nobody else keeps the weights: an engine makes them ready for itself."""
    params, lm.params = lm.params, {}
    return with_parameters(lm.structure, params)


def _keys(path: Path | None) -> tuple[str, ...]:
    """Raises ConfigError for a file that cannot be read, or has no key."""
    if path is None:
        key = os.environ.get(_KEY, "").strip()
        return (key,) if key else ()
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(
            f"--api-key-file {path} cannot be read ({reason}): give a file with a key a line"
        ) from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ConfigError(
            f"--api-key-file {path} holds no key: write one a line, or leave the option out"
        )
    return keys


def _listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError for an address that is not ours to take: before minutes of compiling."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        ours = error.errno in (errno.EADDRINUSE, errno.EACCES)
        change = "choose another --port, or 0 for a free one"
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({error.strerror}); "
            + (change if ours else "--host is an address of this machine, or 0.0.0.0 for all")
        ) from None
    return listening


def _progress(line: str, end: bool = False) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{line:60}" + ("\n" if end else ""))
    elif line:
        log.info(line)
