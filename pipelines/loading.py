"""Mixing and gating the parts of a pipeline: all of them, or none on an error."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from dreambooth.adapter import blocks, fitted_to
from dreambooth.conditioning import features_of_file
from mole_vl import Expert, Mixture, mix, mix_from, read_gates
from mole_vl.gates import GateSpec
from mole_vl.sites import SiteKind

# Parts of an expert by component, by the expert's name.
Bank = Mapping[str, Mapping[str, Expert]]


def fitting(bank: Bank, models: Mapping[str, nn.Module], wanted: Sequence[str] | None) -> Bank:
    """The experts' parts that are to be mixed, under the models' own paths.

    Args:
        bank: The experts as they were read.
        models: The pipeline's parts.
        wanted: The parts to mix; all that the experts change if not given.

    Raises:
        ValueError: A part that the pipeline lacks, or no part left of an expert.
    """
    lacking = [part for part in wanted or () if part not in models]
    if lacking:
        raise ValueError(_lacks("parts names", lacking, models))
    found = {}
    for name, parts in bank.items():
        kept = {p: expert for p, expert in parts.items() if wanted is None or p in wanted}
        if not kept:
            raise ValueError(f"expert {name!r} changes {_all(parts)} alone, none of {_all(wanted)}")
        lacking = [part for part in kept if part not in models]
        if lacking:
            how = f"expert {name!r} changes"
            raise ValueError(f"{_lacks(how, lacking, models)}; `parts` says what to mix")
        found[name] = {part: fitted_to(expert, models[part]) for part, expert in kept.items()}
    return found


def mix_parts(
    bank: Bank, models: Mapping[str, nn.Module], gate: GateSpec, site: SiteKind, after: int
) -> None:
    """Mix every model that experts change.

    Raises:
        ValueError: Experts, gate or site that do not fit; nothing is mixed then.
    """
    _check_site(site)
    _check_free(models)
    with ExitStack() as undo:
        for part, experts in _by_part(bank, models).items():
            model = models[part]
            found = blocks(model)  # pyright: ignore[reportArgumentType]
            mixture = mix(model, experts, gate=gate, site=site, after=after, blocks=found)
            undo.callback(mixture.unmix)
        undo.pop_all()


def gate_parts(
    bank: Bank, models: Mapping[str, nn.Module], folder: Path, steps: int, allow_changed: bool
) -> None:
    """Give mixed models the gates of a folder's files, PART.safetensors; other parts keep theirs.

    Args:
        bank: The experts.
        models: The pipeline's parts.
        folder: Where the files are.
        steps: Time steps that the base was trained with, for gates that are told them.
        allow_changed: As for `mole_vl.mix_from`.

    Raises:
        FileNotFoundError: No gate file there.
        ValueError: Gates of another part, or for other experts or sites; all is as before then.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file, expected the gates' folder, {folder.parent}")
    files = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    experts = _by_part(bank, models)
    if not files:
        raise FileNotFoundError(f"{folder}: no gate files, such as unet.safetensors")
    strange = [part for part in files if part not in experts]
    if strange:
        raise ValueError(
            f"{folder} has gates of {_all(strange)}; the loaded experts change {_all(experts)}"
        )
    with ExitStack() as undo:
        for part, path in files.items():
            model = models[part]
            before = model.mixture
            assert isinstance(before, Mixture)
            before.unmix()
            undo.callback(before.wire, model)
            found = blocks(model)  # pyright: ignore[reportArgumentType]
            mixture = mix_from(
                model,
                experts[part],
                path,
                blocks=found,
                allow_changed=allow_changed,
                features=features_of_file(read_gates(path), model, steps),
            )
            undo.callback(mixture.unmix)
            _check_site(mixture.layout.kind)
        undo.pop_all()


def _by_part(bank: Bank, models: Mapping[str, nn.Module]) -> dict[str, list[Expert]]:
    found = {part: [parts[part] for parts in bank.values() if part in parts] for part in models}
    return {part: experts for part, experts in found.items() if experts}


def _check_site(site: str) -> None:
    if site == "preview":
        raise ValueError(
            "site 'preview' holds one reading for all that follows, and a UNet's input changes at "
            "every step: use site 'network', or 'block'"
        )


def _check_free(models: Mapping[str, nn.Module]) -> None:
    for part, model in models.items():
        if getattr(model, "peft_config", None):
            raise RuntimeError(
                f"load_experts: {part} carries LoRAs of load_lora_weights(); call "
                "unload_lora_weights() first"
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            raise RuntimeError(
                f"load_experts: {part} is offloaded, its weights are elsewhere; load the experts "
                "first, then enable_sequential_cpu_offload()"
            )


def _lacks(how: str, parts: Sequence[str], models: Mapping[str, nn.Module]) -> str:
    return f"{how} {_all(parts)}, which this pipeline lacks (it has {_all(models)})"


def _all(names: object) -> str:
    return ", ".join(names) if names else "nothing"  # pyright: ignore[reportArgumentType, reportCallIssue]
