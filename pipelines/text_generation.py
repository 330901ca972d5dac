"""A language model whose task LoRAs are mixed by gates, as a pipeline."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mole_vl import Expert, Mixture, merged, mix, read_components, write_peft
from mole_vl.arms import together
from mole_vl.faults import at_least, refuse
from mole_vl.files import check_output
from mole_vl.gates import Average, GateSpec
from mole_vl.sites import SiteKind
from nlp.adapter import blocks, bound
from nlp.data import (
    EncodedRow,
    Style,
    TextRow,
    Tokenizer,
    check_lengths,
    encode_prompt,
    texts_of,
    to_device,
)
from nlp.forms import Causal, Form, fault_of_room, form_of
from nlp.mixing import mix_by_file
from nlp.models import Bits, load_base
from pipelines.folder import (
    check_place,
    drop_mixture,
    has_mixture,
    load_mixture,
    save_mixture,
)
from pipelines.recording import Recording
from pipelines.text_weights import TextWeights, weights_of_rows
from pipelines.token_weights import TokenWeights, traced, with_answers

PART = "model"
# Arguments of `generate` that the prompts decide, or that would change what it returns.
_OWN = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "pad_token_id",
        "return_dict_in_generate")  # fmt: skip


class MoLETextGeneration:
    """Prompts in, answers out, by a base, its experts and their gates.

    Args:
        model: A language model of transformers, causal or encoder-decoder; it may be mixed already.
        tokenizer: Its tokenizer, with a pad token.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._loaded: list[Expert] = []

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        quantise: Bits | None = None,
        encoder: str | None = None,
    ) -> "MoLETextGeneration":
        """A base as `nlp.models.load_base` finds it, with the experts and gates saved with it.

        Args:
            name: A Hub id, a folder, or smollm2-135m-instruct (by pip).
            dtype: Precision of the weights.
            quantise: Linear layers of the base in 8bit or 4bit (needs bitsandbytes).
            encoder: Where the sentence encoder is that the saved gates read, if it was moved.

        Raises:
            FileNotFoundError: There is no such model, or the encoder of its gates is gone.
            ValueError: The mixture in its folder is damaged; bitsandbytes is missing; an encoder
                for gates that read none.
        """
        saved = has_mixture(Path(name))
        if encoder is not None and not saved:
            raise ValueError(f"encoder is given, and no gates that would read it lie in {name}")
        pipe = cls(*load_base(str(name), dtype=dtype, quantise=quantise))
        if saved:
            load_mixture(Path(name), pipe.load_experts, partial(pipe.load_gates, encoder=encoder))
        return pipe

    @property
    def mixture(self) -> Mixture:
        """The handle of the mixed model.

        Raises:
            RuntimeError: No experts are loaded.
        """
        found = getattr(self.model, "mixture", None)
        if not isinstance(found, Mixture):
            raise RuntimeError("there is nothing to mix: call load_experts() first")
        return found

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts: the order of weights."""
        return self.mixture.names if self._mixed else ()

    @property
    def _mixed(self) -> bool:
        return isinstance(getattr(self.model, "mixture", None), Mixture)

    def _bank(self) -> list[Expert]:
        """The experts as they were loaded; those of a model that was mixed by hand as they are."""
        known = tuple(one.name for one in self._loaded) == self.mixture.names
        return self._loaded if known else self.mixture.experts()

    def load_experts(
        self,
        experts: Sequence[str | Path | Expert] | Mapping[str, str | Path],
        *,
        gate: GateSpec = Average(),  # noqa: B008 (frozen)
        site: SiteKind = "block",
        after: int = 0,
    ) -> None:
        """Mix task LoRAs into the model.

        Args:
            experts: PEFT folders, under their own names or the keys of a mapping; or experts.
            gate: What decides the weights, until `load_gates`.
            site: As for `mole_vl.mix`.
            after: As for `mole_vl.mix`.

        Raises:
            FileNotFoundError: No LoRA there.
            ValueError: Experts that share a name or do not fit; the model is as it was then.
            RuntimeError: Experts are loaded already.
        """
        if self._mixed:
            raise RuntimeError(
                f"experts are loaded already ({', '.join(self.experts)}): call unload_experts() "
                "first"
            )
        if not isinstance(experts, Mapping | Sequence) or isinstance(experts, str):
            raise ValueError(f"experts is {experts!r}, expected a list of folders or experts")
        given = experts.items() if isinstance(experts, Mapping) else [(None, e) for e in experts]
        read = [one if isinstance(one, Expert) else _read(one, name) for name, one in given]
        mix(
            self.model, read, gate=gate, site=site, after=after, blocks=blocks(self.model),
            calls=form_of(self.model).calls,
        )  # fmt: skip
        self._loaded = read

    def load_gates(
        self, path: str | Path, *, allow_changed: bool = False, encoder: str | None = None
    ) -> None:
        """Take trained gates, with their site.

        Args:
            path: A gate file, or the folder that training left it in, as model.safetensors.
            allow_changed: As for `mole_vl.mix_from`.
            encoder: Where the sentence encoder is that the gates read, if it was moved.

        Raises:
            FileNotFoundError: No gate file there, or the sentence encoder that it names is gone.
            ValueError: Gates that do not fit the experts; the pipeline is left as it was.
            RuntimeError: No experts are loaded.
        """
        path = Path(path)
        before, experts = self.mixture, self._bank()
        before.unmix()
        try:
            mix_by_file(
                self.model,
                self.tokenizer,
                experts,
                path / f"{PART}.safetensors" if path.is_dir() else path,
                allow_changed=allow_changed,
                encoder=encoder,
            )
        except BaseException:
            before.wire(self.model)
            raise

    def unload_experts(self) -> None:
        """Give the base back, bit for bit."""
        self.mixture.unmix()
        self._loaded = []

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        style: Style = "plain",
        strength: float | Tensor = 1.0,
        masked: Sequence[str] = (),
        weights: TextWeights | None = None,
        max_new_tokens: int = 64,
        **generate: Any,
    ) -> list[str]:
        """Answer prompts, all in one batch.

        Args:
            prompts: One or several.
            style: Prompts as they stand (plain), or as the user's turn of the chat template (chat).
            strength: Multiplies the whole mixture.
            masked: Names of experts left out.
            weights: Weights that replace the gates', for all prompts or for each (`TextWeights`).
            max_new_tokens: The most tokens of an answer.
            generate: As for transformers' `generate`: beams, sampling, `num_return_sequences` ...

        Returns:
            The answers in the prompts' order, without the prompts; of several sequences for each
            prompt, one prompt's after another's.

        Raises:
            ValueError: No prompt, or one that leaves no room for `max_new_tokens`; an unknown
                expert, or weights for another number of prompts.
            RuntimeError: No experts are loaded.
        """
        rows = self._rows(prompts, style)
        with self._mixing(len(rows), strength, masked, weights):
            said = self._said(rows, max_new_tokens=max_new_tokens, **generate)
        return self._texts(said)

    @torch.no_grad()
    def trace(
        self,
        prompts: str | Sequence[str],
        *,
        style: Style = "plain",
        strength: float | Tensor = 1.0,
        masked: Sequence[str] = (),
        weights: TextWeights | None = None,
        max_new_tokens: int = 64,
        **generate: Any,
    ) -> list[TokenWeights]:
        """Answer prompts, and tell the weights by site, token and expert.

        Each answer is read once more when it is there, in one forward: so the weights are those of
        the tokens that were kept, whatever beams or sampling tried.

        Args:
            prompts: As for a call, and so are the others.
            style: As for a call.
            strength: As for a call.
            masked: As for a call.
            weights: As for a call.
            max_new_tokens: As for a call.
            generate: As for a call.

        Returns:
            The answers in the order of a call's, each with its tokens and their weights.

        Raises:
            ValueError: What a call refuses; an encoder-decoder, whose two halves read different
                tokens: `mixture.record()` lists what its gates say.
            RuntimeError: No experts are loaded.
        """
        if not isinstance(form_of(self.model), Causal):
            raise ValueError(
                "trace: an encoder and a decoder read different tokens, expected a causal model; "
                "mixture.record() lists what their gates say"
            )
        rows = self._rows(prompts, style)
        # transformers' own types say less than its models have.
        model: Any = self.model
        with self._mixing(len(rows), strength, masked, weights):
            said = self._said(rows, max_new_tokens=max_new_tokens, **generate)
            ends = generate.get("eos_token_id", model.generation_config.eos_token_id)
            answered = with_answers(rows, said, ends, self.tokenizer.pad_token_id)
            return traced(self.model, self.tokenizer, answered, self._texts(said))

    def _rows(self, prompts: str | Sequence[str], style: Style) -> list[EncodedRow]:
        return [
            EncodedRow(encode_prompt(text, self.tokenizer, style), (), TextRow(text, "", ""))
            for text in texts_of("prompts", prompts)
        ]

    def _mixing(
        self,
        rows: int,
        strength: float | Tensor,
        masked: Sequence[str],
        weights: TextWeights | None,
    ) -> ExitStack:
        mixture = self.mixture
        contexts = [mixture.scaled(strength)]
        contexts += [mixture.masked(masked)] if masked else []
        if weights is not None:
            contexts.append(mixture.pinned(weights_of_rows(weights, mixture.names, rows)))
        return together(contexts)

    def _said(self, rows: Sequence[EncodedRow], **generate: Any) -> Tensor:
        """The ids of the answers, ended by padding."""
        model: Any = self.model
        form = form_of(model)
        _check_call(form, rows, generate)
        pad = self.tokenizer.pad_token_id
        batch = to_device(form.prompts(rows, pad), model.device)
        with bound(self.mixture)(batch):
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                pad_token_id=pad,
                **generate,
            )
        return form.said(ids, batch)

    def _texts(self, said: Tensor) -> list[str]:
        return [t.strip() for t in self.tokenizer.batch_decode(said, skip_special_tokens=True)]

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """A context that records the weights of all that is said inside, by site and forward.

        `trace` tells them by token.
        """
        mixture = self.mixture
        with mixture.record() as records:
            yield Recording({PART: mixture.names}, {PART: records})

    def export(
        self,
        path: str | Path,
        rank: int | None = None,
        *,
        weights: Mapping[str, float] | Recording | None = None,
    ) -> float:
        """Write the mixture as one ordinary PEFT LoRA, for tools that know nothing of gates.

        Args:
            path: The folder; its name is the LoRA's.
            rank: The most that a layer may have; as much as its experts have together if not given.
            weights: Constant weights by expert's name (zero for the others), or what `record()`
                listed, for its means; None for gates that are constant.

        Returns:
            What the LoRA misses: Frobenius norm over that of the whole update.

        Raises:
            ValueError: A rank below 1, an unknown expert, or no weights for gates that vary.
            RuntimeError: No experts are loaded.
        """
        mixture = self.mixture
        if isinstance(weights, Recording):
            weights.check_experts(PART, mixture.names)
            constant: Mapping[str, Any] | None = weights.mean(PART)
        else:
            constant = weights
        found = merged(mixture, Path(path).resolve().name, constant, rank)
        write_peft(found.expert, path)
        return found.total

    def save_pretrained(self, folder: str | Path) -> None:
        """Write base, tokenizer, experts and gates into one folder that `from_pretrained` reads.

        transformers reads the base there as it is without experts.

        Raises:
            ValueError: The folder cannot be written, or other files are where the mixture goes.
        """
        folder = Path(folder)
        check_output("save_pretrained", folder)
        check_place(folder)
        model, tokenizer = self.model, self.tokenizer
        if not self._mixed:
            model.save_pretrained(folder)
            drop_mixture(folder)
        else:
            mixture = self.mixture
            # Nobody asks meanwhile; a baked mixture refuses the context.
            with mixture.scaled(1.0):
                mixture.unmix()
                try:
                    model.save_pretrained(folder)
                finally:
                    mixture.wire(model)
            bank = {one.name: {PART: one} for one in self._bank()}
            save_mixture(folder, bank, {PART: mixture})
        tokenizer.save_pretrained(folder)  # pyright: ignore[reportAttributeAccessIssue]


def _check_call(form: Form, rows: Sequence[EncodedRow], generate: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of `generate` that are the pipeline's own, or leave no room."""
    own = [name for name in _OWN if name in generate]
    new = generate["max_new_tokens"]
    whole = isinstance(new, int) and not isinstance(new, bool)
    refuse(
        "generate",
        [
            f"{', '.join(own)}: the pipeline says this itself, leave it out" if own else None,
            None if whole else f"max_new_tokens is {new!r}, expected a whole number",
            at_least("max_new_tokens", new, 1) if whole else None,
        ],
    )
    if form.longest is not None:
        most = form.room(new)
        refuse("generate", [fault_of_room(form, new)])
        check_lengths(
            f"prompts: longer than the {most} tokens that the base reads before {new} new ones "
            "(max_new_tokens)",
            rows,
            [len(row.prompt) for row in rows],
            most,
        )


def _read(folder: str | Path, name: str | None) -> Expert:
    parts = read_components(folder, name)
    if len(parts) != 1:
        raise ValueError(
            f"{folder} holds {', '.join(parts)}, expected the LoRA of one language model"
        )
    return next(iter(parts.values()))
