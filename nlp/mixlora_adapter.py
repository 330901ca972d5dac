"""One adapter of m-LoRA's and MoE-PEFT's training settings, its keys as spelt there."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mole_vl.faults import at_least, one_of, plain_word, positive, refuse, share
from mole_vl.fresh import Form
from mole_vl.gates import Choice, Switch, TopK, TopP
from mole_vl.mixlora import MixLoRA
from mole_vl.mixlora_header import STRATEGIES, TODAY
from mole_vl.training import FitConfig
from nlp.train_experts import LoRA

Number: TypeAlias = int | float
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]
RUNS = "runs"
"""The folder of the runs, beside the adapters'."""

_CAUSAL = ("", "causal", "casual")
_OF_STRATEGY = {
    "mixlora": ("top_k",),
    "mixlora-dynamic": ("top_p",),
    "mixlora-switch": ("expert_capacity", "router_z_loss_coef"),
}
_OF_MIXLORA = (
    "num_experts", "act_fn", "expert_lora", "router_aux_loss_coef", "router_loss",
    "router_init_range", "jitter_noise", *(n for own in _OF_STRATEGY.values() for n in own),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExpertForm:
    """The experts' own form (`expert_lora`); what is not given is the adapter's.

    Args:
        r: Rank.
        lora_alpha: Updates count lora_alpha / r times.
        lora_dropout: As the adapter's: there is one for all.
        use_rslora: Updates count lora_alpha / sqrt(r) times.
        use_dora: Whether they are DoRAs.
    """

    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """One adapter: an entry of `lora`.

    Args:
        name: Its name, also of its folder.
        data: The rows it learns: a JSON file, a Hub id, or ID:SUBSET; instruction, input, output.
        lr: Peak learning rate.
        batch_size: Rows of a step.
        num_epochs: How often it sees each row.
        r: Rank of its factors.
        lora_alpha: Updates count lora_alpha / r times.
        lora_dropout: Share of an update's inputs that a training step leaves out.
        target_modules: Names of the layers that get an update, or whether they do, by name.
        task_name: causal (or casual, or nothing): instructions.
        task_type: The same, in an older version.
        prompt: Template: alpaca, moe_peft, or a JSON file.
        micro_batch_size: Rows at once; the batch's if not given.
        test_batch_size: Rows generated at once when it is judged.
        evaluate_batch_size: The same, in a newer version.
        test_data: Rows that it is judged by, as `data`.
        val_set_size: How many of its rows (a whole number), or which share of them, are not
            learned, so that it may be judged by them; -1 for none.
        train_on_inputs: Whether the prompts are scored too, as they were there.
        weight_decay: Decoupled decay.
        scheduler_type: Course of the learning rate.
        warmup_ratio: Share of the steps over which it rises from zero.
        warmup_steps: How many steps; a number below 1 is a share of them.
        use_rslora: Updates count lora_alpha / sqrt(r) times.
        use_dora: Whether the updates are DoRAs, which learn the norms of the base's rows too.
        peft_type: MIXLORA or LORA, as the routing strategy says already.
        routing_strategy: mixlora, mixlora-dynamic or mixlora-switch; none for an ordinary LoRA.
        num_experts: Of each feed-forward.
        act_fn: The feed-forwards' nonlinearity, which is the base's own.
        expert_lora: The experts' form.
        router_aux_loss_coef: Factor of the load-balance loss.
        router_loss: Whether there is any loss of the routers.
        router_init_range: Standard deviation of the routers' start; 0.02, for switch 1.
        jitter_noise: In training a router's input is multiplied by U(1 - jitter_noise,
            1 + jitter_noise); 0, for switch 0.01.
        top_k: mixlora: experts of a token.
        top_p: mixlora-dynamic: their shares' sum.
        expert_capacity: mixlora-switch: tokens of a row that an expert takes in training.
        router_z_loss_coef: mixlora-switch: factor of the z-loss.
    """

    name: str
    data: str
    lr: float
    batch_size: int
    num_epochs: float
    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: dict[str, bool] | list[str]
    task_name: str = "causal"
    task_type: str = "causal"
    prompt: str = "moe_peft"
    micro_batch_size: int | None = None
    test_batch_size: int | None = None
    evaluate_batch_size: int | None = None
    test_data: str | None = None
    val_set_size: Number = -1
    train_on_inputs: bool = False
    weight_decay: float = 0.01
    scheduler_type: Schedule = "constant"
    warmup_ratio: float = 0.0
    warmup_steps: Number = 0
    use_rslora: bool = False
    use_dora: bool = False
    peft_type: Literal["MIXLORA", "LORA"] | None = None
    routing_strategy: str | None = None
    num_experts: int | None = None
    act_fn: str | None = None
    expert_lora: ExpertForm | None = None
    router_aux_loss_coef: float | None = None
    router_loss: bool | None = None
    router_init_range: float | None = None
    jitter_noise: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    expert_capacity: int | None = None
    router_z_loss_coef: float | None = None

    def __post_init__(self) -> None:
        refuse(
            self.name,
            [
                plain_word("name", self.name),
                f"name is {RUNS!r}, which is the folder of the runs" if self.name == RUNS else None,
                None if self.data else "data is empty, expected a JSON file or a Hub id",
                *self._faults_of_training(),
                *self._faults_of_form(),
                *(self._faults_of_experts() if self.strategy else self._faults_of_plain()),
            ],
        )

    def _faults_of_training(self) -> Iterator[str | None]:
        for key in ("task_name", "task_type"):
            if getattr(self, key) not in _CAUSAL:
                yield f"{key} is {getattr(self, key)!r}, expected 'causal': hand its rows to data"
        yield positive("lr", self.lr)
        yield positive("num_epochs", self.num_epochs)
        for key in ("batch_size", "micro_batch_size", "evaluate_batch_size", "test_batch_size"):
            yield at_least(key, getattr(self, key), 1)
        if self.batch_size > 0 and self.micro > 0 and self.batch_size % self.micro:
            yield f"micro_batch_size is {self.micro}, which does not divide {self.batch_size} rows"
        yield at_least("weight_decay", self.weight_decay, 0)
        yield share("warmup_ratio", self.warmup_ratio)
        yield at_least("warmup_steps", self.warmup_steps, 0)
        if 1 < self.warmup_steps < math.inf and self.warmup_steps % 1:
            yield f"warmup_steps is {self.warmup_steps}, expected a whole number or a share"
        if self.warmup_ratio and self.warmup_steps:
            yield "warmup_ratio and warmup_steps are both given, expected one of them"
        held = self.val_set_size
        if held != -1 and not (held >= 0 and (held <= 1 or held % 1 == 0)):
            yield f"val_set_size is {held}, expected a number of rows, a share, or -1"
        if self.test_data and self.held_out:
            yield "test_data and val_set_size are both given, expected one of them"

    def _faults_of_form(self) -> Iterator[str | None]:
        yield at_least("r", self.r, 1)
        yield positive("lora_alpha", self.lora_alpha)
        yield share("lora_dropout", self.lora_dropout)
        if not self.targets:
            yield "target_modules names no layer that is to get an update"

    def _faults_of_plain(self) -> Iterator[str | None]:
        if self.routing_strategy is not None:
            yield one_of("routing_strategy", self.routing_strategy, STRATEGIES)
            return
        if self.peft_type == "MIXLORA":
            yield f"routing_strategy has no value, expected one of {', '.join(STRATEGIES)}"
        for key in _OF_MIXLORA:
            if getattr(self, key) is not None:
                yield f"{key} is given without a routing_strategy, which makes a MixLoRA of it"

    def _faults_of_experts(self) -> Iterator[str | None]:
        assert self.strategy is not None
        if self.peft_type == "LORA":
            yield "peft_type is 'LORA', expected 'MIXLORA' beside a routing_strategy"
        if self.num_experts is None:
            yield "num_experts has no value"
        for key in ("num_experts", "top_k", "expert_capacity"):
            yield at_least(key, getattr(self, key), 1)
        for key in ("router_aux_loss_coef", "router_z_loss_coef"):
            yield at_least(key, getattr(self, key), 0)
        yield positive("router_init_range", self.router_init_range)
        yield share("jitter_noise", self.jitter_noise or 0.0)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"top_p is {self.top_p}, expected above 0, at most 1"
        for strategy, keys in _OF_STRATEGY.items():
            for key in keys:
                if strategy != self.strategy and getattr(self, key) is not None:
                    yield f"{key} is for {strategy}, and this is {self.strategy}"
        if self.router_loss is False:
            for key in ("router_aux_loss_coef", "router_z_loss_coef"):
                if getattr(self, key):
                    yield f"{key} is {getattr(self, key)}, and router_loss is false"
        own = self.expert_lora or ExpertForm()
        yield at_least("expert_lora.r", own.r, 1)
        yield positive("expert_lora.lora_alpha", own.lora_alpha)
        if own.lora_dropout not in (None, self.lora_dropout):
            yield (
                f"expert_lora.lora_dropout is {own.lora_dropout}, expected the adapter's own, "
                f"{self.lora_dropout}: there is one for all"
            )

    @property
    def strategy(self) -> str | None:
        """Today's name of the routing strategy; None for an ordinary LoRA, or an unknown one."""
        return STRATEGIES.get(self.routing_strategy or "")

    @property
    def micro(self) -> int:
        """Rows at once."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    @property
    def test_rows(self) -> int:
        """Rows generated at once when it is judged."""
        return self.evaluate_batch_size or self.test_batch_size or 16

    @property
    def held_out(self) -> int | float:
        """How many of its rows, or which share of them, are not learned."""
        return max(0, self.val_set_size)

    @property
    def targets(self) -> tuple[str, ...]:
        """Today's names of the layers that get an update."""
        given = self.target_modules
        names = [n for n, on in given.items() if on] if isinstance(given, dict) else given
        return tuple(dict.fromkeys(TODAY.get(name, name) for name in names))

    @property
    def method(self) -> MixLoRA:
        """The mixture, for an adapter with a routing strategy."""
        assert self.strategy is not None and self.num_experts is not None
        switch, own = self.strategy == "mixlora-switch", self.expert_lora or ExpertForm()
        shared = Form(
            rank=self.r, alpha=self.lora_alpha, rslora=self.use_rslora, dora=self.use_dora
        )
        z = _or(self.router_z_loss_coef, 0.001 if switch else 0.0)
        losses = self.router_loss is not False
        return MixLoRA(
            experts=self.num_experts,
            choice=self._choice(),
            targets=self.targets,
            form=Form(
                rank=_or(own.r, self.r),
                alpha=_or(own.lora_alpha, self.lora_alpha),
                rslora=_or(own.use_rslora, self.use_rslora),
                dora=_or(own.use_dora, self.use_dora),
            ),
            shared=shared,
            dropout=self.lora_dropout,
            jitter=_or(self.jitter_noise, 0.01 if switch else 0.0),
            spread=_or(self.router_init_range, 1.0 if switch else 0.02),
            balance=_or(self.router_aux_loss_coef, 0.001) if losses else 0.0,
            z=z if losses else 0.0,
        )

    def _choice(self) -> Choice:
        if self.strategy == "mixlora":
            return TopK(k=_or(self.top_k, 2))
        if self.strategy == "mixlora-switch":
            return Switch(capacity=_or(self.expert_capacity, 32))
        p = _or(self.top_p, 0.8)
        return TopP(p=p) if p < 1 else TopK(k=_or(self.num_experts, 1))

    @property
    def lora(self) -> LoRA:
        """The form, for an adapter without a routing strategy."""
        # The same scale, alpha / sqrt(r), as an alpha that r divides.
        alpha = self.lora_alpha * math.sqrt(self.r) if self.use_rslora else self.lora_alpha
        return LoRA(
            name=self.name,
            rank=self.r,
            alpha=alpha,
            targets=self.targets,
            dropout=self.lora_dropout,
            dora=self.use_dora,
        )

    def fit(self, output: Path, rows: int, *, save_step: int, seed: int) -> FitConfig:
        """The training loop.

        Args:
            output: The run's folder.
            rows: How many there are.
            save_step: Micro batches between checkpoints.
            seed: Seed of everything random.
        """
        steps = math.ceil(self.num_epochs * rows / self.batch_size)
        warmup = self.warmup_steps if self.warmup_steps >= 1 else steps * self.warmup_steps
        return FitConfig(
            output=output,
            steps=steps,
            rows=self.batch_size,
            micro_rows=self.micro,
            lr=self.lr,
            schedule="constant" if "warmup" in self.scheduler_type else self.scheduler_type,  # pyright: ignore[reportArgumentType]
            warmup=int(warmup or steps * self.warmup_ratio),
            weight_decay=self.weight_decay,
            clip=None,
            seed=seed,
            save_every=math.ceil(save_step * self.micro / self.batch_size),
        )


def _or(given: Any, default: Any) -> Any:
    return default if given is None else given
