"""Training: one loop for every domain."""

from mole_vl.training.centring import centre_gates as centre_gates
from mole_vl.training.choice import ChoiceTask as ChoiceTask, choice_task as choice_task
from mole_vl.training.config import FitConfig as FitConfig
from mole_vl.training.fit import (
    LOG as LOG,
    FitResult as FitResult,
    Progress as Progress,
    Stop as Stop,
    Watch as Watch,
    fit as fit,
)
from mole_vl.training.gauges import Gauged as Gauged, draw_gates as draw_gates
from mole_vl.training.rows import Alike as Alike, Row as Row, mix_seed as mix_seed
from mole_vl.training.snapshot import Snapshot as Snapshot, read_snapshot as read_snapshot
from mole_vl.training.task import Part as Part, Task as Task, Term as Term
