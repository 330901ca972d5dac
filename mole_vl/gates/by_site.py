"""Gates of one kind whose settings differ by site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mole_vl.faults import instance_of, refuse
from mole_vl.gates.gate import Gate, GateSpec
from mole_vl.layers import MixtureLayer
from mole_vl.sites import Site


@dataclass(frozen=True, kw_only=True)
class BySite(GateSpec):
    """Another specification for some sites: MoLA's k differs by depth.

    Args:
        default: For the sites that are not named.
        sites: By the path of a site, or of a module that holds it; the nearest decides.
    """

    default: GateSpec
    sites: Mapping[str, GateSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse(
            "BySite",
            [
                instance_of("default", self.default, GateSpec),
                *(
                    instance_of(f"sites[{path!r}]", spec, GateSpec)
                    for path, spec in self.sites.items()
                ),
                *(
                    f"the gate of {path!r} and the default do not read alike"
                    for path, spec in self.sites.items()
                    if isinstance(spec, GateSpec)
                    and isinstance(self.default, GateSpec)
                    and spec.reads_input != self.default.reads_input
                ),
            ],
        )

    @property
    def reads_input(self) -> bool:
        """Whether the gates look at their sites' inputs."""
        return self.default.reads_input

    def blind(self) -> GateSpec:
        """The default's."""
        return self.default.blind()

    def build(self, experts: Sequence[str], site: Site, matrices: Sequence[MixtureLayer]) -> Gate:
        """The gate of one site as a module."""
        holding = [path for path in self.sites if f"{site.name}.".startswith(f"{path}.")]
        spec = self.sites[max(holding, key=len)] if holding else self.default
        return spec.build(experts, site, matrices)
