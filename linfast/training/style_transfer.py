"""Modular style transfer: one g and one operator per style, f_k = g^{-1} A_k g.

Styles are interpolated and composed in the latent space, where they are linear maps:

    interpolation   g^{-1} (alpha A_1 + (1 - alpha) A_2) g      alpha = 1 and 0 are the styles themselves
    composition     g^{-1} A_2 A_1 g = f_2 after f_1

Source: arXiv 2510.08570, whose A_k is a depthwise convolution with a generated kernel; here A_k may be any
LatentOperator. The paper's repository gives g a different time on each side, so that g^{-1} A_2 A_1 g is not f_2
after f_1, and it interpolates the index k; here the operators are interpolated, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_count, check_dense, check_function, check_kind, check_number, check_tensor
from ..conditioning import SinusoidalEmbedding
from ..dispatch import check_values
from ..flows import MLP, Bijection
from ..io import register
from ..linearizer import Linearizer
from ..operators import DepthwiseConv, LatentOperator
from ..operators.depthwise import check_pair
from .objective import Objective, distance_of


@register
class GeneratedDepthwise(nn.Module):
    """A sequence of DepthwiseConvs whose kernels an MLP computes from the index: ``bank[k]`` is operator k.

    A kernel is a unit impulse plus the MLP's output for the embedding of k, so it starts near the identity.

    Args:
        count: number of styles.
        channels, kernel_size, size: of the DepthwiseConvs.
        features: size of the index's sinusoidal embedding.
        hidden: width of the MLP's two hidden layers.
    """

    def __init__(
        self,
        count: int,
        channels: int,
        kernel_size: int,
        size: Sequence[int],
        features: int = 64,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        self.count, self.channels = check_count("count", count), check_count("channels", channels)
        self.kernel_size, self.size = check_count("kernel_size", kernel_size), check_pair("size", size)
        self.features, self.hidden = check_count("features", features, least=4), check_count("hidden", hidden)
        self.embedding = SinusoidalEmbedding(features)
        self.net = MLP(features, channels * kernel_size**2, (hidden, hidden), "gelu", zero_last=False)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> DepthwiseConv:
        k = check_count("k", k, least=-(2**31))
        if not 0 <= k < self.count:  # IndexError, as it ends a for loop over the sequence
            raise IndexError(f"style {k} of {self.count}")
        like = next(self.net.parameters())
        index = torch.full((1,), k, dtype=like.dtype, device=like.device)
        size, middle = self.kernel_size, (self.kernel_size - 1) // 2
        weight = self.net(self.embedding(index)).to(like.dtype).reshape(self.channels, size, size)
        impulse = torch.zeros_like(weight)
        impulse[:, middle, middle] = 1.0
        return DepthwiseConv(self.channels, size, self.size, weight + impulse)


@register
class ModularStyle(nn.Module):
    """One g and one operator per style.

    Args:
        g: a Bijection on images.
        operators: a GeneratedDepthwise, or one LatentOperator per name.
        names: one for each style, all different.

    Raises:
        ValueError: names repeat or are not as many as the operators; in the methods, a name is unknown.
    """

    operators: GeneratedDepthwise | nn.ModuleList

    def __init__(
        self, g: Bijection, operators: GeneratedDepthwise | Sequence[LatentOperator], names: Sequence[str]
    ) -> None:
        super().__init__()
        check_kind("g", g, Bijection)
        check_kind("names", names, (list, tuple))
        for i, name in enumerate(names):
            check_kind(f"names[{i}]", name, str)
        check_kind("operators", operators, (GeneratedDepthwise, nn.ModuleList, list, tuple))
        for i in range(0 if isinstance(operators, GeneratedDepthwise) else len(operators)):
            check_kind(f"operators[{i}]", operators[i], LatentOperator)
        if len(names) != len(operators) or len(set(names)) != len(names):
            raise ValueError(
                f"names must be {len(operators)} different ones, one for each of operators; got {list(names)}"
            )
        self.g, self.names = g, tuple(names)
        self.operators = operators if isinstance(operators, GeneratedDepthwise) else nn.ModuleList(operators)

    def operator(self, name: str) -> LatentOperator:
        """A_k of this style."""
        return self._operator("name", name)

    def _operator(self, argument: str, name: str) -> LatentOperator:
        check_kind(argument, name, str)
        if name not in self.names:
            raise ValueError(f"{argument}: no style {name!r}; there are {', '.join(self.names)}")
        return self.operators[self.names.index(name)]  # type: ignore[return-value]

    def style(self, name: str) -> Linearizer:
        """f_k = g^{-1} A_k g."""
        return Linearizer(self.g, self.operator(name))

    def interpolate(self, first: str, second: str, alpha: float) -> Linearizer:
        """g^{-1} (alpha A_first + (1 - alpha) A_second) g."""
        alpha, A, B = check_number("alpha", alpha), self._operator("first", first), self._operator("second", second)
        return Linearizer(self.g, alpha * A + (1 - alpha) * B)

    def compose(self, *names: str) -> Linearizer:
        """g^{-1} A_last ... A_first g: the styles one after another, in the order of their names here."""
        if not names:
            raise ValueError("names must hold at least one style")
        operators = (self._operator("names", name) for name in names)
        return Linearizer(self.g, reduce(lambda A, following: following @ A, operators))

    def decode(self, z: Tensor, style: Tensor) -> Tensor:
        """g^{-1}(A_k z) for latents z [B, C, H, W], with the style k = ``style[b]`` for row b; int64 [B]."""
        check_tensor("z", z)
        check_dense("style", style)
        if style.dtype != torch.int64 or style.shape != z.shape[:1] or style.device != z.device:
            wanted = f"int64 {list(z.shape[:1])} on {z.device} for z {tuple(z.shape)}"
            raise ValueError(f"style must be {wanted}; got {style.dtype} {tuple(style.shape)} on {style.device}")
        check_values("style", style)
        if len(style) and not 0 <= int(style.min()) <= int(style.max()) < len(self.names):
            raise ValueError(f"style must hold numbers from 0 to {len(self.names) - 1}; got {style.tolist()}")
        order = style.argsort(stable=True)
        parts = z[order].split(style.bincount(minlength=len(self.names)).tolist())
        styled = torch.cat([self.operator(name)(part) for name, part in zip(self.names, parts, strict=True)])
        return self.g.inverse(styled[order.argsort()])


class StyleTransfer(Objective):
    """The loss D(f_k(content), content in style k), a mean over pairs of a content image and a style.

    Args:
        model: the styles to train.
        contents: [N, C, H, W].
        styled: [K, N, C, H, W], the version of each content in each style, in the order of the model's names.
        distance: D(output, target), a 0-d tensor.

    Raises:
        ValueError: contents and styled do not match; in ``draw``, a batch is larger than the K N pairs.
    """

    model: ModularStyle

    def __init__(
        self,
        model: ModularStyle,
        contents: Tensor,
        styled: Tensor,
        distance: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    ) -> None:
        super().__init__()
        check_kind("model", model, ModularStyle)
        check_tensor("contents", contents, next(model.parameters(), None), "model", same_dtype=True)
        check_tensor("styled", styled, contents, "contents", same_dtype=True)
        check_function("distance", distance)
        if contents.ndim != 4 or not contents.numel():
            raise ValueError(f"contents must be [N, C, H, W], and not empty; got {tuple(contents.shape)}")
        if list(styled.shape) != (wanted := [len(model.names), *contents.shape]):
            raise ValueError(f"styled must be {wanted}: each style of each of contents; got {tuple(styled.shape)}")
        model.g._check("contents", contents, model.g.features)
        self.model, self.contents, self.styled, self.distance = model, contents, styled, distance

    def draw(self, rng: torch.Generator, batch: int) -> dict[str, Tensor]:
        pairs = self.styled.shape[0] * self.styled.shape[1]
        if batch > pairs:
            raise ValueError(f"batch must be at most the {pairs} pairs of a content and a style; got {batch}")
        chosen = torch.randperm(pairs, generator=rng, device=self.styled.device)[:batch]
        return {"style": chosen // len(self.contents), "content": chosen % len(self.contents)}

    def forward(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        style, content = drawn["style"], drawn["content"]
        different, which = content.unique(return_inverse=True)  # a content is encoded once for all its styles
        output = self.model.decode(self.model.g(self.contents[different])[which], style)
        return {"style": distance_of(self.distance, output, self.styled[style, content])}
