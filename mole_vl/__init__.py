"""mole-vl: learned mixtures of LoRAs."""

from mole_vl.build import mix as mix
from mole_vl.compression import Merged as Merged
from mole_vl.experts import Expert as Expert, Factors as Factors
from mole_vl.features import Features as Features
from mole_vl.gate_file import (
    mix_from as mix_from,
    read_gates as read_gates,
    save_gates as save_gates,
)
from mole_vl.merge import mean_weights as mean_weights, merged as merged
from mole_vl.mixture import Mixture as Mixture
from mole_vl.passes import Masks as Masks
from mole_vl.peft_folder import (
    read_components as read_components,
    read_peft as read_peft,
    trained_expert as trained_expert,
    write_peft as write_peft,
)
