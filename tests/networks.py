"""Small networks with everything that makes cutting hard; their comments say what."""

import random
from typing import Any

import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, 3, padding=1)


class InPlace(nn.Module):
    """In-place activations and sums next to, before and after values that are also used elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = conv(1, 3), conv(3, 3), conv(3, 3), conv(3, 3), conv(6, 2)
        self.norm = nn.InstanceNorm3d(3, affine=True)
        self.act = nn.ReLU(inplace=True)
        self.leaky = nn.LeakyReLU(0.1, inplace=True)
        self.flatten = nn.Flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        doubled = a * 2  # uses `a` before it is overwritten ...
        skip = self.act(a)  # ... as `a`, `skip` and the second use of `a` below are one tensor
        b = self.b(skip)
        b += doubled
        c = self.norm(self.leaky(self.c(b)))
        flat = self.flatten(c)
        flat.mul_(0.5)  # changes `c` through a view of it
        d = self.d(c + a)
        d += c
        return self.e(torch.cat([self.act(d), skip], 1))  # type: ignore[no-any-return]


class Branches(nn.Module):
    """Three outputs in a dict, made early, in the middle and late; the input and one value are used far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = conv(1, 4), conv(4, 4), conv(4, 4), conv(4, 4), conv(5, 2)
        self.act = nn.Tanh()
        self.scale = nn.Parameter(torch.full((1, 4, 1, 1, 1), 1.5))
        self.register_buffer("offset", torch.full((1, 4, 1, 1, 1), 0.25))

    def forward(self, x: Tensor) -> dict[str, Any]:
        early = self.act(self.a(x))  # an output that later stages use as well, and that three stages may use
        middle = self.b(early) * self.scale
        c = self.act(self.c(middle + early))
        first, second = torch.chunk(c, 2, 1)  # a tuple, which must not cross a cut
        d = self.d(torch.cat([second, first], 1) + self.offset) + early
        late = self.e(torch.cat([d, x], 1))  # the input again
        return {"late": late, "aside": [early, middle]}


class Conditioned(nn.Module):
    """Several inputs, by keyword: a second volume that is used late, a vector that is used twice, others left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(1, 4), conv(4, 4), conv(6, 4), conv(4, 2)
        self.shift, self.scale, self.act = nn.Linear(3, 4), nn.Linear(3, 4), nn.Tanh()

    def forward(
        self,
        input: Tensor,
        prior: Tensor | None = None,
        *,
        code: Tensor,
        gain: float = 0.5,
        twist: Tensor | None = None,
    ) -> Tensor:
        x = self.act(self.a(input) + self.shift(code)[:, :, None, None, None])
        x = self.act(self.b(x)) * gain
        if prior is not None:
            x = self.c(torch.cat([x, prior], 1))
        if twist is not None:
            x = x * twist
        return self.d(x * self.scale(code)[:, :, None, None, None] + x)  # type: ignore[no-any-return]


class Aged(nn.Module):
    """A vector before the volume."""

    def __init__(self) -> None:
        super().__init__()
        self.age, self.first, self.last = nn.Linear(3, 4), conv(1, 4), conv(4, 1)

    def forward(self, age: Tensor, image: Tensor) -> Tensor:
        return self.last((self.first(image) + self.age(age)[:, :, None, None, None]).relu())


class Shuffled(nn.Module):
    """Moves planes about, which no slab can do by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flip(self.a(x), (2,))


class Chancy(nn.Module):
    """Dropout everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(1, 4), nn.Dropout3d(0.5), conv(4, 4), nn.Dropout(0.3), nn.ReLU(), conv(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Counting(nn.Module):
    """BatchNorm in training: running statistics and a counter that change at every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv(1, 4), nn.BatchNorm3d(4), nn.ReLU(inplace=True), conv(4, 4), nn.BatchNorm3d(4), nn.ReLU(), conv(4, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Tied(nn.Module):
    """The same convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.act = conv(1, 2), conv(2, 2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.act(self.twice(self.first(x))))  # type: ignore[no-any-return]


class RandomDag(nn.Module):
    """A random directed graph of operations, the same for the same seed: any node may use any earlier value."""

    WIDTH = 2

    def __init__(self, seed: int, operations: int = 14) -> None:
        super().__init__()
        chance = random.Random(seed)
        self.modules_by_step = nn.ModuleDict()
        self.program: list[tuple[str, int, int]] = [("conv", 0, 0)]
        for step in range(1, operations):
            kind = chance.choice(["conv", "conv", "act", "act_", "add", "add_", "gate", "swap", "norm"])
            # Recent values are likelier, so that the graph is deep; old ones come up too, so that it is tangled.
            one, two = (max(0, step - int(chance.expovariate(0.5))) for _ in range(2))
            if kind not in ("conv", "add"):
                one = max(one, 1)  # value 0 is the network's input, which has one channel
            if kind == "gate":
                two = max(two, 1)
            self.program.append((kind, step if kind == "act_" else one, two))
        for step, (kind, source, _) in enumerate(self.program):
            if kind == "conv":
                self.modules_by_step[str(step)] = conv(1 if source == 0 else self.WIDTH, self.WIDTH)
            elif kind == "norm":
                self.modules_by_step[str(step)] = nn.InstanceNorm3d(self.WIDTH, affine=True)
            elif kind in ("act", "act_"):
                self.modules_by_step[str(step)] = nn.LeakyReLU(0.1, inplace=kind == "act_")
        self.last = conv(self.WIDTH, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [x]
        for step, (kind, one, two) in enumerate(self.program):
            a, b = values[one], values[two]
            if str(step) in self.modules_by_step:
                values.append(self.modules_by_step[str(step)](a))
            elif kind == "add_":
                values.append(values[-1].add_(b))
            elif kind == "gate":
                values.append(torch.sigmoid(a) * b)
            elif kind == "swap":
                pieces = torch.chunk(values[-1] + b, 2, 1)
                values.append(torch.cat(pieces[::-1], 1) * 0.5)
            else:
                values.append(a + values[-1])
        return self.last(values[-1]), values[len(values) // 2]


class Shaped(nn.Module):
    """Looks at the extents of its input: pads to even ones, makes a grid, resizes to a skip's size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.act = conv(1, 2), conv(2, 2), conv(4, 2), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        skip = self.act(self.a(x))
        deep = self.b(nn.functional.avg_pool3d(skip, 2))
        grid = torch.linspace(0, 1, x.size(2)).to(x.dtype)[:, None, None]
        up = nn.functional.interpolate(deep, size=skip.shape[2:], mode="nearest")
        return self.c(torch.cat([skip * grid, up], 1)).reshape(x.shape[0], 2, *x.shape[2:])  # type: ignore[no-any-return]


class Sided(nn.Module):
    """One more operation in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(1, 2), conv(2, 2), conv(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x)))
        return x * 2 if self.training else x
