"""The classes that the reference repository's code imports, from the facts in its paper and notes.

Stands in for its unlicensed ``linearizer`` module: it covers the intended use of that
module and nothing else.
"""

from __future__ import annotations

from torch import nn


class G(nn.Module):
    def __init__(self, in_ch, image_resolution):
        super().__init__()
        self.dim = in_ch * image_resolution**2


class LinearModule(nn.Module):
    pass


class Linearizer(nn.Module):
    def __init__(self, gx, linear_network, gy=None):
        super().__init__()
        self.net_gx, self.linear_network = gx, linear_network
        self.net_gy = gx if gy is None else gy

    def gx(self, x, **kw):
        return self.net_gx(x, **kw)

    def gy(self, y, **kw):
        return self.net_gy(y, **kw)

    def gx_inverse(self, z, **kw):
        return self.net_gx.inverse(z, **kw)

    def gy_inverse(self, z, **kw):
        return self.net_gy.inverse(z, **kw)

    def A(self, z, **kw):
        return self.linear_network(z, **kw)

    def A_inverse(self, z, **kw):
        return self.linear_network.inverse(z, **kw)

    def forward(self, x, **kw):
        latent = self.A(self.gx(x, **kw), **kw)
        return self.gy_inverse(latent, **kw)

    def inverse(self, y, **kw):
        latent = self.A_inverse(self.gy(y, **kw), **kw)
        return self.gx_inverse(latent, **kw)
