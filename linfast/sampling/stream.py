"""sample_stream: any number of samples in bounded memory, the same whichever process computes them.

Rows are computed in blocks of fixed size. The noise of block b is drawn by its own generator, seeded from
(seed, b), and one call of the model computes the whole block. A row therefore does not depend on the batch
size, on the count, on where an interrupted run stopped, or on how many processes share the work.
It depends on the kind of device and, in its last bits, on the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import check_count, check_counts, check_dense, check_flag, check_kind, with_article
from ..density import Density
from ..dispatch import check_values, tensors_of
from ..flows.bijection import Bijection, Inverse
from ..freeze import Frozen
from ..io import described
from ..linearizer import Linearizer
from ..state import is_foreign, settings, slots
from .collapsed import first_floating, in_eval_mode
from .outputs import NpyFile, check_array
from .sampler import at_work, generator, to_data
from .workers import Workers, make_pipeline

_BLOCK = 1024  # rows per block: enough for products at full speed, and 50 MB at the paper's largest size


def sample_stream(
    f: nn.Module,
    count: int,
    batch_size: int = 4096,
    out: np.ndarray | Tensor | str | os.PathLike[str] | None = None,
    seed: int = 0,
    *,
    steps: int = 100,
    method: str = "rk4",
    stop: float | None = None,
    noise_shape: tuple[int, ...] | None = None,
    block_size: int = _BLOCK,
    progress: bool | None = None,
    cuda_graph: bool = True,
    overwrite: bool = False,
) -> Any:
    """``count`` samples from standard normal noise.

    Args:
        f: a Linearizer with a time-dependent A, sampled in one step; a Density with the standard normal base and
            no context; or any module that maps noise [B, *noise_shape] to samples, such as
            ``generator(f, tol=1e-6)``, or ``Inverse(p.flow.at(context=c))`` for a Density p and a context [1, C].
        count: number of samples.
        batch_size: samples per batch of an iterator; samples per process between two commits of a file, rounded
            up to whole blocks.
        out: an array or a tensor [count, ...] to fill; the path of a .npy file; or None for an
            iterator of batches. The file has a record beside it, ``out`` + ".json", and the same call
            after an interruption resumes after the last commit. The file is locked against other runs,
            except on Windows.
        seed: an integer of at least 0, which determines the noise.
        steps, method, stop: as for ``collapse``, where f is time-dependent.
        noise_shape: the shape of one sample's noise; not needed for a Linearizer or a Density.
        block_size: rows per block. Another block size gives other samples.
        progress: show a progress bar (with tqdm, on a terminal) or a line every few seconds; by default on a
            terminal only.
        cuda_graph: on a GPU, capture the model once and replay it.
        overwrite: replace another run's file at ``out`` and its record, once the disk has space for the new file.

    f is evaluated in eval mode. Its weights must not change until the last sample, because derived weights are
    computed once. A file is resumed only by the same model: the same architecture, constants and tensors. A model
    that ``save`` cannot describe is never recognised as the same. Under torch.distributed the processes share the
    blocks: they write one file, which all must see, as one process would; an iterator yields its process's rows.

    Returns:
        The iterator; ``out``; or the file's rows as a read-only memory map.

    Raises:
        ValueError: sizes below 1, an array that does not fit, a file of another run, a damaged record, an ``out``
            that is a link or no file or cannot be written to, an f whose noise_shape is not known, that is not
            initialised, or that does not return one sample for each row of noise.
        TypeError: an f that returns no dense tensor; a Density with another base or a context.
        FileExistsError: ``out`` exists and has no record.
        BlockingIOError: another run is writing to ``out``.
        OSError: the disk has no space. Rows already committed are kept.
    """
    count, batch_size = check_count("count", count, most=2**62), check_count("batch_size", batch_size)
    block_size, seed = check_count("block_size", block_size), check_count("seed", seed, 0, most=math.inf)
    noise_shape = None if noise_shape is None else check_counts("noise_shape", noise_shape)
    check_kind("out", out, (NoneType, str, os.PathLike, np.ndarray, Tensor))
    if isinstance(out, Tensor):
        check_dense("out", out)
        check_values("out", out)
    check_flag("cuda_graph", cuda_graph)
    check_flag("overwrite", overwrite)
    if progress is not None:
        check_flag("progress", progress)
    source = _Source.of(f, seed, block_size, noise_shape, cuda_graph, steps, method, stop)
    workers = Workers.current()
    blocks = partial(_blocks, source, workers, count, batch_size, progress)
    if out is None:
        return _batches(blocks(0, None), batch_size)
    if isinstance(out, (np.ndarray, Tensor)):
        if workers.count > 1:
            raise ValueError("out must be a path or None under torch.distributed: processes share no array")
        sample = source.probe()
        check_array(out, count, sample)
        for start, rows in blocks(0, sample):
            if rows is not None:
                values: Any = rows if isinstance(out, Tensor) else rows.numpy()
                out[start : start + len(rows)] = values
        return out
    model = fingerprint(f)  # before f is called, which may change it
    sample = source.probe()
    identity = {
        "count": count, "shape": list(sample.shape), "dtype": str(sample.numpy().dtype), "seed": seed,
        **source.identity, "block_size": block_size, "device": source.device.type, "model and weights": model,
    }  # fmt: skip
    path = os.fsdecode(out)
    with NpyFile(path, identity, workers, overwrite) as file:
        if file.done < count:
            for start, rows in blocks(file.done, sample):
                file.commit(start) if rows is None else file.write(start, rows)
    return np.load(path, mmap_mode="r")


@dataclass(frozen=True)
class _Source:
    """Blocks of noise, and the model that maps them to samples."""

    model: nn.Module
    seed: int
    block: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    cuda_graph: bool
    identity: dict[str, Any]

    @classmethod
    def of(
        cls, f: nn.Module, seed: int, block: int, shape: tuple[int, ...] | None, cuda_graph: bool, *how: Any
    ) -> _Source:
        """The source for f; ``how`` is (steps, method, stop), for an f that depends on time."""
        if not isinstance(f, nn.Module):
            raise TypeError(f"f must be a Linearizer or a module from noise to samples; got {type(f).__name__}")
        check_values("f", *tensors_of(f))
        identity: dict[str, Any] = {}
        if isinstance(f, Density):
            f, shape = to_data(f), f.shape if shape is None else shape
        like, f = first_floating(f), in_eval_mode(f)
        if isinstance(f, Linearizer):
            noise_side, n = (f.g_y, f.A.n_out) if f.A.time_dependent else (f.g_x, f.A.n_in)
            shape = tuple(getattr(noise_side, "shape", None) or (n,)) if shape is None else shape
            if torch.Size(shape).numel() != n:
                raise ValueError(f"noise_shape must be of {n} elements, as many as f has latents; got {shape}")
            if f.A.time_dependent:
                steps, method, stop = how
                with at_work(f):
                    f = generator(f, *how)
                identity = {"steps": int(steps), "method": method, "stop": None if stop is None else float(stop)}
        if shape is None:
            advice = ""
            if isinstance(f, Bijection) and not isinstance(f, Inverse):
                advice = "; a flow maps data to noise: to sample it, give lf.Density(flow)"
            raise ValueError(
                f"noise_shape must be given for {with_article(type(f))}: its noise has no known shape{advice}"
            )
        identity["noise_shape"] = [int(size) for size in shape]  # Python's ints, for JSON
        return cls(f, seed, block, tuple(shape), like.device, like.dtype, cuda_graph, identity)

    def noise(self, index: int) -> Tensor:
        """The noise of block ``index``, [block, *shape]."""
        state = np.random.SeedSequence([self.seed, index]).generate_state(1, np.uint64)
        random = torch.Generator(self.device).manual_seed(int(state[0] >> np.uint64(1)))
        return torch.randn(self.block, *self.shape, generator=random, device=self.device, dtype=self.dtype)

    def probe(self) -> Tensor:
        """A CPU tensor with the shape and dtype of one sample; its values mean nothing."""
        with at_work(self.model):
            return torch.empty_like(self._block_of(self.noise(0))[0], device="cpu")

    def samples(self, blocks: Iterator[int], like: Tensor | None) -> Iterator[Tensor]:
        """The samples of each block in order, on the CPU, valid until the next block; rows are like ``like``."""
        pipeline = make_pipeline(self._block_of, self.noise(0), self.model if self.cuda_graph else None)
        for rows in pipeline(map(self.noise, blocks)):
            like = rows[0] if like is None else like
            if rows.shape[1:] != like.shape or rows.dtype != like.dtype:
                raise ValueError(
                    f"f must return samples of one shape and dtype; got {tuple(like.shape)} of {like.dtype}, "
                    f"then {tuple(rows.shape[1:])} of {rows.dtype}"
                )
            yield rows

    def _block_of(self, noise: Tensor) -> Tensor:
        """The samples of a block of noise, in a dtype that numpy has."""
        samples, kind = self.model(noise), type(self.model).__name__
        if not isinstance(samples, Tensor) or samples.layout is not torch.strided or samples.is_meta:
            got = f"{samples.layout} on {samples.device}" if isinstance(samples, Tensor) else type(samples).__name__
            raise TypeError(f"f must return samples as one dense tensor; a {kind} returned {got}")
        if samples.shape[:1] != (self.block,):
            raise ValueError(
                f"f must return a sample for each row of noise, [{self.block}, ...] for {tuple(noise.shape)}; "
                f"a {kind} returned {tuple(samples.shape)}"
            )
        samples = samples.detach().resolve_conj().resolve_neg()
        in_numpy = samples.dtype in (torch.float16, torch.float32, torch.float64)
        return samples if in_numpy or not samples.is_floating_point() else samples.float()


def _blocks(
    source: _Source, workers: Workers, count: int, batch_size: int, progress: bool | None, done: int, like: Any
) -> Iterator[tuple[int, Tensor | None]]:
    """(first row, rows) of each block of this process; after each round (number of rows done by all, None)."""
    rounds = list(workers.rounds(done, count, batch_size, source.block))
    frozen = Frozen(source.model)  # entered for each block anew: the caller must not be in its context at a yield
    with torch.no_grad(), frozen:
        samples = source.samples((b for blocks, _ in rounds for b in blocks), like)
    with workers.bar(count, done, progress) as bar:
        for blocks, end in rounds:
            for start in (b * source.block for b in blocks):
                with torch.no_grad(), frozen:
                    rows = next(samples)[: count - start]
                yield start, rows
            yield end, None
            bar.show(end)


def _batches(blocks: Iterator[tuple[int, Tensor | None]], batch_size: int) -> Iterator[Tensor]:
    """The rows of this process, ``batch_size`` at a time."""
    waiting: Tensor | None = None
    for _, rows in blocks:
        if rows is None:
            continue
        waiting = rows.clone() if waiting is None else torch.cat((waiting, rows))
        while len(waiting) >= batch_size:
            yield waiting[:batch_size].clone()
            waiting = waiting[batch_size:]
    if waiting is not None and len(waiting):
        yield waiting


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of what ``linfast.save`` would write of the model; it identifies the model of a file of samples.

    It covers the arguments of all constructors, all tensors, and of registered classes the names and settings, but
    not their code. Device, train mode and ``requires_grad`` do not count. For a model that ``save`` cannot describe
    it is a text that no other call returns.
    """
    model = getattr(model, "_orig_mod", model)  # the same for a compiled model
    try:
        architecture = json.loads(described(model)[0])["architecture"]
    except (TypeError, ValueError, AttributeError, RecursionError) as reason:
        return f"{secrets.token_hex(8)}, cannot be told from another model, for no file can describe it: {reason}"
    kept = sorted(pair for module in model.modules() if is_foreign(module) for pair in settings(module))
    tensors = {name: slot.tensor for name, slot in sorted(slots(model).items())}
    return digest([json.dumps(architecture, sort_keys=True), kept, tensors])


def digest(value: Any) -> str:
    """SHA-256 of tensors, numbers, strings and None, and of lists, tuples and dictionaries of them.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        found = hashlib.sha256(f"tensor {plain.dtype} {tuple(plain.shape)} ".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
        return found.hexdigest()
    if isinstance(value, (dict, list, tuple)):
        kind, items = ("dict", [*value.items()]) if isinstance(value, dict) else ("list", value)
        return hashlib.sha256(" ".join((kind, *map(digest, items))).encode()).hexdigest()
    if value is not None and not isinstance(value, (bool, int, float, complex, str, bytes)):
        raise TypeError(f"a {type(value).__name__} cannot be told from another")
    return hashlib.sha256(f"{type(value).__name__} {value!r}".encode()).hexdigest()
