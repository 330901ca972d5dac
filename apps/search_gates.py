"""Find constant weights for a mixture of LoRAs by black-box search (LoRAHub).

    accelerate launch -m apps.search_gates --config configs/text_lorahub.yaml

No gradient is taken: a few examples judge each trial. Leaves gates, all trials and the report in
the folder `search.output`; called again, it goes on where it stopped.
"""

from accelerate import PartialState

from mole_vl import save_gates
from mole_vl.domain import Domain, agreed
from mole_vl.faults import as_messages
from mole_vl.files import check_output, new_file
from mole_vl.gates import LoRAHub
from mole_vl.program import command
from mole_vl.sites import SiteKind
from mole_vl.training.search import SearchConfig, search as run


def search_gates(
    domain: Domain, search: SearchConfig, site: SiteKind = "network", report: bool = True
) -> None:
    """Find the gates, save them, and judge them.

    Args:
        domain: What is mixed, and for what: nlp.mixed_text.MixedText or
            dreambooth.subject_style.SubjectStyle.
        search: The search.
        site: Which layers share one weight for each LoRA: network, or block, layer, matrix, where
            there are many more weights to find.
        report: Whether the arms are judged on held-out examples at the end.
    """
    check_output("search.output", search.output)
    gate = LoRAHub()
    mixtures = domain.mix(gate, site, 0)
    settings = agreed(domain, mixtures, gate, site=site)
    found = run(domain.task(0.0), mixtures, search, settings)
    if PartialState().is_main_process:
        for component, mixture in mixtures.items():
            save_gates(mixture, search.output / "gates" / f"{component}.safetensors")
        print(f"{len(found.trials)} trials, loss {found.best.loss:.4f}, weights {found.weights}")
    if report:
        table = domain.report(search.output)
        if PartialState().is_main_process:
            with new_file(search.output / "report.md") as partial:
                partial.write_text(table + "\n")
            print(table)


if __name__ == "__main__":
    with as_messages("dreambooth", "nlp", "apps"):
        command(search_gates)
