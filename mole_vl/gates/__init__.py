"""Gates: one file each; scores and normalisers are their parts."""

from mole_vl.gates.arrow import Arrow as Arrow, KeptArrow as KeptArrow
from mole_vl.gates.by_site import BySite as BySite
from mole_vl.gates.by_tenant import ByTenant as ByTenant, TenantsGate as TenantsGate
from mole_vl.gates.centroid import (
    CentroidGate as CentroidGate,
    Nearest as Nearest,
    row_features as row_features,
    take_centroids as take_centroids,
)
from mole_vl.gates.constants import (
    Average as Average,
    ConstantGate as ConstantGate,
    Constants as Constants,
    LoRAHub as LoRAHub,
    Sum as Sum,
)
from mole_vl.gates.gate import Gate as Gate, GateInput as GateInput, GateSpec as GateSpec
from mole_vl.gates.mole import MoLE as MoLE
from mole_vl.gates.normalisers import (
    NormaliserSpec as NormaliserSpec,
    ScaledSoftmax as ScaledSoftmax,
    Sigmoid as Sigmoid,
    Softmax as Softmax,
)
from mole_vl.gates.output import NOBODY as NOBODY, GateOutput as GateOutput
from mole_vl.gates.phatgoose import (
    Phatgoose as Phatgoose,
    Usefulness as Usefulness,
    UsefulnessGate as UsefulnessGate,
    take_directions as take_directions,
)
from mole_vl.gates.router import (
    Choice as Choice,
    Router as Router,
    Switch as Switch,
    TopK as TopK,
    TopP as TopP,
)
from mole_vl.gates.scores import (
    Free as Free,
    Hidden as Hidden,
    Responses as Responses,
    ScoreSpec as ScoreSpec,
)
