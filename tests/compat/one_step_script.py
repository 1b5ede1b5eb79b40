"""One-step flow matching, written against the reference repository's classes.

The tests read it as text and run it twice: unchanged, and with its import of
``linearizer`` changed. It does not refer to linfast.
"""

import math

import torch
from linearizer import G, Linearizer, LinearModule
from torch import nn
from torch.nn import functional as F

CHANNELS, SIZE, RANK = 1, 8, 4


def embed(t, width=16):
    """Sines and cosines of t [B], [B, width]."""
    rates = torch.exp(torch.arange(width // 2) * (-math.log(1e4) / (width // 2 - 1)))
    angles = t[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1)


class TimeLoRA(LinearModule):
    """x -> x P(t) Q(t)^T on flattened images."""

    def __init__(self, n, rank):
        super().__init__()
        self.n, self.rank = n, rank
        self.p_net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, n * rank))
        self.q_net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, n * rank))

    def get_lin_t(self, t):
        e = embed(t)
        P, Q = self.p_net(e).view(-1, self.n, self.rank), self.q_net(e).view(-1, self.n, self.rank)
        return P @ Q.mT

    def forward(self, x, **kwargs):
        return (x.flatten(1)[:, None] @ self.get_lin_t(kwargs["t"])).view_as(x)


class ActNorm(nn.Module):
    """Initialised by the first batch; the flag is a plain bool, which is not in the state_dict."""

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.initialized = False

    def forward(self, x):
        if not self.initialized:
            with torch.no_grad():
                self.bias.copy_(-x.mean((0, 2, 3), keepdim=True))
                self.log_scale.copy_(-x.std((0, 2, 3), keepdim=True).log())
            self.initialized = True
        return (x + self.bias) * self.log_scale.exp()

    def inverse(self, z):
        return z * (-self.log_scale).exp() - self.bias


class Conditioner(nn.Module):
    def __init__(self, channels, width=8):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Linear(16, width)
        self.last = nn.Conv2d(width, 2 * channels, 3, padding=1)

    def forward(self, x, t):
        shift, log_s = self.last(F.silu(self.first(x) + self.time(embed(t))[:, :, None, None])).chunk(2, 1)
        return shift, log_s.clamp(-5, 5)


class Block(nn.Module):
    """ActNorm, a coupling of each half on the other, an invertible 1x1 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.a, self.b = Conditioner(channels // 2), Conditioner(channels // 2)
        self.W = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels)).Q)

    def forward(self, x, t):
        x1, x2 = self.actnorm(x).chunk(2, 1)
        shift, log_s = self.a(x2, t)
        y1 = (x1 + shift) * log_s.exp()
        shift, log_s = self.b(y1, t)
        y2 = (x2 + shift) * log_s.exp()
        return torch.einsum("oi,bihw->bohw", self.W, torch.cat((y1, y2), 1))

    def inverse(self, y, t):
        y1, y2 = torch.einsum("oi,bihw->bohw", torch.linalg.inv(self.W), y).chunk(2, 1)
        shift, log_s = self.b(y1, t)
        x2 = y2 * (-log_s).exp() - shift
        shift, log_s = self.a(x2, t)
        return self.actnorm.inverse(torch.cat((y1 * (-log_s).exp() - shift, x2), 1))


class ConvG(G):
    """One network in two modes: time 1 for gx, 0 for gy."""

    def __init__(self, in_ch, size, depth=2):
        super().__init__(in_ch=in_ch, image_resolution=size)
        self.blocks = nn.ModuleList(Block(4 * in_ch) for _ in range(depth))

    def forward(self, x, **kwargs):
        h, t = F.pixel_unshuffle(x, 2), self.time(x, kwargs["mode"])
        for block in self.blocks:
            h = block(h, t)
        return F.pixel_shuffle(h, 2)

    def inverse(self, z, **kwargs):
        h, t = F.pixel_unshuffle(z, 2), self.time(z, kwargs["mode"])
        for block in reversed(self.blocks):
            h = block.inverse(h, t)
        return F.pixel_shuffle(h, 2)

    def time(self, x, mode):
        return torch.full((len(x),), {"gx": 1.0, "gy": 0.0}[mode])


class TwoModes(Linearizer):
    def gx(self, x, **kwargs):
        return self.net_gx(x, mode="gx")

    def gy(self, y, **kwargs):
        return self.net_gy(y, mode="gy")

    def gx_inverse(self, g_x, **kwargs):
        return self.net_gx.inverse(g_x, mode="gx")

    def gy_inverse(self, g_y, **kwargs):
        return self.net_gy.inverse(g_y, mode="gy")


class Matcher:
    """The losses and samplers; MSE in place of LPIPS."""

    def __init__(self, f):
        self.f = f

    def loss(self, x1, noise_level=0.3):
        x0, t = torch.randn_like(x1), torch.rand(len(x1))
        z0, z1 = self.f.gy(x0), self.f.gx(x1)
        at = t[:, None, None, None]
        predicted = self.f.A((1 - at) * z0 + at * z1, t=t)
        x0_again = self.f.gy_inverse(z0 + noise_level * torch.randn_like(z0))
        x1_again = self.f.gx_inverse(z1 + noise_level * torch.randn_like(z1))
        decoded = self.f.gx_inverse(predicted)
        pairs = ((predicted, z1), (x0_again, x0), (x1_again, x1), (decoded, x1))
        return sum(F.mse_loss(a, b) for a, b in pairs)

    def velocity(self, z, t):
        return (self.f.A(z, t=torch.full((len(z),), t)) - z) / (1 - t)

    @torch.no_grad()
    def sample(self, x, steps, method):
        z, dt = self.f.gy(x), 1 / steps
        for i in range(steps - 1):
            t = i * dt
            k = self.velocity(z, t)
            if method == "rk":
                k2 = self.velocity(z + dt / 2 * k, t + dt / 2)
                k3 = self.velocity(z + dt / 2 * k2, t + dt / 2)
                k = (k + 2 * k2 + 2 * k3 + self.velocity(z + dt * k3, t + dt)) / 6
            z = z + dt * k
        return self.f.gx_inverse(z)

    @torch.no_grad()
    def one_step(self, x, steps):
        """All Euler steps as one dense matrix, the product of the steps' matrices."""
        identity = torch.eye(self.f.net_gy.dim)
        B = identity
        for i in range(steps - 1):
            t = i / steps
            A_t = self.f.linear_network.get_lin_t(torch.tensor([t]))[0]
            B = B @ (identity + (A_t - identity) / (steps * (1 - t)))
        z = self.f.gy(x)
        return self.f.gx_inverse((z.flatten(1) @ B).view_as(z))


def build():
    return TwoModes(gx=ConvG(CHANNELS, SIZE), linear_network=TimeLoRA(CHANNELS * SIZE**2, RANK))


def train(f, steps, batch=16):
    """The losses of this many Adam steps on smooth blobs."""
    optimizer, matcher, losses = torch.optim.Adam(f.parameters(), lr=1e-3), Matcher(f), []
    grid = torch.linspace(-1, 1, SIZE)
    for _ in range(steps):
        cx, cy = torch.rand(2, batch, 1, 1, 1) - 0.5
        blobs = torch.exp(-4 * ((grid - cx) ** 2 + (grid[:, None] - cy) ** 2))
        x1 = blobs + 0.05 * torch.randn(batch, CHANNELS, SIZE, SIZE)
        loss = matcher.loss(x1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)
