"""The product J J' of a recording with its transpose, layer by layer, with no list like the params between."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from ._tape import Tape, pull_back, pulled


class TangentKernel:
    """J J' of a tape, a map on tensors like its outputs; made for about ``num_uses`` products.

    A cotangent goes back through all layers and leaves its value at each one that has params; then a tangent comes
    forward, to which each layer adds what its own params make of what was left there. Only a param that is used in
    several places couples them: what goes back to it is summed first.

    Jacot, Gabriel, Hongler, Neural tangent kernel (2018), for the matrix and its name.
    """

    def __init__(self, tape: Tape, num_uses: int) -> None:
        self.num_uses = num_uses
        self._tape = tape
        self._output = tape.output_slot
        # By slot; the last one is for constants, whose slot is -1.
        self._nothing: list[Tensor | None] = [None] * (tape.num_slots + 1)
        uses = Counter(node.slots[i] for node in tape.nodes for i in node.wanted)
        self._backward = []
        self._forward = []
        for node, dead in zip(tape.nodes, tape.dead, strict=True):
            own = [i for i in node.wanted if node.slots[i] < tape.num_params and uses[node.slots[i]] == 1]
            onwards = [i for i in node.wanted if i not in own]
            self._backward.append(pulled(node, onwards, kept=bool(own)))
            through = node.through_params(own, num_uses) if own else None
            self._forward.append((node.jvp, through, node.output, node.slots, dead))
        self._backward.reverse()

    def product(self, u: Tensor) -> Tensor:
        """J J' u, in memory of its own."""
        tape = self._tape
        if not tape.nodes:  # the output is one of the params
            return u.clone()
        left, found = self._nothing.copy(), self._nothing.copy()
        left[self._output] = u
        pull_back(self._backward, left, [False] * len(left), True)
        found[: tape.num_params] = left[: tape.num_params]
        for jvp, through, output, slots, dead in self._forward:
            tangents = [found[s] for s in slots]
            if through is None:
                found[output] = jvp(tangents)
            else:
                cotangent, left[output] = left[output], None
                assert cotangent is not None
                found[output] = through(tangents, cotangent)
            for slot in dead:
                found[slot] = None
        result = found[self._output]
        assert result is not None
        return result.clone() if tape.nodes[-1].shares_memory else result
