"""A probe: how large the stream is after each layer. Copy it, and measure something else."""

from dataclasses import dataclass
from typing import ClassVar

from contextlab.inspect import Drawing, Probe, capture, probe_table
from contextlab.registry import register


@register("probe", "stream_size", family="streams", cases=({"prompts": 4},))
@dataclass(frozen=True)
class StreamSize(Probe):
    """How large the residual stream is after each layer: the root mean square of its numbers.

    The control is the same in a model with fresh weights.

    prompts: over which it is a mean.
    """

    drawing: ClassVar[Drawing] = Drawing("lines", "layer", figures=("measure",))

    prompts: int = 64

    def measure(self, subject):
        inputs = subject.prompts(self.prompts).inputs
        found = []
        for model in (subject.model, subject.untrained()):
            with capture(model, "blocks.*.output") as taken:
                model(inputs)
            found.append({site: stream.square().mean().sqrt().item() for site, stream in taken.items()})
        trained, fresh = found
        return probe_table(
            {"site": site, "measure": "size", "value": value, "control": fresh[site], "n": self.prompts}
            for site, value in trained.items()
        )

    def words(self, rows):
        last = rows[-1]
        return [f"After the last layer the stream's size is {last['value']:.2f}, fresh {last['control']:.2f}."]
