"""Couplings as third-party code writes them, each class written out by hand, for test_register_adapter.py."""

from __future__ import annotations

import torch
from torch import nn

from linfast import ScaleMap


def mlp(n_in, n_out, activation=nn.ReLU):
    return nn.Sequential(nn.Linear(n_in, 16), activation(), nn.Linear(16, n_out))


def conv(n_in, n_out):
    return nn.Sequential(nn.Conv2d(n_in, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, n_out, 1))


class Residual(nn.Module):
    """A network that is no MLP."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.first, self.last = nn.Linear(n_in, 16), nn.Linear(16, n_out)

    def forward(self, x):
        h = self.first(x)
        return self.last(h + torch.sin(h))


class TwoNets(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale_net, self.translate_net = mlp(4, 4), mlp(4, 4)

    def forward(self, x, reverse=False):
        if reverse:
            return self.undo(x)
        a, b = x.chunk(2, 1)
        return torch.cat([a, b * torch.tanh(self.scale_net(a)).exp() + self.translate_net(a)], 1)

    def undo(self, y):
        a, b = y.chunk(2, 1)
        return torch.cat([a, (b - self.translate_net(a)) * (-torch.tanh(self.scale_net(a))).exp()], 1)


class FlagAlone(nn.Module):
    """One method; a log-determinant in both directions; the flag by keyword only."""

    def __init__(self):
        super().__init__()
        self.s, self.t = mlp(3, 2, nn.Tanh), mlp(3, 2, nn.Tanh)

    def forward(self, x, *, rev=False):
        a, b = x[:, :3], x[:, 3:]
        s, t = self.s(a).clamp(-2, 2), self.t(a)
        if rev:
            return torch.cat((a, b * torch.exp(-s) - t), 1), -s.sum(-1)
        return torch.cat((a, (b + t) * torch.exp(s)), 1), s.sum(-1)


class ForwardLogDet(nn.Module):
    """The forward returns a log-determinant and the inverse none; five features, of which the first two move."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleDict({"log_scale": Residual(3, 2), "shift": Residual(3, 2)})

    def forward(self, x):
        a, b = x[:, :2], x[:, 2:]
        s = self.nets["log_scale"](b)
        return torch.cat((a * s.exp() + self.nets["shift"](b), b), 1), s.sum(1)

    def inverse(self, y):
        a, b = y[:, :2], y[:, 2:]
        return torch.cat(((a - self.nets["shift"](b)) / self.nets["log_scale"](b).exp(), b), 1)


class PairNet(nn.Module):
    def __init__(self, n=4):
        super().__init__()
        self.net = mlp(n, 2 * n)

    def forward(self, x):
        return self.net(x).chunk(2, -1)


class NamedPairNet(PairNet):
    def forward(self, x):
        h = self.net(x)
        return {"log_scale": h[:, :4], "shift": h[:, 4:]}


class Pair(nn.Module):
    net = PairNet

    def __init__(self):
        super().__init__()
        self.cond = self.net()

    def params(self, kept):
        return self.cond(kept)

    def forward(self, x):
        a, b = x.chunk(2, 1)
        shift, log_s = self.params(b)
        return torch.cat([(a + shift) * log_s.clamp(-5, 5).exp(), b], 1)

    def inverse(self, y):
        a, b = y.chunk(2, 1)
        shift, log_s = self.params(b)
        return torch.cat([a * (-log_s.clamp(-5, 5)).exp() - shift, b], 1)


class PairReversed(Pair):
    def params(self, kept):
        log_s, shift = self.cond(kept)
        return shift, log_s


class PairNamed(Pair):
    net = NamedPairNet

    def params(self, kept):
        found = self.cond(kept)
        return found["shift"], found["log_scale"]


class Stack(nn.Module):
    """Couplings whose sides alternate; a subclass says which side is first."""

    first = 0

    def __init__(self, count=4):
        super().__init__()
        self.nets = nn.ModuleList([self.conditioner() for _ in range(count)])

    def conditioner(self):
        return mlp(4, 8)

    def split(self, x, i):
        a, b = x.chunk(2, 1)
        return (a, b) if i % 2 == self.first else (b, a)

    def join(self, a, b, i):
        return torch.cat([a, b] if i % 2 == self.first else [b, a], 1)

    def params(self, net, kept):
        s, t = net(kept).chunk(2, 1)
        return torch.tanh(s), t

    def forward(self, x):
        for i, net in enumerate(self.nets):
            a, b = self.split(x, i)
            s, t = self.params(net, a)
            x = self.join(a, b * s.exp() + t, i)
        return x

    def inverse(self, y):
        for i in reversed(range(len(self.nets))):
            a, b = self.split(y, i)
            s, t = self.params(self.nets[i], a)
            y = self.join(a, (b - t) * (-s).exp(), i)
        return y


class SecondFirst(Stack):
    first = 1


class ImageStack(Stack):
    def conditioner(self):
        return conv(4, 8)


class PairStack(Stack):
    def conditioner(self):
        return PairNet()

    def params(self, net, kept):
        s, t = net(kept)
        return torch.tanh(s), t


class OtherStack(Stack):
    def conditioner(self):
        return Residual(4, 8)


class EvenOdd(nn.Module):
    """Alternating features, encode and decode, with log-determinants; forward encodes."""

    def __init__(self, features=6):
        super().__init__()
        even, odd = (features + 1) // 2, features // 2
        sizes = [(even, odd), (odd, even)] * 2
        self.couplings = nn.ModuleList([mlp(kept, 2 * moved, nn.SiLU) for kept, moved in sizes])

    def forward(self, x):
        return self.encode(x)

    def encode(self, x):
        total = 0
        for i, net in enumerate(self.couplings):
            t, s = net(x[:, i % 2 :: 2]).chunk(2, -1)
            s, y = 2 * torch.tanh(s), x.clone()
            y[:, 1 - i % 2 :: 2] = (x[:, 1 - i % 2 :: 2] + t) * s.exp()
            x, total = y, total + s.sum(-1)
        return x, total

    def decode(self, z):
        total = 0
        for i, net in reversed(list(enumerate(self.couplings))):
            t, s = net(z[:, i % 2 :: 2]).chunk(2, -1)
            s, x = 2 * torch.tanh(s), z.clone()
            x[:, 1 - i % 2 :: 2] = z[:, 1 - i % 2 :: 2] * (-s).exp() - t
            z, total = x, total - s.sum(-1)
        return z, total


class Swapping(nn.Module):
    """Each coupling moves the second half and then swaps or reverses the features; two lists of networks."""

    def __init__(self, flips=False, count=3):
        super().__init__()
        self.flips = flips
        self.s = nn.ModuleList([mlp(3, 3) for _ in range(count)])
        self.t = nn.ModuleList([mlp(3, 3) for _ in range(count)])

    def mix(self, x):
        return x.flip(1) if self.flips else x.roll(3, 1)

    def forward(self, x, inverse=False):
        if inverse:
            for s, t in zip(reversed(self.s), reversed(self.t), strict=True):
                a, b = self.mix(x).chunk(2, 1)
                x = torch.cat((a, (b - t(a)) * torch.exp(-s(a))), 1)
            return x
        for s, t in zip(self.s, self.t, strict=True):
            a, b = x.chunk(2, 1)
            x = self.mix(torch.cat((a, b * torch.exp(s(a)) + t(a)), 1))
        return x


class Masked(nn.Module):
    """RealNVP by masks, as tutorials write it: the networks take and return all features."""

    def __init__(self):
        super().__init__()
        masks = torch.tensor([[0.0, 1, 0, 1], [1, 0, 1, 0]] * 2)
        self.mask = nn.Parameter(masks, requires_grad=False)
        self.t = nn.ModuleList([mlp(4, 4, nn.LeakyReLU) for _ in masks])
        self.s = nn.ModuleList([nn.Sequential(*mlp(4, 4, nn.LeakyReLU)) for _ in masks])

    def encode(self, x):
        log_det = x.new_zeros(x.shape[0])
        for i in range(len(self.t)):
            kept = x * self.mask[i]
            s = torch.tanh(self.s[i](kept)) * (1 - self.mask[i])
            t = self.t[i](kept) * (1 - self.mask[i])
            x = kept + (1 - self.mask[i]) * (x * torch.exp(s) + t)
            log_det = log_det + s.sum(dim=1)
        return x, log_det

    def decode(self, z):
        for i in reversed(range(len(self.t))):
            kept = z * self.mask[i]
            s = torch.tanh(self.s[i](kept)) * (1 - self.mask[i])
            t = self.t[i](kept) * (1 - self.mask[i])
            z = (1 - self.mask[i]) * (z - t) * torch.exp(-s) + kept
        return z


class Flipped(nn.Module):
    """Which half moves is an attribute of the instance; a context is passed on to the network."""

    def __init__(self, flip=False):
        super().__init__()
        self.flip, self.net = flip, mlp(4, 8)

    def run(self, x, sign):
        a, b = x.chunk(2, 1)[:: -1 if self.flip else 1]
        t, s = self.net(a).chunk(2, 1)
        b = b * s.exp() + t if sign > 0 else (b - t) * (-s).exp()
        return torch.cat((a, b)[:: -1 if self.flip else 1], 1)

    def forward(self, x):
        return self.run(x, 1)

    def inverse(self, y):
        return self.run(y, -1)


TANH, EXP = ScaleMap("tanh", bound=1.0), ScaleMap("exp")
SHAPES = {
    "two nets, one named": (
        TwoNets, 8,
        {"conditioner": "scale_net", "scale_map": TANH, "order": "scale_first", "moves": "second",
         "inverse": "undo"},
    ),
    "two nets": (TwoNets, 8, {"conditioner": ("translate_net", "scale_net"), "scale_map": TANH}),
    "two nets, reversed": (TwoNets, 8, {"conditioner": ["scale_net", "translate_net"], "scale_map": TANH}),
    "two nets by role": (
        TwoNets, 8,
        {"conditioner": {"shift": "translate_net", "raw": "scale_net"}, "scale_map": TANH, "inverse": "reverse"},
    ),
    "a flag alone": (
        FlagAlone, 5, {"conditioner": "s", "scale_map": ScaleMap("clamp", 2.0), "inverse": "rev", "log_det": True},
    ),
    "a log-determinant of the forward": (ForwardLogDet, 5, {"conditioner": "nets", "scale_map": EXP}),
    "a path": (ForwardLogDet, 5, {"conditioner": ("nets.shift", "nets.log_scale"), "scale_map": EXP}),
    "pair": (Pair, 8, {"conditioner": "cond", "scale_map": ScaleMap("clamp")}),
    "pair reversed": (PairReversed, 8, {"conditioner": "cond", "scale_map": ScaleMap("clamp")}),
    "named pair": (PairNamed, 8, {"conditioner": "cond", "scale_map": ScaleMap("clamp")}),
    "stack": (Stack, 8, {"conditioner": "nets", "scale_map": TANH, "order": "scale_first", "moves": "second"}),
    "stack from the second": (SecondFirst, 8, {"conditioner": "nets", "scale_map": TANH, "moves": "first"}),
    "stack of pairs": (PairStack, 8, {"conditioner": "nets", "scale_map": TANH}),
    "stack of other nets": (OtherStack, 8, {"conditioner": "nets", "scale_map": TANH}),
    "image stack": (ImageStack, 8, {"conditioner": "nets", "scale_map": TANH}),
    "even and odd": (
        EvenOdd, 6,
        {"conditioner": "couplings", "scale_map": ScaleMap("tanh"), "forward": "encode", "inverse": "decode"},
    ),
    "five even and odd": (lambda: EvenOdd(5), 5, {"conditioner": "couplings", "scale_map": ScaleMap("tanh")}),
    "swapping": (Swapping, 6, {"conditioner": ("s", "t"), "scale_map": EXP, "inverse": "inverse"}),
    "reversing": (lambda: Swapping(True, 2), 6, {"conditioner": "s", "scale_map": EXP}),
    "masks": (Masked, 4, {"conditioner": "t", "scale_map": TANH}),
    "an attribute's side": (lambda: Flipped(True), 8, {"conditioner": "net", "scale_map": EXP}),
}  # fmt: skip
"""By name: how a model is made, its features, and the call of register_adapter."""
ONE_LOOP = (
    "stack", "stack from the second", "stack of pairs", "even and odd", "five even and odd", "swapping", "masks",
)  # fmt: skip
