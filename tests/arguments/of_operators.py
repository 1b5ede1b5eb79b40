"""Valid calls of operators, Linearizers, induced spaces and decompositions."""

from __future__ import annotations

import linfast as lf
from linfast import operators
from tests.arguments.calls import Good, flow, linearizer, made, method, timed, x

OPERATORS: dict[str, Good] = {
    "Dense": made(lf.Dense, n_out=3, n_in=2, weight=None),
    "Dense.of": Good(
        lambda: (lf.Dense.of, {"weight": x(3, 2)}),
        {"weight": "m n"},
        "weight",
        {"weight": {"it on the meta device", "one rank more", "one rank more in front"}},
    ),
    "Diagonal": Good(
        lambda: (lf.Diagonal, {"n": 3, "diagonal": x(3)}),
        {"diagonal": "N"},
        allowed={"diagonal": {"it on the meta device", "one rank more in front"}},
    ),
    "Diagonal.of": Good(
        lambda: (lf.Diagonal.of, {"diagonal": x(3)}),
        {"diagonal": "n"},
        "diagonal",
        {
            "diagonal": {
                "it on the meta device",
                "a meta tensor",
                "a tensor [2]",
                "one rank more",
                "one rank more in front",
            }
        },
    ),
    "Projection": made(lf.Projection, n=3, rank=2),
    "LowRank": Good(lambda: (lf.LowRank, {"alpha": 0.5, "U": x(4, 2), "V": x(4, 2)}), {"U": "N R", "V": "N R"}),
    "DepthwiseConv": Good(
        lambda: (lf.DepthwiseConv, {"channels": 2, "kernel_size": (1, 2), "size": (3, 3), "weight": x(2, 1, 2)}),
        {"weight": "C K L"},
        allowed={"weight": {"it on the meta device", "one rank more in front"}},
    ),
    "BlockDiagonal": Good(
        lambda: (operators.BlockDiagonal, {"blocks": x(2, 3, 3)}),
        {"blocks": "c M M"},
        "blocks",
        {"blocks": {"it on the meta device"}},
    ),
    "TimeLowRank": made(lf.TimeLowRank, n=4, rank=2, alpha=1.0, time_features=4, hidden=4),
    "TimeLowRank.factors_at": Good(lambda: (lf.TimeLowRank(4, 1, 1.0, 4, 4).factors_at, {"t": x(3)}), {"t": "k"}),
    "TimeOperator.at": method(lambda: lf.TimeLowRank(4, 1, 1.0, 4, 4), "at", t=0.5),
    "TimeDiagonal": made(lf.TimeDiagonal, n=4, rank=2, alpha=1.0, time_features=4, hidden=4),
    "TimeDiagonal.factors_at": Good(lambda: (lf.TimeDiagonal(4, 1, 1.0, 4, 4).factors_at, {"t": x(3)}), {"t": "k"}),
    "TimeDepthwiseConv": made(
        lf.TimeDepthwiseConv, channels=2, kernel_size=1, size=(2, 2), time_features=4, hidden=(4,)
    ),
    "LatentOperator.at": method(lambda: 2.0 * lf.TimeLowRank(4, 1, 1.0, 4, 4), "at", t=0.5),
    "LatentOperator.forward": Good(
        lambda: (lf.TimeLowRank(4, 1, 1.0, 4, 4), {"z": x(3, 4), "t": 0.5}), {"z": "b N *"}, "z"
    ),
    "Decomposable.inverse_at": method(lambda: lf.TimeLowRank(4, 1, 1.0, 4, 4), "inverse_at", t=0.5),
    "Decomposable.pinv": method(lambda: lf.Dense(3), "pinv", rtol=0.01),
    "Decomposable.rank": method(lambda: lf.Dense(3), "rank", rtol=0.01),
    "Decomposable.norm": method(lambda: lf.Dense(3), "norm", ord="fro"),
    **{
        f"LatentOperator.__{name}__": Good(
            lambda name=name: (getattr(lf.Dense(3), f"__{name}__"), {"other": lf.Dense(3)}), symbol=True
        )
        for name in ("matmul", "add", "sub")
    },
    "LatentOperator.__mul__": Good(lambda: (lf.Dense(3).__mul__, {"factor": 0.5}), symbol=True),
    "LatentOperator.__truediv__": Good(lambda: (lf.Dense(3).__truediv__, {"divisor": 0.5}), symbol=True),
    "LatentOperator.__pow__": Good(lambda: (lf.Dense(3).__pow__, {"n": 2}), symbol=True),
    "Linearizer": made(lf.Linearizer, g_x=flow(), A=lf.Dense(4), g_y=flow()),
    "Linearizer.forward": Good(lambda: (timed(), {"x": x(3, 4), "t": 0.5}), {"x": "b D"}, "x"),
    "Linearizer.inverse": method(timed, "inverse", {"y": "b D"}, y=x(3, 4), t=0.5),
    "Linearizer.gx": method(linearizer, "gx", {"x": "b D"}, x=x(3, 4)),
    "Linearizer.gy": method(linearizer, "gy", {"y": "b D"}, y=x(3, 4)),
    "Linearizer.gx_inverse": method(linearizer, "gx_inverse", {"z": "b D *"}, z=x(3, 4)),
    "Linearizer.gy_inverse": method(linearizer, "gy_inverse", {"z": "b D *"}, z=x(3, 4)),
    "Linearizer.A_inverse": method(timed, "A_inverse", {"z": "b D *"}, z=x(3, 4), t=0.5),
    "Linearizer.at": method(timed, "at", t=0.5),
    "Linearizer.pinv": method(linearizer, "pinv", rtol=0.01),
    **{
        f"Linearizer.__{name}__": Good(
            lambda name=name: (lambda f: (getattr(f, f"__{name}__"), {"other": f}))(linearizer()), symbol=True
        )
        for name in ("matmul", "add", "sub")
    },
    "Linearizer.__mul__": Good(lambda: (linearizer().__mul__, {"factor": 0.5}), symbol=True),
    "Linearizer.__truediv__": Good(lambda: (linearizer().__truediv__, {"divisor": 0.5}), symbol=True),
    "Linearizer.__pow__": Good(lambda: (linearizer().__pow__, {"n": 2}), symbol=True),
    "LinearizerSVD.linearizer": method(lambda: linearizer().svd(), "linearizer", rank=2),
    "InducedSpace": Good(lambda: (lf.InducedSpace, {"g": flow()})),
    **{
        f"InducedSpace.{name}": Good(
            lambda name=name: (getattr(lf.InducedSpace(flow()), name), {"u": x(3, 4), "v": x(3, 4).flip(0)}),
            {"u": "B D", "v": "B D"},
            "u",
            {n: {"dimension 0 of size 1"} for n in "uv"},
        )
        for name in ("add", "inner", "distance")
    },
    "InducedSpace.scale": method(lambda: lf.InducedSpace(flow()), "scale", {"v": "b D"}, a=0.5, v=x(3, 4)),
    "InducedSpace.neg": method(lambda: lf.InducedSpace(flow()), "neg", {"v": "b D"}, v=x(3, 4)),
    "InducedSpace.norm": method(lambda: lf.InducedSpace(flow()), "norm", {"v": "b D"}, v=x(3, 4)),
    "InducedSpace.zero": method(lambda: lf.InducedSpace(flow()), "zero", {"like": "b D"}, like=x(3, 4)),
    "InducedSpace.mean": method(lambda: lf.InducedSpace(flow()), "mean", {"xs": "b D"}, xs=x(3, 4)),
    "InducedSpace.project": method(
        lambda: lf.InducedSpace(flow()), "project", {"v": "b D", "basis": "k D"}, v=x(3, 4), basis=x(2, 4)
    ),
    "InducedSpace.interpolate": Good(
        lambda: (lf.InducedSpace(flow()).interpolate, {"u": x(3, 4), "v": x(3, 4).flip(0), "t": 0.3}),
        {"u": "B D", "v": "B D"},
        "u",
        {n: {"dimension 0 of size 1"} for n in "uv"},
    ),
    "InducedSpace.combine": Good(
        lambda: (lf.InducedSpace(flow()).combine, {"weights": x(2, 3), "vectors": x(3, 4)}),
        {"weights": "m K", "vectors": "K D"},
        "vectors",
        {
            "weights": {
                "one rank fewer",
                "it as a list",
                "it as an array",
                "it in torch.int64",
                "it in torch.uint8",
                "it in float8",
            }
        },
    ),
}
