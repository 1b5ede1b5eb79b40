"""The classes of the research repository, with its names, attributes and formulas, as its notes describe them.

Stands in for unlicensed code: it is written independently, and covers only the intended use of the classes.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.compat.stand_in import G, Linearizer, LinearModule


class Linear(nn.Linear):
    """Has the name of the repository's class and computes in x's dtype."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class GroupNorm(nn.Module):
    def __init__(self, num_channels, eps=1e-5):
        super().__init__()
        self.num_groups, self.eps = num_channels // 4, eps
        self.weight, self.bias = nn.Parameter(torch.ones(num_channels)), nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Conv2d(nn.Module):
    """Up or down by 2 with a depthwise 2 x 2 filter of quarters, then a convolution, then a bias."""

    def __init__(self, in_channels, out_channels, kernel, up=False, down=False):
        super().__init__()
        self.in_channels, self.out_channels, self.up, self.down = in_channels, out_channels, up, down
        self.fused_resample = False
        self.weight = self.bias = None
        if kernel:
            fan = in_channels * kernel**2
            self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel) / math.sqrt(fan))
            self.bias = nn.Parameter(0.1 * torch.randn(out_channels))
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if up or down else None)

    def forward(self, x):
        if self.up or self.down:
            taps = self.resample_filter.to(x.dtype).repeat(x.shape[1], 1, 1, 1)
            if self.up:
                x = F.conv_transpose2d(x, 4 * taps, stride=2, groups=x.shape[1])
            else:
                x = F.conv2d(x, taps, stride=2, groups=x.shape[1])
        if self.weight is not None:
            x = F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2) + self.bias.view(1, -1, 1, 1)
        return x


class UNetBlock(nn.Module):
    def __init__(self, cin, cout, emb, up=False, down=False, attention=False, dropout=0.1, adaptive=False):
        super().__init__()
        self.in_channels, self.out_channels, self.num_heads = cin, cout, int(attention)
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, math.sqrt(0.5), adaptive
        self.norm0, self.conv0 = GroupNorm(cin, 1e-6), Conv2d(cin, cout, 3, up, down)
        self.affine = Linear(emb, cout * (1 + adaptive))
        self.norm1, self.conv1 = GroupNorm(cout, 1e-6), Conv2d(cout, cout, 3)
        self.skip = Conv2d(cin, cout, 1, up, down) if cin != cout or up or down else None
        if attention:
            self.norm2 = GroupNorm(cout, 1e-6)
            self.qkv, self.proj = Conv2d(cout, 3 * cout, 1), Conv2d(cout, cout, 1)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = params.chunk(2, 1)
            h = F.silu(shift + (1 + scale) * self.norm1(h))
        else:
            h = F.silu(self.norm1(h + params))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = self.skip_scale * (h + (x if self.skip is None else self.skip(x)))
        if self.num_heads:
            q, k, v = self.qkv(self.norm2(x)).reshape(len(x), x.shape[1], 3, -1).unbind(2)
            weights = torch.softmax(
                q.mT @ k / math.sqrt(x.shape[1]), -1
            )  # in float32 whatever x is, in the original
            x = self.skip_scale * (x + self.proj((v @ weights.mT).view_as(x)))
        return x


class SongUNet(nn.Module):
    """One level down and up again."""

    def __init__(self, channels_in, channels_out, width=8):
        super().__init__()
        self.map_label = self.map_augment = None
        self.map_noise = SinusoidalPosEmb(width)
        self.map_layer0, self.map_layer1 = Linear(width, 4 * width), Linear(4 * width, 4 * width)
        self.enc = nn.ModuleDict(
            {
                "4x4_conv": Conv2d(channels_in, width, 3),
                "4x4_block0": UNetBlock(width, width, 4 * width, attention=True),
                "2x2_down": UNetBlock(width, width, 4 * width, down=True),
            }
        )
        self.dec = nn.ModuleDict(
            {
                "2x2_block0": UNetBlock(2 * width, width, 4 * width),
                "4x4_up": UNetBlock(width, width, 4 * width, up=True),
                "4x4_block0": UNetBlock(2 * width, width, 4 * width),
                "4x4_block1": UNetBlock(2 * width, width, 4 * width),
                "4x4_aux_norm": GroupNorm(width),
                "4x4_aux_conv": Conv2d(width, channels_out, 3),
            }
        )
        with torch.no_grad():  # scales near one
            for parameter in self.dec["4x4_aux_conv"].parameters():
                parameter.mul_(0.3)

    def forward(self, x, noise_labels, class_labels):
        sin, cos = self.map_noise(noise_labels).to(torch.promote_types(x.dtype, torch.float32)).chunk(2, 1)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(torch.cat((cos, sin), 1)))))
        conv, block, down = self.enc.values()
        first = conv(x)
        second = block(first, emb)
        third = down(second, emb)
        low, up, high, last, norm, conv = self.dec.values()
        h = up(low(torch.cat((third, third), 1), emb), emb)
        h = last(torch.cat((high(torch.cat((h, second), 1), emb), first), 1), emb)
        return conv(F.silu(norm(h)))


class SongUNetWrapper(nn.Module):
    def __init__(self, base_unet):
        super().__init__()
        self.net = base_unet

    def forward(self, x, t):
        return self.net(x, torch.zeros(len(x)) if t is None else t, None)


class AffineCoupling(nn.Module):
    def __init__(self, conditioner, clamp=5.0):
        super().__init__()
        self.cond, self.clamp = conditioner, clamp

    def _shift_log_scale(self, kept, t):
        shift, raw = self.cond(kept, t).chunk(2, 1)
        return shift, raw.clamp(-self.clamp, self.clamp)

    def forward(self, x1, x2, t):
        shift, log_s = self._shift_log_scale(x2, t)
        return (x1 + shift) * log_s.exp()

    def inverse(self, y1, x2, t):
        shift, log_s = self._shift_log_scale(x2, t)
        return y1 * (-log_s).exp() - shift


class ActNorm2d(nn.Module):
    """Initialised by the first batch; its flag is a plain bool, which is not in the state_dict."""

    def __init__(self, C):
        super().__init__()
        self.bias, self.log_scale = (nn.Parameter(torch.zeros(1, C, 1, 1)) for _ in range(2))
        self.initialized = False

    def _init(self, x):
        with torch.no_grad():
            self.bias.copy_(-x.mean((0, 2, 3), keepdim=True))
            self.log_scale.copy_(-x.std((0, 2, 3), keepdim=True).add(1e-6).log())
        self.initialized = True

    def forward(self, x):
        if not self.initialized:
            self._init(x)
        return (x + self.bias) * self.log_scale.exp()

    def inverse(self, y):
        return y * (-self.log_scale).exp() - self.bias if self.initialized else y


class Inv1x1Conv(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.W = nn.Parameter(torch.linalg.qr(torch.randn(C, C)).Q)

    def forward(self, x):
        return torch.einsum("oc,bchw->bohw", self.W, x)

    def inverse(self, y):
        return torch.einsum("oc,bchw->bohw", torch.linalg.inv(self.W), y)


class Squeeze2x2(nn.Module):
    def forward(self, x):
        return F.pixel_unshuffle(x, 2)

    def inverse(self, y):
        return F.pixel_shuffle(y, 2)


class InvUnetBlock(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.F, self.G = (AffineCoupling(SongUNetWrapper(SongUNet(C // 2, C))) for _ in range(2))
        self.mix, self.actnorm = Inv1x1Conv(C), ActNorm2d(C)

    def forward(self, X, t):
        x1, x2 = self.actnorm(X).chunk(2, 1)
        y1 = self.F(x1, x2, t)
        return self.mix(torch.cat((y1, self.G(x2, y1, t)), 1))

    def inverse(self, Y, t):
        y1, y2 = self.mix.inverse(Y).chunk(2, 1)
        x2 = self.G.inverse(y2, y1, t)
        return self.actnorm.inverse(torch.cat((self.F.inverse(y1, x2, t), x2), 1))


class InvUnet(nn.Module):
    def __init__(self, depth, channels):
        super().__init__()
        self.use_squeeze, self.squeeze = True, Squeeze2x2()
        self.blocks = nn.ModuleList(InvUnetBlock(4 * channels) for _ in range(depth))

    def forward(self, X, t):
        X = self.squeeze(X)
        for block in self.blocks:
            X = block(X, t)
        return self.squeeze.inverse(X)

    def inverse(self, Y, t):
        Y = self.squeeze(Y)
        for block in reversed(self.blocks):
            Y = block.inverse(Y, t)
        return self.squeeze.inverse(Y)


class InverseUnet(G):
    def __init__(self, depth, channels, size):
        super().__init__(channels, size)
        self.g = InvUnet(depth, channels)

    def _time(self, x, mode):
        if mode not in ("gx", "gy"):
            raise NotImplementedError(mode)
        return torch.full((len(x),), float(mode == "gx"))

    def forward(self, x, **kwargs):
        return self.g(x, self._time(x, kwargs["mode"]))

    def inverse(self, x, **kwargs):
        return self.g.inverse(x, self._time(x, kwargs["mode"]))


class SinusoidalPosEmb(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        half = self.dim // 2
        angles = x[:, None] * torch.exp(torch.arange(half) * (-math.log(1e4) / (half - 1)))
        return torch.cat((angles.sin(), angles.cos()), 1)


def _generator(width, n):
    return nn.Sequential(SinusoidalPosEmb(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, n))


class TimeDependentLoRALinearLayer(LinearModule):
    def __init__(self, out_features, lora_features, t_size=8):
        super().__init__()
        self.out_features, self.lora_features = out_features, lora_features
        self.lin1, self.lin2 = (_generator(t_size, out_features * lora_features) for _ in range(2))

    def get_lin_t(self, t):
        A1, A2 = (net(t).view(len(t), self.out_features, self.lora_features) for net in (self.lin1, self.lin2))
        return A1 @ A2.mT

    def forward(self, x, **kwargs):
        return (x.flatten(1)[:, None] @ self.get_lin_t(kwargs["t"]))[:, 0].view_as(x)


class LinearKernel(LinearModule):
    def __init__(self, t_size=8, k=4):
        super().__init__()
        self.k, self.lin1 = k, _generator(t_size, 3 * k * k)

    def get_matrix(self, t):
        return self.lin1(t).view(-1, 3, self.k, self.k)

    def forward(self, x, **kwargs):
        kernels = self.get_matrix(kwargs["t"]).flatten(0, 1)[:, None]
        return F.conv2d(x.flatten(0, 1)[None], kernels, padding="same", groups=len(kernels)).view_as(x)


class OneStepLinearizer(Linearizer):
    def gx(self, x, **kwargs):
        return self.net_gx(x, mode="gx")

    def gy(self, y, **kwargs):
        return self.net_gy(y, mode="gy")

    def gx_inverse(self, g_x, **kwargs):
        return self.net_gx.inverse(g_x, mode="gx")

    def gy_inverse(self, g_y, **kwargs):
        return self.net_gy.inverse(g_y, mode="gy")


class FlowMatcher:
    """With MSE in place of LPIPS."""

    def __init__(self, linearizer):
        self.linearizer = linearizer

    def training_losses(self, x1, noise_level=0.3):
        f, x0, t = self.linearizer, torch.randn_like(x1), torch.rand(len(x1))
        z0, z1, at = f.gy(x0), f.gx(x1), t[:, None, None, None]
        predicted = f.A((1 - at) * z0 + at * z1, t=t)
        again = f.gy_inverse(z0 + noise_level * torch.randn_like(z0)), f.gx_inverse(z1 + noise_level * z1)
        pairs = ((predicted, z1), (again[0], x0), (again[1], x1), (f.gx_inverse(predicted), x1))
        return sum(F.mse_loss(a, b) for a, b in pairs)

    def velocity(self, z, t):
        times = torch.full((len(z),), t, dtype=z.dtype)
        return (self.linearizer.A(z, t=times) - z) / (1 - t)

    @torch.no_grad()
    def sample(self, x, device, steps=100, method="euler"):
        z, h = self.linearizer.eval().gy(x), 1 / steps
        for i in range(steps - 1):
            k = self.velocity(z, i * h)
            if method == "rk":
                k2 = self.velocity(z + h / 2 * k, (i + 0.5) * h)
                k3 = self.velocity(z + h / 2 * k2, (i + 0.5) * h)
                k = (k + 2 * k2 + 2 * k3 + self.velocity(z + h * k3, (i + 1) * h)) / 6
            z = z + h * k
        return self.linearizer.gx_inverse(z)

    def get_sampling_terms(self, device, T=100, sampling_method="euler"):
        """Dense matrices; "rk" takes each stage's at the step's start, and the third equals the second."""
        eye, h = torch.eye(self.linearizer.net_gy.dim), 1 / T

        def k(t):
            return h / (1 - t) * (self.linearizer.linear_network.get_lin_t(torch.full((1,), t))[0] - eye)

        with torch.no_grad():
            B = eye
            for t in (i * h for i in range(T - 1)):
                slope = k(t) if sampling_method == "euler" else (k(t) + 4 * k(t + h / 2) + k(t + h)) / 6
                B = B @ (eye + slope)
        return B

    def sample_one_step(self, x, device, sampling_method="rk", T=100, B=None):
        self.linearizer.eval()
        with torch.no_grad():
            B = self.get_sampling_terms(device, T, sampling_method) if B is None else B
            z = self.linearizer.gy(x)
            return self.linearizer.gx_inverse((z.flatten(1) @ B.to(z)).view_as(z))


def build(depth=2, channels=1, size=8, rank=2):
    g = InverseUnet(depth, channels, size)
    return OneStepLinearizer(gx=g, linear_network=TimeDependentLoRALinearLayer(channels * size**2, rank))


def train(matcher, optimizer, steps):
    """The losses [steps] of training on fixed images, from one seed."""
    torch.manual_seed(1)
    losses = []
    for x in torch.rand(steps, 3, 1, 8, 8):
        loss = matcher.training_losses(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double()
