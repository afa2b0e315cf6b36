"""What conversion did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ConversionReport:
    """What became of the parts of a model, by their names: ``print`` it."""

    #: Layers that respond: "Linear -> DeltaStnLinear".
    converted: dict[str, str] = field(default_factory=dict)
    #: Dropouts that are tuned, and their hyperparameters.
    dropouts: dict[str, str] = field(default_factory=dict)
    #: Parts with parameters or a rate that were left as they were, and why.
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        tuned = {name: f"rate is {hparam!r}" for name, hparam in self.dropouts.items()}
        parts = (("responds", self.converted), ("tuned", tuned), ("left alone", self.left))
        rows = [f"{kind:<10}  {name or '(the model)'}: {what}" for kind, part in parts for name, what in part.items()]
        return "\n".join(rows)
