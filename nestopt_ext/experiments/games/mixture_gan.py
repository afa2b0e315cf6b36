r"""A GAN on a ring of Gaussians: target, networks, losses, and many independent trainings at once.

Both networks are MLPs with two hidden ReLU layers. With noise :math:`z` and examples :math:`x`:

.. math::
    L_D = \operatorname{mean}_x \log(1 + e^{-D(x)}) + \operatorname{mean}_z \log(1 + e^{D(G(z))}),\qquad
    L_G = \operatorname{mean}_z \log(1 + e^{-D(G(z))})
        \quad\text{or, minimax,}\quad -\operatorname{mean}_z \log(1 + e^{D(G(z))})

Both players step from the same point. A seed fixes the first weights and the stream of noise and examples, so that all
momenta and learning rates are compared on the same trainings.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import softplus

from .mixture_config import Cell, MixtureConfig

PLAYERS = ("generator", "discriminator")
#: Steps for which noise and examples are drawn in one call.
_BLOCK = 50
#: Of Adam; the first one is the momentum.
_BETA2, _EPS = 0.999, 1e-8
#: Where the seeds of examples and of the noise for a look are, away from those of the weights. The generator of the CPU
#: looks at 32 bits of a seed.
_STREAM_SEED, _EVALUATION_SEED = 0x5DEECE66, 0x9E3779B9

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ring:
    """Equally likely Gaussians N(mean, std^2 I) in the plane.

    means: [modes, 2]. std: standard deviation of each coordinate.
    """

    means: Tensor
    std: float

    @staticmethod
    def of(config: MixtureConfig) -> "Ring":
        """The target of ``config``, the first mode on the positive x axis."""
        angles = 2 * math.pi * torch.arange(config.modes, dtype=torch.float64) / config.modes
        return Ring(config.radius * torch.stack([angles.cos(), angles.sin()], 1), config.std)


def networks(config: MixtureConfig, seed: int) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator with the first weights of ``seed``, in float32; the global generator is untouched.

    Weights and biases are uniform within 1 / sqrt(inputs of the layer), as in a new `torch.nn.Linear`.
    """
    random = torch.Generator().manual_seed(seed)
    return _mlp(config.noise_dim, config.width, 2, random), _mlp(2, config.width, 1, random)


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """L_G of the discriminator's outputs ``fake`` on generated points; ``kind`` is one of `mixture_config.LOSSES`."""
    return softplus(-fake).mean() if kind == "non-saturating" else -softplus(fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """L_D of the discriminator's outputs on examples and on generated points."""
    return softplus(-real).mean() + softplus(fake).mean()


class Stream:
    """Noise and examples, batch after batch; ``seeds[i]`` alone decides what entry i of every batch is."""

    def __init__(self, config: MixtureConfig, seeds: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        self._config = config
        self._ring = Ring.of(config)
        self._generators = [torch.Generator().manual_seed((seed + _STREAM_SEED) % 2**32) for seed in seeds]
        self._dtype = dtype
        self._taken = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """Noise [seeds, batch_size, noise_dim] and examples [seeds, batch_size, 2]."""
        place = self._taken % _BLOCK
        if place == 0:
            blocks = [self._block(generator) for generator in self._generators]
            self._noise, self._real = (torch.stack(block, 1).to(self._dtype) for block in zip(*blocks, strict=True))
        self._taken += 1
        return self._noise[place], self._real[place]

    def _block(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        size = (_BLOCK, self._config.batch_size)
        noise = torch.randn(*size, self._config.noise_dim, generator=generator)
        mode = torch.randint(self._config.modes, size, generator=generator)
        return noise, self._ring.means[mode] + self._ring.std * torch.randn(*size, 2, generator=generator)


@dataclass(frozen=True)
class Run:
    """One training: its momentum, its effective learning rate, and its seed."""

    cell: Cell
    effective_lr: float
    seed: int


class Trainings:
    """Trainings of the GAN, one for each of ``runs``, that go on together and know nothing of each other.

    Every weight has a leading dimension of ``len(runs)``, gradients are taken with ``torch.func.vmap``, and momentum
    and learning rate are tensors with an entry for each run. The arithmetic is that of `nestopt_ext.ComplexSGD` and
    `nestopt_ext.ComplexAdam`. A run whose numbers overflow goes on as NaN, beside the others.
    """

    def __init__(self, config: MixtureConfig, runs: Sequence[Run], dtype: torch.dtype = torch.float32) -> None:
        self._config = config
        self._dtype = dtype
        seeds = sorted({run.seed for run in runs})
        self._which = torch.tensor([seeds.index(run.seed) for run in runs])
        self._stream = Stream(config, seeds, dtype)
        self._shells = dict(zip(PLAYERS, networks(config, 0), strict=True))
        starts = zip(*(networks(config, seed) for seed in seeds), strict=True)
        #: The players' weights by name, each [runs, ...].
        self.weights: dict[str, dict[str, Tensor]] = {}
        for player, modules in zip(PLAYERS, starts, strict=True):
            stacked, _ = stack_module_state(list(modules))
            self.weights[player] = {name: w.detach()[self._which].to(dtype) for name, w in stacked.items()}
        self._movers = {player: self._mover(player, runs) for player in PLAYERS}
        self._gradients = vmap(grad(self._summed_loss))

    def step(self) -> None:
        """Both players of all runs take a step from where they are."""
        noise, real = (batch[self._which] for batch in self._stream.next())
        gradients = self._gradients(self.weights, noise, real)
        for player in PLAYERS:
            self._movers[player].step(list(gradients[player].values()))

    def generate(self, count: int) -> Tensor:
        """``count`` points of every generator from the same noise, [runs, count, 2]."""
        return generate(self._config, self.weights["generator"], count)

    def finite(self) -> Tensor:
        """Which of the runs have finite weights alone, bool [runs]."""
        weights = [w.flatten(1) for player in PLAYERS for w in self.weights[player].values()]
        return torch.stack([w.isfinite().all(1) for w in weights]).all(0)

    def _summed_loss(self, weights: dict[str, dict[str, Tensor]], noise: Tensor, real: Tensor) -> Tensor:
        """L_G + L_D of one run, each a function of its own player alone: what belongs to the other is held fixed."""
        generate, discriminate = (self._network(player, weights[player]) for player in PLAYERS)
        fixed = self._network("discriminator", {name: w.detach() for name, w in weights["discriminator"].items()})
        fake = generate(noise)
        return generator_loss(self._config.loss, fixed(fake)) + discriminator_loss(
            discriminate(real), discriminate(fake.detach())
        )

    def _network(self, player: str, weights: dict[str, Tensor]) -> Network:
        return lambda inputs: functional_call(self._shells[player], weights, (inputs,))  # type: ignore[no-any-return]

    def _mover(self, player: str, runs: Sequence[Run]) -> "_ComplexSGD":
        weights = list(self.weights[player].values())
        if self._config.optimizer == "complex-sgd":
            momenta = [run.cell.momentum for run in runs]
            return _ComplexSGD(weights, [run.cell.lr(run.effective_lr) for run in runs], momenta)
        if player == "generator":
            return _ComplexAdam(weights, [run.effective_lr for run in runs], [0j] * len(runs))
        momenta = [run.cell.momentum for run in runs]
        return _ComplexAdam(weights, [run.cell.lr(run.effective_lr) for run in runs], momenta)


def generate(config: MixtureConfig, weights: Mapping[str, Tensor], count: int) -> Tensor:
    """``count`` points of every generator, weights [runs, ...], all from the same noise: [runs, count, 2]."""
    noise = torch.randn(count, config.noise_dim, generator=torch.Generator().manual_seed(_EVALUATION_SEED))
    shell, _ = networks(config, 0)
    noise = noise.to(next(iter(weights.values())).dtype)
    points: Tensor = vmap(lambda own: functional_call(shell, own, (noise,)))(dict(weights))
    return points


class MixtureGame:
    """The GAN as a game: two modules, and their losses on one fixed batch.

    players: generator and discriminator. noise: [N, noise_dim]. real: examples [M, 2]. A large batch makes the losses
    close to those of the whole distribution.
    """

    def __init__(self, kind: str, players: Sequence[nn.Module], noise: Tensor, real: Tensor) -> None:
        self.kind = kind
        self.players = list(players)
        self.noise = noise
        self.real = real

    def losses(self, players: Sequence[Network]) -> tuple[Tensor, Tensor]:
        """(L_G, L_D), scalars whose graph reaches both players."""
        generate, discriminate = players
        fake = discriminate(generate(self.noise))
        return generator_loss(self.kind, fake), discriminator_loss(discriminate(self.real), fake)


class _ComplexSGD:
    """ComplexSGD on weights [runs, ...], each run with a learning rate and a momentum of its own."""

    def __init__(self, weights: list[Tensor], lrs: Sequence[float], momenta: Sequence[complex]) -> None:
        self.weights = weights
        self._lr = _columns(lrs, weights)
        self._real = _columns([momentum.real for momentum in momenta], weights)
        self._imag = _columns([momentum.imag for momentum in momenta], weights)
        self._buffers = [torch.zeros_like(w) for w in weights]
        self._buffers_imag = [torch.zeros_like(w) for w in weights]

    def step(self, gradients: Sequence[Tensor]) -> None:
        """The buffer becomes momentum * buffer + gradient; the weights step by lr times what `_directions` gives."""
        for i, gradient in enumerate(gradients):
            buffer, imag = self._buffers[i], self._buffers_imag[i]
            turned = buffer * self._imag[i]
            buffer.mul_(self._real[i]).addcmul_(imag, self._imag[i], value=-1).add_(gradient)
            imag.mul_(self._real[i]).add_(turned)
        for i, direction in enumerate(self._directions(gradients)):
            self.weights[i].addcmul_(direction, self._lr[i], value=-1)

    def _directions(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._buffers


class _ComplexAdam(_ComplexSGD):
    """ComplexAdam without averaging or correction of the momentum; every other word as in `_ComplexSGD`."""

    def __init__(self, weights: list[Tensor], lrs: Sequence[float], momenta: Sequence[complex]) -> None:
        super().__init__(weights, lrs, momenta)
        self._squares = [torch.zeros_like(w) for w in weights]
        self._steps = 0

    def _directions(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        self._steps += 1
        correction = math.sqrt(1 - _BETA2**self._steps)
        for square, gradient in zip(self._squares, gradients, strict=True):
            square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
        pairs = zip(self._buffers, self._squares, strict=True)
        return [buffer / (square.sqrt() / correction + _EPS) for buffer, square in pairs]


def _columns(values: Sequence[float], weights: Sequence[Tensor]) -> list[Tensor]:
    """One value for each run, shaped so that it multiplies each of the weights [runs, ...]."""
    column = torch.tensor(values, dtype=torch.float64)
    return [column.to(w.dtype).reshape(-1, *[1] * (w.dim() - 1)) for w in weights]


def _mlp(inputs: int, width: int, outputs: int, random: torch.Generator) -> nn.Module:
    layers: list[nn.Module] = []
    for size_in, size_out in ((inputs, width), (width, width), (width, outputs)):
        linear = nn.Linear(size_in, size_out, device="meta").to_empty(device="cpu")
        for parameter in linear.parameters():
            nn.init.uniform_(parameter, -(size_in**-0.5), size_in**-0.5, generator=random)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
