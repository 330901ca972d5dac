"""Train the gates of a mixture of LoRAs; the base and the LoRAs stay as they are.

    accelerate launch train_gates.py --config configs/text_mixed.yaml
    python -m dreambooth.world.candidates
    accelerate launch train_gates.py --config configs/emoji_subject_style.yaml

Leaves gates, log, a drawing of the gates' mean weights over the steps, and the report in the folder
`fit.output`; called again, it goes on where it stopped. Gates that learn nothing, such as
`--gate Arrow --site matrix`, are judged as they stand.
"""

from accelerate import PartialState

from mole_vl import save_gates
from mole_vl.domain import Domain, prepare
from mole_vl.faults import as_messages
from mole_vl.files import check_output, new_file
from mole_vl.gates import GateSpec, MoLE
from mole_vl.program import command
from mole_vl.sites import SiteKind
from mole_vl.training import LOG, FitConfig, draw_gates, fit as run


def train_gates(
    domain: Domain,
    fit: FitConfig,
    gate: GateSpec = MoLE(),  # noqa: B008 (frozen)
    site: SiteKind = "block",
    after: int = 0,
    balance: float = 0.0,
    centring: int = 4,
    alone: bool = False,
    report: bool = True,
) -> None:
    """Train gates, save them, and judge them.

    Args:
        domain: What is mixed, and for what: nlp.mixed_text.MixedText or
            dreambooth.subject_style.SubjectStyle.
        fit: The training loop.
        gate: What decides the weights.
        site: Which layers share one gate: matrix, layer, block, network or preview.
        after: With site network or preview, how many blocks run before the gate reads (see
            `mole_vl.mix`).
        balance: Factor of the balance loss.
        centring: Batches that the features of gates on hidden states are centred over before the
            training; 0 for none.
        alone: Whether the gate learns from what each expert alone makes of each example, found
            once, instead of from the mixture: for one gate over rows (site preview).
        report: Whether the arms are judged on held-out examples at the end.
    """
    check_output("fit.output", fit.output)
    mixtures, task, settings = prepare(
        domain, gate, fit, site=site, after=after, balance=balance, centring=centring, alone=alone
    )
    main = PartialState().is_main_process
    if learns := bool(task.parameters()):
        result = run(task, fit, settings)
        done = f"{result.step} steps, {result.seconds:.0f} s"
    elif (fit.output / LOG).exists():
        raise ValueError(
            f"fit.output: {fit.output} holds gates that were trained, and {type(gate).__name__} "
            "gates have nothing to train: take a new folder"
        )
    else:
        done = f"{type(gate).__name__} gates have nothing to train"
    if main:
        for component, mixture in mixtures.items():
            save_gates(mixture, fit.output / "gates" / f"{component}.safetensors")
        if learns:
            draw_gates(fit.output / LOG, mixtures, fit.output / "gates")
        print(f"{done}; gates in {fit.output / 'gates'}")
    if report:
        table = domain.report(fit.output)
        if main:
            with new_file(fit.output / "report.md") as partial:
                partial.write_text(table + "\n")
            print(table)


if __name__ == "__main__":
    with as_messages("dreambooth", "nlp"):
        command(train_gates)
