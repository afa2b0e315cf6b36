"""A heat map over complex momenta: how many modes of a ring of Gaussians a GAN covers.

A small GAN (`nestopt_ext.experiments.games.mixture_gan`) is trained by simultaneous steps with every momentum of a grid
of moduli and angles. An angle changes how far an lr goes, up to tenfold, so all momenta choose from the same
*effective* learning rates (`nestopt_ext.effective_lr`) on seeds of their own, and the heat map is made on other seeds.
A mode is covered when at least 1 in 40 of the points lies within 3 standard deviations of it; a training that overflows
covers none. Since such a game goes round, the number is a mean over the looks at the later half of the training.

What to expect: modes covered of 8, mean (standard deviation) over test seeds 4 to 11 with the default settings, 864
trainings in 290 s on two cores that had other work too. Angles to the right, moduli downwards:

======  =========  =========  =========  =========  =========  =========  =========
|beta|  0          pi/32      pi/16      pi/8       pi/4       pi/2       pi
======  =========  =========  =========  =========  =========  =========  =========
0.95    0.9 (0.3)  4.5 (2.6)  5.0 (2.2)  4.2 (1.8)  3.0 (1.7)  3.8 (2.4)  2.0 (0.8)
0.9     1.2 (0.3)  3.3 (2.8)  5.6 (3.2)  7.2 (0.6)  4.9 (2.7)  3.5 (2.5)  2.4 (1.9)
0.8     1.4 (0.5)  1.4 (0.5)  3.0 (2.2)  4.9 (3.1)  6.0 (3.3)  3.7 (2.9)  2.6 (2.2)
0.7     1.5 (0.8)  2.1 (1.1)  2.5 (2.7)  2.9 (2.5)  2.9 (2.5)  4.9 (3.3)  4.1 (3.0)
0.5     1.9 (2.1)  3.0 (2.1)  2.9 (2.1)  2.5 (2.3)  4.5 (3.1)  3.7 (3.0)  5.8 (3.0)
0       6.4 (2.0)
======  =========  =========  =========  =========  =========  =========  =========

The best is 0.9 exp(i pi/8), the momentum that the paper recommends. It covers more modes than the best real momentum
from 0.5 on in 8 of 8 seeds, and the best angle grows as the modulus falls, as the linear analysis of rotations has it
(`nestopt_ext.games.small_step_converges`). No training overflowed; those that fail collapse. Where it ended on seed
7, the eigenvalues of the game are a mixture of real ones and rotations: 19.7, 3.1 +- 3.3i, 2.5 +- 3.0i, 1.9,
0.4 +- 1.4i, 0.7 +- 1.3i, and so on.

Where it does not hold: plain gradient descent comes second, covers more in 3 of 8 seeds, and its points are better
(72 % of them near a mode, against 48 %); what 0.9 exp(i pi/8) has is that no seed fails. Four tuning seeds are few:
they rank 0.5 exp(i pi/4) first, by 7.5 modes to 7.4, and that one then comes to 4.5 (3.1). The standard deviations say
how far apart seeds are; a mode more or less between neighbours means nothing.

Two other settings, the same seeds, fewer momenta:

- ``loss="minimax"`` is easier, and there no momentum at all is as good as any: 8.00 (0.00) modes, 0.5 exp(i pi/8) the
  same, 0.8 exp(i pi/8) 7.92 (0.15), 0.9 exp(i pi/8) 6.10 (1.78). Complex beats real at each modulus: real 0.5, 0.8 and
  0.9 cover 7.88 (0.35), 4.90 (2.70) and 2.90 (1.62).
- ``optimizer="complex-adam"``, momentum on the discriminator alone, modulus 0.8: 7.97 (0.07) at pi/4, 7.95 (0.14) at
  pi/8, 7.62 (0.65) without momentum, 5.38 (3.22) at pi, 3.17 (3.06) at 0, 1.75 (2.53) at pi/16.

Source: the experiment on mixtures of Gaussians of Lorraine, Acuna, Vicol, Duvenaud, "Complex Momentum for Optimization
in Games", 2022; networks, target and measures are ours.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import _checkpoint as checkpoint
from ..._checkpoint import CheckpointError
from ..._json_log import JsonLog
from .. import contents
from ..identity import conflict, identity
from ..resources import cpu_threads
from ..run_folder import CHECKPOINT, LOG
from ..tune import Interrupted, Progress
from .mixture_config import MixtureConfig
from .mixture_gan import PLAYERS, Ring, Run, Trainings, networks
from .mixture_report import findings
from .mixture_results import TEST, TUNING, MixtureResult, Outcome, merit
from .mixture_scores import coverage

CHECKPOINT_VERSION = 2

#: By player and name, [trainings, ...].
Weights = dict[str, dict[str, Tensor]]


def mixture(
    config: MixtureConfig,
    output: Path | None = None,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> MixtureResult:
    """Trains a GAN with every momentum: at every learning rate on the tuning seeds, at the best on the test seeds.

    With ``output``, a folder that exists, every training is logged to ``log.jsonl`` there, and after every
    ``batch_runs`` trainings the run is saved to ``checkpoint.pt``; with ``resume`` it continues from there to the
    numbers of an uninterrupted run, bit for bit on one machine. ``should_stop`` is asked after every look at the
    trainings, by the threads that train; once it says yes, Interrupted is raised, and the trainings under way are lost.

    Raises ConfigError for a setting out of range, and CheckpointError when the checkpoint is damaged or that of another
    run, when ``output`` holds one and ``resume`` was not asked for, or when it is to be continued without ``output``.
    """
    config.check()
    with cpu_threads(1):  # for each operation, since whole batches are shared out
        return _Experiment(config, output, resume, should_stop, progress).run()


def num_pieces(config: MixtureConfig) -> int:
    """Pieces of work that `mixture` tells its progress of: looks at one training each."""
    runs = len(config.cells()) * (len(config.learning_rates) * config.tuning_seeds + config.test_seeds)
    return runs * config.evaluations


class _Experiment:
    """The state of one run of the experiment: the trainings that are done."""

    def __init__(
        self,
        config: MixtureConfig,
        output: Path | None,
        resume: bool,
        should_stop: Callable[[], bool],
        progress: Progress | None,
    ) -> None:
        self.config = config
        self.ring = Ring.of(config)
        self.should_stop = should_stop
        self.progress = progress
        self.lock = threading.Lock()
        self.abandoned = threading.Event()
        self.outcomes: list[Outcome] = []
        shells = zip(PLAYERS, networks(config, 0), strict=True)
        #: The final weights of the trainings on test seeds, [0, ...] to begin with.
        self.weights = {player: _no_rows(module.state_dict()) for player, module in shells}
        self.path = output / CHECKPOINT if output else None
        log_bytes = self._load() if resume else self._require_room()
        self.log = JsonLog(output / LOG if output else None, log_bytes)

    def run(self) -> MixtureResult:
        with self.log:
            if not self.log.position:
                self.log.write("config", experiment=self.config.experiment, **asdict(self.config))
            self._tell(len(self.outcomes) * self.config.evaluations)
            tuning = self._tuning_runs()
            self._train(TUNING, tuning, done=min(len(self.outcomes), len(tuning)))
            self._train(TEST, self._test_runs(), done=len(self.outcomes) - len(tuning))
            result = MixtureResult(self.config, self.outcomes, self.weights)
            for line in findings(result):
                self.log.write("finding", text=line)
            return result

    # Which trainings there are

    def _tuning_runs(self) -> list[Run]:
        config = self.config
        return [Run(c, lr, seed) for c in config.cells() for lr in config.learning_rates for seed in config.tuning]

    def _test_runs(self) -> list[Run]:
        """Each cell at its best learning rate; of equally good ones it is the first."""
        runs = []
        for cell in self.config.cells():
            tuned = [run for run in self.outcomes if run.stage == TUNING and run.cell == cell]
            at_lr = {lr: [run for run in tuned if run.effective_lr == lr] for lr in self.config.learning_rates}
            best = max(at_lr, key=lambda lr: merit(at_lr[lr]))
            runs += [Run(cell, best, seed) for seed in self.config.test]
        return runs

    # Training

    def _train(self, stage: str, runs: Sequence[Run], done: int) -> None:
        """Trains ``runs`` from number ``done`` on, some batches at the same time, and keeps them in their order."""
        size = self.config.batch_runs
        batches = [runs[start : start + size] for start in range(done, len(runs), size)]
        if self.progress is not None:
            self.progress.stage(stage)
        with ThreadPoolExecutor(self.config.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for outcomes, weights in pool.map(lambda batch: self._batch(stage, batch), batches):
                    self._keep(stage, outcomes, weights)
            except BaseException:
                self.abandoned.set()  # the pool waits for the batches under way
                raise

    def _keep(self, stage: str, outcomes: list[Outcome], ends: Weights) -> None:
        if stage == TEST:
            for player, weights in self.weights.items():
                for name, rows in weights.items():
                    weights[name] = torch.cat([rows, ends[player][name]])
        for outcome in outcomes:
            self.log.write("training", **asdict(outcome))
        self.outcomes += outcomes
        self._save()

    def _batch(self, stage: str, runs: Sequence[Run]) -> tuple[list[Outcome], Weights]:
        """Trains to the end, with a look every now and then."""
        config, trainings = self.config, Trainings(self.config, runs)
        looks = []
        for look in range(config.evaluations):
            if self.abandoned.is_set():
                raise Interrupted
            for _ in range((look + 1) * config.steps // config.evaluations - look * config.steps // config.evaluations):
                trainings.step()
            looks.append(coverage(trainings.generate(config.samples), self.ring, config.mode_share))
            self._tell(len(runs))
            if self.should_stop():
                self.abandoned.set()
        finite = trainings.finite().tolist()
        modes, quality, js = (torch.stack(scores).double() for scores in zip(*looks, strict=True))  # [looks, runs]
        later = config.evaluations // 2
        outcomes = [
            Outcome(
                stage,
                run.cell.modulus,
                run.cell.angle,
                run.effective_lr,
                run.cell.lr(run.effective_lr),
                run.seed,
                diverged=not finite[i],
                modes=float(modes[later:, i].mean()) if finite[i] else 0.0,
                quality=float(quality[later:, i].mean()) if finite[i] else 0.0,
                js=float(js[later:, i].mean()) if finite[i] else 1.0,
                curve=[int(count) for count in modes[:, i]],
            )
            for i, run in enumerate(runs)
        ]
        return outcomes, trainings.weights

    def _tell(self, pieces: int) -> None:
        if self.progress is not None and pieces:
            with self.lock:
                self.progress.advance(pieces)

    # The checkpoint

    def _save(self) -> None:
        if self.path is None:
            return
        self.log.sync()
        state = {
            "version": CHECKPOINT_VERSION,
            "config": identity(self.config),
            "log_bytes": self.log.position,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "weights": self.weights,
        }
        checkpoint.save(self.path, state)

    def _require_room(self) -> int:
        if self.path is not None and self.path.exists():
            raise CheckpointError(f"{self.path}: is there already. Continue with resume=True, or give another output.")
        return 0

    def _load(self) -> int:
        """Takes over the checkpoint and returns where the log ended when it was written."""
        if self.path is None:
            raise CheckpointError("mixture: output must be given to resume; got None.")
        if not self.path.exists() and self.path.parent.is_dir():
            return 0  # stopped before anything was worth saving
        state = checkpoint.load(self.path, CHECKPOINT_VERSION)
        try:
            different = conflict(state.get("config"), identity(self.config))
            if different:
                raise CheckpointError(f"{self.path}: {different}")
            self._check(state)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: is damaged: {error}.") from error
        self.outcomes = [Outcome(**outcome) for outcome in state["outcomes"]]
        self.weights = state["weights"]
        return int(state["log_bytes"])

    def _check(self, state: dict[str, Any]) -> None:
        """Requires what a run of this configuration saves; the learning rates of the test runs follow from the rest."""
        config, outcomes = self.config, state.get("outcomes")
        if not isinstance(outcomes, list):
            raise ValueError("outcomes must be a list")
        tuning = self._tuning_runs()
        template = asdict(Outcome("", 0.0, 0.0, 0.0, 0.0, 0, False, 0.0, 0.0, 0.0, [0] * config.evaluations))
        rows = max(0, len(outcomes) - len(tuning))
        expected = {
            "version": CHECKPOINT_VERSION,
            "config": identity(config),
            "log_bytes": 0,
            "outcomes": [template] * len(outcomes),
            "weights": {p: {n: w.new_empty(rows, *w.shape[1:]) for n, w in d.items()} for p, d in self.weights.items()},
        }
        contents.check_like("it", state, expected)
        places = [(TUNING, run) for run in tuning]
        places += [(TEST, Run(cell, 0.0, seed)) for cell in config.cells() for seed in config.test]
        if len(outcomes) > len(places):
            raise ValueError(f"outcomes must have at most {len(places)} entries; got {len(outcomes)}")
        for index, (outcome, (stage, run)) in enumerate(zip(outcomes, places, strict=False)):
            found = (outcome["stage"], outcome["modulus"], outcome["angle"], outcome["seed"])
            if found != (stage, run.cell.modulus, run.cell.angle, run.seed):
                raise ValueError(f"outcomes[{index}] must be of {run.cell}, {stage} seed {run.seed}; got {found}")
            if outcome["effective_lr"] not in ((run.effective_lr,) if stage == TUNING else config.learning_rates):
                raise ValueError(f"outcomes[{index}] must have a learning rate of its place")


def _no_rows(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.new_empty(0, *tensor.shape) for name, tensor in state.items()}
