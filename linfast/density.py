"""Density: the probability density of a normalizing flow, to evaluate, to fit and to sample.

    log p(x) = log p_base(g(x)) + log|det dg/dx|            x = g^{-1}(z) with z ~ p_base

g maps data x [B, ...] to noise z of as many elements. Logarithms are natural, so that log p is in nats.
Source: Rezende and Mohamed, "Variational Inference with Normalizing Flows" (arXiv 1505.05770).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from . import data_scale
from .base_distributions import FixedBase, check_fits, kept, log_density
from .checks import DTYPES, check_count, check_counts, check_dense, check_kind, is_of_input
from .dispatch import without_autocast
from .flows.actnorm import ActNorm
from .flows.bijection import Bijection
from .hub import HubMethods


class Density(nn.Module, HubMethods):
    """The density p(x) of a flow; calling it returns log p(x), so that DDP and torch.compile apply.

        p = lf.Density(lf.coupling_flow(2)).standardize(x_train)
        loss = -p(x).mean()                                 # maximum likelihood, in nats per sample
        x = p.sample(1000)

    Args:
        flow: g, a Bijection from data x to noise z. Flows made with ``context_features`` take a context.
        base: the distribution of z. None: standard normal. A torch.distributions distribution over one z, such as
            ``Independent(Laplace(zeros(2), ones(2)), 1)``; for independent values also a batch of distributions, or
            one for all. It should have a density everywhere, since g may give any z. Its tensors move with the
            module and are not trained. To train them, give a module whose ``forward()`` returns the distribution.
        embedding: a module that computes the flow's context [B, C] from what is passed as ``context``: labels
            [B] with ``torch.nn.Embedding(10, 16)``, or images with a network.
        shape: the shape of one z, by default that of the base or of the flow's data.

    ``context`` is [B, C] with one row per sample, or [C] or [1, C] for all samples. With an embedding it is what
    the embedding takes: B rows, or one for all samples; a whole number is one label.

    Raises:
        TypeError: flow is not a Bijection; base is neither a distribution nor a module; embedding is not a module.
        ValueError: the base does not fit the shape, or has tensors that require a gradient.
    """

    def __init__(
        self,
        flow: Bijection,
        base: Distribution | nn.Module | None = None,
        *,
        embedding: nn.Module | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_kind("flow", flow, Bijection)
        check_kind("base", base, (Distribution, nn.Module, type(None)))
        check_kind("embedding", embedding, (nn.Module, type(None)))
        self.flow = flow
        self.base = kept(base) if isinstance(base, Distribution) else base
        self.embedding = embedding
        self.shape = _shape(flow, base, shape)
        self._scale_is_known = any(isinstance(module, ActNorm) for module in flow.modules())

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """``log_prob(x, context)``."""
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Any = None) -> Tensor:
        """log p(x | context) [B] in nats, of x [B, ...] in the units of the data; in fp32 or wider.

        Warns once where data are far from unit scale (see ``standardize``): it looks at the first batch of 16 rows
        or more in training mode, outside torch.compile, and at none where the flow has an ActNorm.

        Raises:
            TypeError, ValueError: x or the context is missing, not expected, or of another shape, dtype or device.
        """
        given = {}
        if context is not None or self.embedding is not None:
            self.flow._check("x", x, self.flow.features)
            given = self._given(context, x.shape[0], "x")
        z, log_det = self.flow.forward_and_log_det(x, **given)
        if self.training and not self._scale_is_known and not torch.compiler.is_compiling():
            data_scale.warn_of_scale(self, x)
        return self._base_log_prob(z) + log_det

    @torch.no_grad()
    def sample(self, n: int, context: Any = None) -> Tensor:
        """n samples [n, ...] of p(x | context), without gradients. ``context``: one for all, or n of them.

        Noise is drawn from torch's generator of the module's device: ``torch.manual_seed`` repeats it. Where the
        flow has dropout or batch norm, call ``eval()`` first: in training mode each call is another flow.

        Raises:
            TypeError, ValueError: n is not a whole number; the context is missing, not expected, or of another
                shape; the shape of z is not known.
        """
        return self.flow.inverse(self._noise(n, reparametrised=False), **self._given(context, n))

    def rsample(self, n: int, context: Any = None) -> Tensor:
        """As ``sample``, with the samples' gradients with respect to the parameters and the context.

        Raises:
            NotImplementedError: the base has parameters, and its distribution has no ``rsample``.
        """
        return self.flow.inverse(self._noise(n, reparametrised=True), **self._given(context, n))

    def sample_and_log_prob(self, n: int, context: Any = None) -> tuple[Tensor, Tensor]:
        """(x [n, ...], log p(x | context) [n]): samples as in ``rsample``, and their densities, from one pass.

        With gradients, for variational inference: E[log p(x) - log target(x)] is the Kullback-Leibler divergence.
        """
        z = self._noise(n, reparametrised=True)
        x, log_det = self.flow.inverse_and_log_det(z, **self._given(context, n))
        return x, self._base_log_prob(z) - log_det

    def standardize(self, x: Tensor) -> Density:
        """Shift and scale data to mean 0 and standard deviation 1 per feature (channel), by those of x [N, ...].

        The first layer of ``flow`` is then an ActNorm with these values, which is not trained; the names in the
        state_dict shift by this layer, and hooks of ``flow`` itself are left behind. ``load_state_dict`` adds a
        state's first ActNorm to a density without one. It is not trained there, even if it was trained before.
        ``log_prob`` and samples stay in the units of the data. In a torch.distributed process group all processes
        call it together, and the values are those of all their data. Returns the density itself.

        Raises:
            ValueError: a feature that is constant in x, or values that are not finite; a layer that does not take
                standardized values, such as a logit.
            RuntimeError: the flow begins with an ActNorm already.
        """
        if data_scale.begins_with_actnorm(self.flow):
            raise RuntimeError(
                "the flow begins with an ActNorm already (standardize puts one there), which sets the scale of the "
                "data: make a new Density to standardize by other data"
            )
        self.flow._check("x", x, self.flow.features)
        flow = data_scale.in_front(data_scale.standardizing(x), self.flow)
        data_scale.check_takes(flow, x)
        self.flow, self._scale_is_known = flow, True
        return self

    def extra_repr(self) -> str:
        return f"shape={self.shape}"

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        data_scale.insert_when_loaded(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *rest)

    def _given(self, context: Any, rows: int, of: str = "n") -> dict[str, Tensor]:
        """The flow's keyword arguments, for this number of samples, those of x or n."""
        if context is None:
            if self.embedding is not None:
                raise ValueError("context must be given: this density has an embedding; got None")
            return {}
        if self.embedding is not None:
            context = self._embedded(context)
        elif check_dense("context", context).dtype not in DTYPES:
            raise ValueError(
                f"context must be floating point; got {context.dtype} {tuple(context.shape)}: for labels give "
                "Density an embedding, such as torch.nn.Embedding(classes, size)"
            )
        context = context[None] if context.ndim == 1 else context
        if context.ndim == 2 and context.shape[0] not in (1, rows):
            samples = f"n = {rows} rows" if of == "n" else f"{rows} rows, as x has"
            raise ValueError(f"context must be one row for all samples or {samples}; got {tuple(context.shape)}")
        return {"context": context}

    def _embedded(self, context: Any) -> Tensor:
        """The embedding's vectors [B or 1, C]."""
        assert self.embedding is not None
        if isinstance(context, numbers.Integral):
            context = torch.tensor([check_count("context", context, least=0)], device=self._like().device)
        elif isinstance(context, Tensor) and context.ndim == 0:
            context = context[None]
        try:
            vectors = self.embedding(context)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, RuntimeError) and not is_of_input(error):
                raise
            shown = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"context {shown} is refused by the embedding: {error}") from error
        return check_dense("what the embedding makes of context", vectors)

    def _like(self) -> Tensor:
        """A tensor with the dtype and the device of the module."""
        tensors = (*self.flow.parameters(), *self.parameters(), *self.buffers())
        return next((t for t in tensors if t.is_floating_point()), torch.empty(0))

    def _distribution(self, dtype: torch.dtype, shape: Sequence[int]) -> Distribution:
        """The base, in this dtype where it is fixed; it must be over one z of this shape."""
        assert self.base is not None
        base = self.base(dtype) if isinstance(self.base, FixedBase) else self.base()
        check_fits(base, shape)
        return base

    def _base_log_prob(self, z: Tensor) -> Tensor:
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.base is None:
            return (-0.5 * (wide.square() + math.log(2 * math.pi))).flatten(1).sum(1)

        def log_prob() -> Tensor:
            return log_density(self._distribution(wide.dtype, wide.shape[1:]), wide)

        values = without_autocast(z.device.type, log_prob)
        return values.flatten(1).sum(1) if values.ndim > 1 else values

    def _noise(self, n: int, reparametrised: bool) -> Tensor:
        """n samples z [n, ...] of the base."""
        n, like, shape = check_count("n", n, least=0), self._like(), self.shape
        if shape is None:
            raise ValueError("the shape of z is not known: pass it to Density, as shape=(channels, height, width)")
        if self.base is None:
            return torch.randn(n, *shape, dtype=like.dtype, device=like.device)
        trained = any(parameter.requires_grad for parameter in self.base.parameters())

        def draw() -> Tensor:
            base = self._distribution(torch.promote_types(like.dtype, torch.float32), shape)
            if reparametrised and trained and not base.has_rsample:
                raise NotImplementedError(
                    f"base has parameters, and {type(base).__name__} has no rsample to train them"
                )
            batch = shape[: len(shape) - len(base.event_shape)]
            base = base if tuple(base.batch_shape) == batch else base.expand(batch)
            return (base.rsample if reparametrised and base.has_rsample else base.sample)((n,))

        return without_autocast(like.device.type, draw).to(like.dtype)


def _shape(flow: Bijection, base: Any, shape: Sequence[int] | None) -> tuple[int, ...] | None:
    """The shape of one z, from the argument, the base or the flow; ValueError where they do not agree."""
    of_base = (*base.batch_shape, *base.event_shape) if isinstance(base, Distribution) else ()
    if shape is not None:
        found: tuple[int, ...] | None = check_counts("shape", shape)
        if found and flow.features_out not in (None, found[0]):
            raise ValueError(f"shape must begin with the {flow.features_out} features of z; got {found}")
    elif flow.shape is not None and flow.features_out == flow.features:
        found = tuple(flow.shape)
    elif of_base:
        return of_base
    else:
        found = None if flow.features_out is None else (flow.features_out,)
    if found is not None and of_base:
        check_fits(base, found)
    return found
