"""An image model as the reference repository builds it, from the facts in its paper and notes.

Plain, slow and in NCHW: the formulas as stated there, with the names and attributes by which
``linfast.from_reference`` knows the repository's classes. Sizes are free, so that tests can be small,
and no weight starts near zero, so that each one has an effect.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.compat import stand_in


def _random(*shape, gain=0.5):
    return nn.Parameter(gain * torch.randn(shape) / math.sqrt(max(1, math.prod(shape[1:]))))


class Linear(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.bias = _random(n_out, n_in), _random(n_out, gain=0.1)

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Conv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel, up=False, down=False):
        super().__init__()
        self.in_channels, self.out_channels, self.up, self.down = in_channels, out_channels, up, down
        self.fused_resample = False
        self.weight, self.bias = _random(out_channels, in_channels, kernel, kernel), _random(out_channels, gain=0.1)
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if up or down else None)

    def forward(self, x):
        if self.up:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if self.down:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class GroupNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.num_groups, self.eps = min(32, channels // 4), 1e-6
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(channels))
        self.bias = nn.Parameter(0.1 * torch.randn(channels))

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class UNetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, emb, up=False, down=False, attention=False, dropout=0.1):
        super().__init__()
        self.in_channels, self.out_channels, self.dropout = in_channels, out_channels, dropout
        self.num_heads, self.skip_scale, self.adaptive_scale = int(attention), math.sqrt(0.5), False
        self.norm0, self.conv0 = GroupNorm(in_channels), Conv2d(in_channels, out_channels, 3, up, down)
        self.affine = Linear(emb, out_channels)
        self.norm1, self.conv1 = GroupNorm(out_channels), Conv2d(out_channels, out_channels, 3)
        self.skip = None
        if up or down or in_channels != out_channels:
            self.skip = Conv2d(in_channels, out_channels, 1, up, down)
        if attention:
            self.norm2 = GroupNorm(out_channels)
            self.qkv, self.proj = Conv2d(out_channels, 3 * out_channels, 1), Conv2d(out_channels, out_channels, 1)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            B, C, H, W = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(B, C, 3, H * W).unbind(2)
            weights = (q.mT @ k / math.sqrt(C)).softmax(-1)
            x = (self.proj((v @ weights.mT).reshape(x.shape)) + x) * self.skip_scale
        return x


class PositionalEmbedding(nn.Module):
    def __init__(self, num_channels):
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = num_channels, 10000, True

    def forward(self, t):
        half = self.num_channels // 2
        angles = t[:, None] * 10000.0 ** (-torch.arange(half, dtype=t.dtype) / (half - 1))
        return torch.cat((angles.sin(), angles.cos()), dim=1)


class SongUNet(nn.Module):
    def __init__(
        self,
        in_channels,
        out_channels,
        res,
        width=16,
        channel_mult=(1, 1),
        num_blocks=2,
        attention=(16,),
        dropout=0.1,
    ):
        super().__init__()
        emb = 4 * width
        self.map_noise, self.map_label, self.map_augment = PositionalEmbedding(width), None, None
        self.map_layer0, self.map_layer1 = Linear(width, emb), Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, width, 3)
        c, outputs = width, [width]
        for level, mult in enumerate(channel_mult):
            r = res >> level
            if level:
                self.enc[f"{r}x{r}_down"] = UNetBlock(c, c, emb, down=True, dropout=dropout)
                outputs.append(c)
            for i in range(num_blocks):
                block = UNetBlock(c, width * mult, emb, attention=r in attention, dropout=dropout)
                self.enc[f"{r}x{r}_block{i}"] = block
                c = width * mult
                outputs.append(c)
        for level, mult in reversed(list(enumerate(channel_mult))):
            r = res >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{r}x{r}_in0"] = UNetBlock(c, c, emb, attention=True, dropout=dropout)
                self.dec[f"{r}x{r}_in1"] = UNetBlock(c, c, emb, dropout=dropout)
            else:
                self.dec[f"{r}x{r}_up"] = UNetBlock(c, c, emb, up=True, dropout=dropout)
            for i in range(num_blocks + 1):
                attends = r in attention and i == num_blocks
                block = UNetBlock(c + outputs.pop(), width * mult, emb, attention=attends, dropout=dropout)
                self.dec[f"{r}x{r}_block{i}"] = block
                c = width * mult
        self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(c)
        self.dec[f"{res}x{res}_aux_conv"] = Conv2d(c, out_channels, 3)

    def forward(self, x, t):
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(self.map_noise(t)))))
        stem, *blocks = self.enc.values()
        outputs = [x := stem(x)]
        for block in blocks:
            x = block(x, emb)
            outputs.append(x)
        *blocks, norm, head = self.dec.values()
        for block in blocks:
            x = block(torch.cat((x, outputs.pop()), 1) if block.in_channels > x.shape[1] else x, emb)
        return head(F.silu(norm(x)))


class SongUNetWrapper(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x, t)


class AffineCoupling(nn.Module):
    def __init__(self, cond, clamp):
        super().__init__()
        self.cond, self.clamp = cond, clamp

    def _params(self, kept, t):
        shift, log_s = self.cond(kept, t).chunk(2, 1)
        return shift, log_s.clamp(-self.clamp, self.clamp)

    def forward(self, x1, x2, t):
        shift, log_s = self._params(x2, t)
        return (x1 + shift) * log_s.exp()

    def inverse(self, y1, x2, t):
        shift, log_s = self._params(x2, t)
        return y1 * (-log_s).exp() - shift


class ActNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.initialized = False

    def forward(self, x):
        if not self.initialized:
            self.bias.data = -x.data.mean((0, 2, 3), keepdim=True)
            self.log_scale.data = -x.data.std((0, 2, 3), keepdim=True).log()
            self.initialized = True
        return (x + self.bias) * self.log_scale.exp()

    def inverse(self, y):
        return y * (-self.log_scale).exp() - self.bias


class Inv1x1Conv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.W = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels)).Q)

    def forward(self, x):
        return torch.einsum("oi,bihw->bohw", self.W, x)

    def inverse(self, y):
        return torch.einsum("oi,bihw->bohw", torch.linalg.inv(self.W), y)


class InvUnetBlock(nn.Module):
    def __init__(self, channels, res, clamp, actnorm, **options):
        super().__init__()
        self.F, self.G = (
            AffineCoupling(SongUNetWrapper(SongUNet(channels // 2, channels, res, **options)), clamp)
            for _ in range(2)
        )
        self.mix, self.actnorm = Inv1x1Conv(channels), ActNorm2d(channels) if actnorm else None

    def forward(self, x, t):
        x = x if self.actnorm is None else self.actnorm(x)
        x1, x2 = x.chunk(2, 1)
        y1 = self.F(x1, x2, t)
        return self.mix(torch.cat((y1, self.G(x2, y1, t)), 1))

    def inverse(self, y, t):
        y1, y2 = self.mix.inverse(y).chunk(2, 1)
        x2 = self.G.inverse(y2, y1, t)
        x = torch.cat((self.F.inverse(y1, x2, t), x2), 1)
        return x if self.actnorm is None else self.actnorm.inverse(x)


class Squeeze2x2(nn.Module):
    def forward(self, x):
        return F.pixel_unshuffle(x, 2)

    def inverse(self, y):
        return F.pixel_shuffle(y, 2)


class InvUnet(nn.Module):
    def __init__(self, num_layers, channels, res, clamp=5.0, actnorm=True, **options):
        super().__init__()
        self.squeeze = Squeeze2x2() if channels % 2 else None
        channels, res = (4 * channels, res // 2) if channels % 2 else (channels, res)
        self.blocks = nn.ModuleList(
            InvUnetBlock(channels, res, clamp, actnorm, **options) for _ in range(num_layers)
        )

    def forward(self, x, t):
        x = x if self.squeeze is None else self.squeeze(x)
        for block in self.blocks:
            x = block(x, t)
        return x if self.squeeze is None else self.squeeze.inverse(x)

    def inverse(self, y, t):
        y = y if self.squeeze is None else self.squeeze(y)
        for block in reversed(self.blocks):
            y = block.inverse(y, t)
        return y if self.squeeze is None else self.squeeze.inverse(y)


class InverseUnet(stand_in.G):
    def __init__(self, num_of_layers, in_ch, img_resolution, **options):
        super().__init__(in_ch, img_resolution)
        self.g = InvUnet(2 * num_of_layers, in_ch, img_resolution, **options)

    def forward(self, x, mode):
        return self.g(x, x.new_full(x.shape[:1], {"gx": 1.0, "gy": 0.0}[mode]))

    def inverse(self, z, mode):
        return self.g.inverse(z, z.new_full(z.shape[:1], {"gx": 1.0, "gy": 0.0}[mode]))


class SinusoidalPosEmb(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.half = dim // 2

    def forward(self, t):
        angles = t[:, None] * torch.exp(torch.arange(self.half, dtype=t.dtype) * (-math.log(1e4) / (self.half - 1)))
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


def _generator(t_size, hidden, n_out):
    layers = [SinusoidalPosEmb(t_size)]
    for a, b in zip((t_size, *hidden), hidden, strict=False):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], n_out))


class TimeDependentLoRALinearLayer(stand_in.LinearModule):
    def __init__(self, out_features, lora_features, t_size):
        super().__init__()
        self.out_features, self.lora_features = out_features, lora_features
        self.lin2 = _generator(t_size, (4 * t_size,) * 2, out_features * lora_features)
        self.lin1 = _generator(t_size, (4 * t_size,) * 2, out_features * lora_features)

    def forward(self, x, t):
        shape = (len(x), self.out_features, self.lora_features)
        A1, A2 = self.lin1(t).reshape(shape), self.lin2(t).reshape(shape)
        return (x.flatten(1)[:, None] @ (A1 @ A2.mT)).reshape(x.shape)


class LinearKernel(stand_in.LinearModule):
    def __init__(self, t_size=16, k=4, channels=3):
        super().__init__()
        self.k = k
        self.lin1 = _generator(t_size, (k * t_size,) * 3, channels * k * k)

    def forward(self, x, t):
        kernels = self.lin1(t).reshape(-1, 1, self.k, self.k)
        return F.conv2d(x.flatten(0, 1), kernels, padding="same", groups=len(kernels)).reshape(x.shape)


class OneStepLinearizer(stand_in.Linearizer):
    def gx(self, x, **kw):
        return self.net_gx(x, mode="gx")

    def gy(self, y, **kw):
        return self.net_gy(y, mode="gy")

    def gx_inverse(self, z, **kw):
        return self.net_gx.inverse(z, mode="gx")

    def gy_inverse(self, z, **kw):
        return self.net_gy.inverse(z, mode="gy")
