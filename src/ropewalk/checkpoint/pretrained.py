"""A model with its tokenizer, from whatever names one: a Hugging Face directory, a run, a
checkpoint, a GGUF file, a preset."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ropewalk import models
from ropewalk.checkpoint import hf, manager, readers, safetensors, weights
from ropewalk.checkpoint.integrity import MANIFEST, read_manifest
from ropewalk.core import dtypes
from ropewalk.core.errors import CheckpointError, ConfigError, ModelError
from ropewalk.core.log import log
from ropewalk.layers.decode import Decoder, Sampling
from ropewalk.layers.lm import held, parameters, table, with_parameters
from ropewalk.parallel.axes import Placement, shardings
from ropewalk.text import parts
from ropewalk.text import tokenizer as tokenizers
from ropewalk.text.interface import StreamDecoder, Tokenizer, checked

# Directories of a run.
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    """natural logarithm of each token's probability"""


@dataclasses.dataclass
class Pretrained:
    """Weights in memory, ready to give logits, to write text, and to be saved."""

    family: Any
    config: Any
    params: dict[str, jax.Array]
    tokenizer: Tokenizer | None
    source: str

    @cached_property
    def structure(self) -> Any:
        """The abstract model."""
        return abstract(self.family, self.config)

    @cached_property
    def decoder(self) -> Decoder:
        """What writes; compiled programs are kept in it."""
        return Decoder(with_parameters(self.structure, self.params))

    def logits(self, tokens: Any) -> np.ndarray:
        """Logits float32 [b, t, v] of token ids [b, t] (lists, numpy or jax). Raises ModelError for
        anything else and for ids out of range."""
        ids = _integers(tokens)
        if ids is None or ids.ndim != 2 or ids.size == 0:
            raise ModelError(
                f"tokens are whole numbers [b, t], every row as long; these are {tokens!r:.80}"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            outside = ids.min() if ids.min() < 0 else ids.max()
            raise ModelError(
                f"token {outside} is outside the vocabulary of {self.config.vocab_size}"
            )
        if ids.shape[1] > self.config.longest():
            raise ModelError(
                f"{ids.shape[1]} tokens are more than the model's "
                f"{self.config.longest()} positions; "
                f"shorten the sequence"
            )
        return np.asarray(self._logits(self.params, jnp.asarray(ids, jnp.int32)))

    @cached_property
    def _logits(self) -> Any:
        return jax.jit(lambda params, ids: with_parameters(self.structure, params)(ids)[0])

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]] | str,
        max_new_tokens: int | None = None,
        **sampling: Any,
    ) -> list[Generation]:
        """One Generation a prompt: texts, or lists of ids. `sampling`: temperature, top_k, top_p,
        seed.

        Writing stops at the tokenizer's end token, which is not part of the text, or at
        `max_new_tokens`: by default 128, or as many as the longest prompt leaves positions for.
        Raises a UserError.
        """
        if not isinstance(prompts, str | Sequence | np.ndarray | jax.Array):
            raise ModelError(f"prompts are a list of texts or of ids, not {prompts!r:.80}")
        many = [prompts] if isinstance(prompts, str) else prompts
        ids = [self._ids(row, prompt) for row, prompt in enumerate(many)]
        settings = Sampling.parse({"max_new_tokens": max_new_tokens, **sampling}, "generate")
        stops = self.tokenizer.eos_ids if self.tokenizer else ()
        tokens: list[list[int]] = [[] for _ in ids]
        logprobs: list[list[float]] = [[] for _ in ids]
        for emitted in self.decoder.stream(ids, settings, stops) if ids else ():
            tokens[emitted.row].append(emitted.token)
            logprobs[emitted.row].append(emitted.logprob)
        return [
            Generation(self.decode(t, stops, follows=True), t, p)
            for t, p in zip(tokens, logprobs, strict=True)
        ]

    def stream(
        self, ids: Sequence[int], sampling: Sampling, follows: bool = False
    ) -> Iterator[str]:
        """The text after one prompt, piece by piece (one a token, and the rest); never half a
        character; `follows` as of `decode`. Raises ModelError at once where the tokenizer is
        missing or the text cannot fit.
        """
        tokenizer = self.require_tokenizer()
        written = self.decoder.stream([ids], sampling, tokenizer.eos_ids)

        def pieces() -> Iterator[str]:
            decoder = StreamDecoder(tokenizer, follows)
            for emitted in written:
                if emitted.token not in tokenizer.eos_ids:
                    yield decoder.feed(emitted.token)
            yield decoder.finish()

        return pieces()

    def encode(self, prompt: str) -> list[int]:
        """A prompt's ids, with BOS where the tokenizer puts it; an empty prompt is BOS alone where
        there is one. Raises a UserError for what is no text."""
        tokenizer = self.require_tokenizer()
        ids = tokenizer.encode_prompt(checked(prompt))
        return ids or ([tokenizer.bos_id] if tokenizer.bos_id is not None else [])

    def _ids(self, row: int, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.encode(prompt)
        ids = _integers(prompt)
        if ids is None or ids.ndim != 1:
            raise ModelError(
                f"prompt {row} is {prompt!r:.80}; give a text, or a list of ids (whole numbers)"
            )
        return ids.tolist()

    def decode(
        self, tokens: Sequence[int], stops: Sequence[int] = (), follows: bool = False
    ) -> str:
        """The text of ids, without the tokens that end it; empty without a tokenizer. What
        `follows` other text keeps a space at its beginning."""
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode([token for token in tokens if token not in stops], follows)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ModelError when the source came without one."""
        if self.tokenizer is None:
            raise ModelError(
                f"{self.source}: has no tokenizer; give token ids, or add its tokenizer.json"
            )
        return self.tokenizer

    def save(self, directory: str | Path, dtype: str | None = None) -> Path:
        """Writes a Hugging Face directory in `dtype` (by default that of the weights). Raises
        ModelError."""
        tensors = weights.export(self.params, self.family.WEIGHTS, table(self.structure))
        kept = dtype or str(self.params["embed.weight"].dtype)
        config = self.config.to_hf()
        if self.tokenizer is not None:
            eos = self.tokenizer.eos_ids
            config |= {
                "bos_token_id": self.tokenizer.bos_id,
                "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
            }
            config |= {"pad_token_id": self.tokenizer.pad_id}
        return hf.write(directory, config, tensors, dtype=kept, tokenizer=self.tokenizer)


def _integers(values: Any) -> np.ndarray | None:
    """An array of whole numbers, or None for anything else."""
    try:
        array = np.asarray(values)
    except ValueError:  # rows of several lengths
        return None
    return array if np.issubdtype(array.dtype, np.integer) or array.size == 0 else None


def abstract(family: Any, config: Any) -> Any:
    """The model's structure: shapes and axes, no numbers."""
    return jax.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0)))


Place = Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that is named and not yet in memory."""

    kind: str
    named: models.Named
    tensors: dict[str, Any]
    """each stored tensor's record by name; none of a preset"""
    dtype: str
    """of its weights as they are stored"""
    read: Callable[[str, Place], dict[str, jax.Array]]
    """the weights by path, in a dtype and placed by shardings; by default on the first device"""
    tokenizer: Callable[[], Tokenizer | None]


def load(
    source: str | os.PathLike[str], dtype: str | None = None, placement: Placement | None = None
) -> Pretrained:
    """The model that `source` names: a Hugging Face directory, a run or one of its checkpoints, a
    GGUF file, or a preset.

    `dtype` is float32, bfloat16 or float16; by default that of the file (float32 for GGUF and for a
    preset, whose weights are random with seed 0). The weights lie on the first device, or spread as
    `placement` says. Raises a UserError when it is none of these, or unsound.
    """
    asked = None if dtype is None else str(dtypes.parse(dtype))
    found = find(source)
    try:
        kept = asked or str(dtypes.parse(found.dtype))
    except ConfigError as error:
        file = Path(source) / hf.CONFIG
        raise ModelError(f"{file}: {error}, or name another with --dtype") from None
    place = placement and shardings(table(abstract(*found.named)), placement)
    params = found.read(kept, place)
    return Pretrained(*found.named, params, found.tokenizer(), str(source))


def find(source: str | os.PathLike[str]) -> Source:
    """What `load` would load. Raises a UserError."""
    if not isinstance(source, str | os.PathLike):
        raise ModelError(f"a model is named by a text or a path, not by {source!r:.80}")
    found = stored(Path(source).expanduser())
    if found is None and str(source) in models.presets():
        found = _preset(str(source))
    if found is None:
        raise no_model(source)
    return found


def stored(path: Path) -> Source | None:
    """The model in a file or directory, or None."""
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path)
    if path.is_dir():
        checkpoints = _checkpoints_in(path)
        if checkpoints:
            return _checkpoint(checkpoints)
        if (path / hf.CONFIG).exists():
            return _hf(path)
    return None


def no_model(source: str | os.PathLike[str]) -> ModelError:
    """Why `source` names no model: what there is instead, or the preset whose name is nearest."""
    path, presets = Path(source).expanduser(), models.presets()
    if path.is_dir():
        found = safetensors.listing(path)
        return ModelError(
            f"{source}: holds no model: no checkpoint and no {hf.CONFIG}; found: {found}"
        )
    known = "a Hugging Face directory, a run, a .gguf file, or a preset"
    if path.exists():
        return ModelError(f"{source}: is no model; give {known}")
    listed = "" if os.sep in str(source) else f" ({', '.join(presets)})"
    hint = models.near(str(source), presets) or listed
    return ModelError(f"{source}: does not exist, and no preset has that name; give {known}{hint}")


def _checkpoints_in(path: Path) -> list[Path]:
    """Directories of steps: the path itself, or those of a run or its `checkpoints`, newest
    first."""
    if (path / MANIFEST).is_file():
        return [path]
    places = [place for place in (path, path / CHECKPOINTS) if place.is_dir()]
    return [place / str(step) for place in places for step in reversed(manager.steps(place))]


def _first_good[T](candidates: list[Path], read: Callable[[Path], T]) -> T:
    """What `read` gives for the first candidate that is whole; passes over others with a warning.

    Raises the first one's CheckpointError when none is.
    """
    failures: list[CheckpointError] = []
    for candidate in candidates:
        try:
            result = read(candidate)
        except CheckpointError as error:
            failures.append(error)
            if candidate is not candidates[-1]:
                log.warning("%s; trying the step before", error)
            continue
        return result
    raise failures[0]


def _hf(path: Path) -> Source:
    directory = hf.read(path)
    named = models.from_hf(directory.config, str(path / hf.CONFIG))
    dtype = directory.config.get("torch_dtype") or directory.config.get("dtype") or "float32"

    def tokenizer() -> Tokenizer | None:
        return tokenizers.load(path) if directory.tokenizer_files else None

    read = _reading(named, directory.reader)
    return Source("Hugging Face directory", named, directory.tensors, str(dtype), read, tokenizer)


def _gguf(path: Path) -> Source:
    from ropewalk.checkpoint import gguf  # start-up time

    file = gguf.read(path)
    family = models.from_gguf(file.architecture, str(path))
    described = file.described(family.Config.model_fields)
    named = models.Named(family, family.Config.from_gguf(described, str(path)))

    def tokenizer() -> Tokenizer:
        return _gguf_tokenizer(file.tokenizer, str(path))

    read = _reading(named, file.reader(named.family.WEIGHTS))
    return Source("GGUF file", named, file.tensors, "float32", read, tokenizer)


def _reading(named: models.Named, reader: readers.Reader) -> Any:
    def read(dtype: str, place: Place) -> dict[str, jax.Array]:
        rules, specs = named.family.WEIGHTS, table(abstract(*named))
        unused = named.config.unused()
        return weights.load_into(reader, rules, specs, place, dtype, unused)

    return read


def _gguf_tokenizer(found: dict[str, Any], name: str) -> Tokenizer:
    known = {"tokens", "merges", "scores", "pre"} & found.keys()
    others = {
        "add_bos": "add_bos_token",
        "add_space_prefix": "add_space_prefix",
        "unk_id": "unk_token_id",
    }
    described = parts.Parts(
        model=found["kind"],
        token_type=found.get("token_types", ()),
        **{key: found[key] for key in known},
        **{ours: found[theirs] for ours, theirs in others.items() if theirs in found},
    )
    turn = found.get("eot_token_id", parts.end_of_turn(described))
    ends = [found.get("eos_token_id"), turn, found.get("eom_token_id")]
    roles = tokenizers.Roles(
        found.get("bos_token_id"),
        tuple(dict.fromkeys(end for end in ends if end is not None)),
        found.get("pad_token_id"),
        found.get("chat_template"),
    )
    return parts.build(described, roles, name)


def _checkpoint(candidates: list[Path]) -> Source:
    manifest = _first_good(candidates, read_manifest)
    home = candidates[0].parent.parent / TOKENIZER
    dtype = next(
        record.dtype for name, record in manifest.arrays.items() if name.startswith("params.")
    )

    named = models.from_recipe(manifest.recipe["model"])

    def arrays(step: Path) -> dict[str, np.ndarray]:
        return manager.read_arrays(step, "params") | manager.read_arrays(step, "frozen")

    def read(dtype: str, place: Place) -> dict[str, jax.Array]:
        found, specs = _first_good(candidates, arrays), table(abstract(*named))
        return {
            path: jax.device_put(array.astype(specs[path].held_in(dtype)), place and place[path])
            for path, array in found.items()
        }

    def tokenizer() -> Tokenizer | None:
        return tokenizers.load(home) if home.is_dir() else None

    return Source("checkpoint", named, manifest.arrays, dtype, read, tokenizer)


def _preset(name: str) -> Source:
    named = models.presets()[name]

    def read(dtype: str, place: Place) -> dict[str, jax.Array]:
        def make() -> dict[str, jax.Array]:
            model = named.family.Model(named.config, rngs=nnx.Rngs(0))
            return held(parameters(model), table(model), dtype)

        return jax.jit(make, out_shardings=place)()

    return Source("preset", named, {}, "float32", read, lambda: None)
