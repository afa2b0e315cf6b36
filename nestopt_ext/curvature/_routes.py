"""The choice between products, products in the space of the outputs, and the span of the rows, for one batch that is
evaluated once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import torch

from .. import _lists
from .._types import TensorList
from ._costs import Sizes, dual_costs, loop_costs, outputs_costs
from ._dual import DualSpace
from ._examples import Examples, find_examples
from ._plan import MAX_DUAL_ROWS, Costs, Plan, Route, Way, chosen, planned
from ._recording import Jacobian, Recording
from ._tangent_kernel import TangentKernel
from ._tape import MixesExamples
from .loss_hessian import LossHessian

#: What finding the largest eigenvalue costs a solver that has products alone.
_PRODUCTS_FOR_EIGENVALUE = 5


def check_route(caller: str, route: object) -> None:
    if route not in get_args(Route):
        raise ValueError(f"{caller}: route must be 'auto', 'loop', 'outputs' or 'dual'; got {route!r}.")


class Routes:
    """What an operator J' H J offers beside products: the kernel J J' on the outputs, and the span of its rows, each
    made when it is first worth it.

    ``piece`` is J and H of the whole batch, or why there is no such thing; ``unrecordable`` why J is not a recording.
    """

    def __init__(
        self,
        caller: str,
        route: Route,
        params: TensorList,
        piece: tuple[Jacobian, LossHessian] | str,
        unrecordable: str | None = None,
    ) -> None:
        self._route: Route = route
        self._params = params
        self._space: DualSpace | None = None
        self._recording: Recording | None = None
        self._kernel: TangentKernel | None = None
        self._costs: Costs | None = None
        self._make: Callable[[], DualSpace] | None = None
        self._rows = 0
        #: Why there is no span of rows; None as long as there may be one.
        self.reason: str | None = None
        self._piece: tuple[Jacobian, LossHessian] | str = piece
        self._unrecordable = unrecordable
        self._asked = False
        if route == "dual" and self.space() is None:
            raise ValueError(
                f"{caller}: route must not be 'dual' for a model whose examples cannot be told apart: {self.reason}."
                " Use route='auto'."
            )
        refusal = None if route != "outputs" else self._no_outputs(piece)
        if refusal is not None:
            raise ValueError(f"{caller}: route must not be 'outputs' here: {refusal}. Use route='auto'.")

    def plan(self, num_terms: int) -> Plan:
        """Which way a series goes, and why."""
        costs = self._known_costs()
        if costs is None:
            return Plan("loop", self.reason or "", num_terms)
        return planned(num_terms, self._route, costs, self._space is not None)

    def _way(self, num_terms: int) -> Way:
        costs = self._known_costs()
        return "loop" if costs is None else chosen(num_terms, self._route, costs, self._space is not None)

    def _known_costs(self) -> Costs | None:
        self._ask()
        costs = self._costs
        if costs is not None and costs.no_dual != self.reason:  # a layer turned out to have no rows
            self._costs = costs = replace(costs, dual=None, no_dual=self.reason)
        return costs

    def for_series(self, num_terms: int) -> DualSpace | None:
        """The span of the rows, where a series is faster in it."""
        return self.space() if self._way(num_terms) == "dual" else None

    def for_eigenvalue(self) -> DualSpace | None:
        """The same for the largest eigenvalue, which a series will follow."""
        return self._space or self.for_series(_PRODUCTS_FOR_EIGENVALUE)

    def for_inverse(self) -> DualSpace | None:
        """The same for an inverse, where there are not more rows than params."""
        self._ask()
        fits = self._rows <= min(MAX_DUAL_ROWS, _lists.numel(self._params))
        return self.space() if self._route != "loop" and fits else None

    def for_rows(self, most: int) -> DualSpace | None:
        """The same for ``most`` rows."""
        self._ask()
        return self.space() if self._route != "loop" and self._rows <= most else None

    def for_outputs(self, num_terms: int) -> tuple[Recording, TangentKernel] | None:
        """J and J J', where a series is faster in the space of the outputs."""
        if self._way(num_terms) != "outputs":
            return None
        assert self._recording is not None
        kept = self._kernel  # once: another thread may put another one there
        if kept is None or kept.num_uses < num_terms:
            with self._recording.reading():
                self._kernel = kept = TangentKernel(self._recording.tape, num_terms)
        return self._recording, kept

    def space(self) -> DualSpace | None:
        """The span of the rows, made once; None where there is none."""
        self._ask()
        make = self._make
        if self._space is None and make is not None and self.reason is None:
            try:
                self._space = make()
            except (MixesExamples, NotImplementedError) as error:  # a layer without gradients for each example
                self.reason = str(error) or "a layer has no gradients for each example"
            self._make = None
        return self._space

    def _ask(self) -> None:
        """Looks for the examples, once; threads that come at the same time each look, and find the same."""
        piece = self._piece
        if self._asked:
            return
        if isinstance(piece, str):
            self.reason = piece
        else:
            self._look(*piece)
        self._asked = True
        self._piece = ""

    def _no_outputs(self, piece: tuple[Jacobian, LossHessian] | str) -> str | None:
        """Why there is no series in the space of the outputs."""
        if isinstance(piece, str):
            return piece
        if not isinstance(piece[0], Recording):
            return self._goes_by_autograd()
        outputs, dtypes = piece[0].tape.outputs, (torch.float32, torch.float64)
        if not all(p.dtype == outputs.dtype and p.device == outputs.device for p in self._params):
            return "params and outputs are not all of one dtype and on one device"
        return None if outputs.dtype in dtypes else f"params are {outputs.dtype}, which sums are not kept in"

    def _goes_by_autograd(self) -> str:
        return f"the model could not be recorded, and goes by autograd ({self._unrecordable})"

    def _look(self, jacobian: Jacobian, middle: LossHessian) -> None:
        if not isinstance(jacobian, Recording):
            self.reason = self._goes_by_autograd()
            return
        tape, dual = jacobian.tape, None
        sizes = Sizes(tape, self._params)
        try:
            if tape.opaque:
                raise MixesExamples(f"there is no rule for {', '.join(tape.opaque)}")
            examples = find_examples(tape)
            rank = _rank(middle, examples)
            self._rows = rank * examples.batch
            dual = dual_costs(sizes, examples.batch, rank)
            self._make = lambda: DualSpace(jacobian, examples, middle)
        except MixesExamples as error:
            self.reason = str(error)
        outputs = None
        if self._no_outputs((jacobian, middle)) is None:
            self._recording = jacobian
            outputs = outputs_costs(sizes)
        self._costs = Costs(loop_costs(sizes), outputs, dual, self.reason)


def _rank(middle: LossHessian, examples: Examples) -> int:
    rank = middle.example_rank(examples.batch)
    if rank is None:
        raise MixesExamples("the criterion is not one whose Hessian is known example by example")
    if not 0 < rank * examples.batch <= MAX_DUAL_ROWS:
        raise MixesExamples(f"there must be 1 to {MAX_DUAL_ROWS} rows; got {rank * examples.batch}")
    return rank
