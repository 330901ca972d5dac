"""Settings of MoLA's training, named as in github.com/GCYZSL/MoLA."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from torch import nn

from mole_vl.faults import at_least, one_of, positive, refuse, share, some
from mole_vl.method import targeted
from mole_vl.mola import MoLA, Shape, experts_by_layer
from mole_vl.sites import block_of
from mole_vl.training import FitConfig
from nlp.scienceqa.numbers import Numbers, by_layer, numbers, words
from nlp.scienceqa.template import BUILT_IN
from nlp.wandb_watch import switch_faults

BASE = "NousResearch/Llama-2-7b-hf"
CAUSAL = "AutoModelForCausalLM"
"""What loads a base of the kind that is trained and asked here."""
PROJECTIONS = "q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj"
BALANCE = 0.001
"""Factor of the balance loss where it is asked for."""
_WARMUP = 100
SHAPES = get_args(Shape)


@dataclass(frozen=True, kw_only=True)
class MoLATraining:
    """MoLA over a frozen base, and how it is trained.

    Lists are numbers with commas, one for each layer of the model, or one number for all.

    Args:
        base_model: A causal language model: a Hub id, a folder, or smollm2-135m-instruct (by pip).
        data_path: The dataset; its split train is learned from.
        output_dir: Where the mixture is written; checkpoints and log are in the folder of that name
            with _run behind it, and a run found there goes on.
        batch_size: Rows of a step.
        micro_batch_size: Of them, rows that a process holds at once.
        num_epochs: How often each row is seen.
        learning_rate: Peak learning rate, after a warm-up of 100 steps, or of a tenth of all where
            these are fewer; from there it falls to zero by a line.
        cutoff_len: The most tokens of a row.
        val_set_size: Rows that are held out, or their share where it is below 1; the loss on them
            is told with each checkpoint. 0 for none.
        lora_r: Rank of the experts, by layer.
        lora_alpha: An expert's update counts lora_alpha / lora_r times.
        lora_dropout: Share of an update's inputs that a training step leaves out.
        lora_target_modules: Names of the linear layers that get experts and a router each.
        number_experts: Experts of each of these, by layer; or a shape: inverted_triangle (2, 4, 6
            and 8 by quarters of the layers), triangle, hourglass, rectangle.
        top_k: How many of them a token goes to, by layer.
        obalance: Whether a balance loss keeps the experts of a layer equally busy.
        train_on_inputs: Whether prompts are learned too, and not answers alone.
        add_eos_token: Whether the end of an answer is learned.
        group_by_length: Whether rows of like length come in one batch, which spares padding.
        resume_from_checkpoint: A mixture of the same form that was trained before: the training
            begins with it. A run that was broken off goes on by itself.
        wandb_project: The wandb project that the run is filed under; without one there is none.
        wandb_run_name: Its name there.
        wandb_watch: What wandb sees of the trained weights: gradients (or true), parameters, all.
        wandb_log_model: Whether wandb gets the mixture: at the end (or true), or with each
            checkpoint.
        load_in_8bit: Whether the base's linear layers take 8 bits (needs bitsandbytes).
        save_steps: Steps between checkpoints.
        seed: Of everything random.
    """

    base_model: str = BASE
    data_path: str
    output_dir: Path
    batch_size: int = 128
    micro_batch_size: int = 8
    num_epochs: float = 1
    learning_rate: float = 3e-4
    cutoff_len: int = 256
    val_set_size: float = 2
    lora_r: Numbers = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    lora_target_modules: tuple[str, ...] | str = PROJECTIONS
    number_experts: Numbers = "inverted_triangle"
    top_k: Numbers = 2
    obalance: bool = False
    train_on_inputs: bool = True
    add_eos_token: bool = True
    group_by_length: bool = False
    resume_from_checkpoint: str | None = None
    wandb_project: str = ""
    wandb_run_name: str = ""
    wandb_watch: bool | str = False
    wandb_log_model: bool | str = False
    load_in_8bit: bool = False
    save_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        numbers("lora_r", self.lora_r)
        numbers("top_k", self.top_k)
        if self.number_experts not in SHAPES:
            numbers("number_experts", self.number_experts)
        words("lora_target_modules", self.lora_target_modules)
        counts = {
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size,
            "save_steps": self.save_steps,
        }
        refuse(
            type(self).__name__,
            [
                None if self.data_path else "data_path is empty, expected a dataset",
                None
                if self.output_dir.name not in {"", ".."}
                else f"output_dir is {str(self.output_dir)!r}, expected a folder of its own, whose "
                "name the run's has too",
                *(at_least(name, value, 1) for name, value in counts.items()),
                self._fault_of_batch(),
                positive("num_epochs", self.num_epochs),
                positive("learning_rate", self.learning_rate),
                at_least("cutoff_len", self.cutoff_len, 2),
                None
                if self.val_set_size >= 0 and (self.val_set_size < 1 or self.val_set_size % 1 == 0)
                else f"val_set_size is {self.val_set_size}, expected a number of rows or a share "
                "below 1",
                positive("lora_alpha", self.lora_alpha),
                share("lora_dropout", self.lora_dropout),
                at_least("seed", self.seed, 0),
                *self._faults_of_wandb(),
            ],
        )

    def _fault_of_batch(self) -> str | None:
        if self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size == 0:
            return None
        return (
            f"batch_size is {self.batch_size} and micro_batch_size {self.micro_batch_size}: the "
            "one must divide into pieces of the other"
        )

    def _faults_of_wandb(self) -> list[str | None]:
        given = ["wandb_run_name", "wandb_watch", "wandb_log_model"]
        lost = [name for name in given if getattr(self, name)]
        return [
            f"{', '.join(lost)}: given without a wandb_project, so that nothing would be logged"
            if lost and not self.wandb_project
            else None,
            *switch_faults(self.wandb_watch, self.wandb_log_model),
        ]

    @property
    def run(self) -> Path:
        """Folder of checkpoints and log."""
        return self.output_dir.with_name(f"{self.output_dir.name}_run")

    def held_out(self, rows: int) -> int:
        """How many of the rows are held out.

        Raises:
            ValueError: All of them.
        """
        size = self.val_set_size
        count = int(size) if size >= 1 else math.ceil(size * rows)
        if count >= rows:
            raise ValueError(
                f"val_set_size is {size:g}, and {self.data_path} has {rows} rows: none would be "
                "left to learn from"
            )
        return count

    def loop(self, rows: int) -> FitConfig:
        """The training loop over so many rows."""
        steps = math.ceil(self.num_epochs * rows / self.batch_size)
        tracking: dict[str, Any] = {}
        if self.wandb_project:
            named = {"name": self.wandb_run_name} if self.wandb_run_name else {}
            tracking = {
                "trackers": ("wandb",),
                "project": self.wandb_project,
                "tracking": {"wandb": named},
            }
        return FitConfig(
            output=self.run,
            steps=steps,
            rows=self.batch_size,
            micro_rows=self.micro_batch_size,
            lr=self.learning_rate,
            schedule="linear",
            warmup=min(_WARMUP, steps // 10),
            seed=self.seed,
            save_every=self.save_steps,
            **tracking,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(MoLATraining):
    """Train MoLA on instructions: experts and routers together, over a frozen base.

    Args:
        prompt_template_name: The text around an instruction: alpaca, or a JSON file with the keys
            prompt_input and prompt_no_input (NAME for templates/NAME.json).
    """

    data_path: str = "./scienceqa/science_qa.hf"
    output_dir: Path = Path("scienceqa_mola")
    prompt_template_name: str = BUILT_IN


@dataclass(frozen=True, kw_only=True)
class InstructionConfig(MoLATraining):
    """Train MoLA on whole texts, as they stand, before it learns a task.

    Args:
        prompt_template_name_meta: What stands around a text: nothing, which is called meta.
    """

    data_path: str = "./meta_moe_50k.hf"
    output_dir: Path = Path("meta_moe_llm2_3ep_2468")
    num_epochs: float = 3
    val_set_size: float = 100
    obalance: bool = True
    prompt_template_name_meta: str = "meta"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            type(self).__name__,
            [
                one_of("prompt_template_name_meta", self.prompt_template_name_meta, ("meta",)),
                None
                if self.train_on_inputs
                else "train_on_inputs is false, and a text here has no input: all of it is learned",
            ],
        )


def mola_of(config: MoLATraining, model: nn.Module, blocks: dict[str, int]) -> MoLA:
    """The mixture that the settings say, for a model.

    Args:
        config: The settings.
        model: The base.
        blocks: Width of its blocks, by path.

    Raises:
        ValueError: Targets that name no linear layer in a block; numbers for another count of
            layers, which is told; more experts for a token than a layer has.
    """
    targets = words("lora_target_modules", config.lora_target_modules)
    shapes = targeted(model, "lora_target_modules", targets, blocks)
    layers = len({block_of(path, blocks) for path in shapes} - {None})
    outside = [path for path in shapes if block_of(path, blocks) is None]
    refuse("lora_target_modules", [f"{some(outside)} lies in no layer" if outside else None])
    if config.number_experts in SHAPES:
        experts = experts_by_layer(cast(Shape, config.number_experts), layers)
    else:
        given = numbers("number_experts", config.number_experts)
        experts = by_layer("number_experts", given, layers)
    top_k, rank = (
        by_layer(name, numbers(name, getattr(config, name)), layers) for name in ("top_k", "lora_r")
    )
    refuse(
        type(config).__name__,
        [
            f"top_k is {most} in layer {layer}, which has {number} experts by number_experts"
            for layer, (most, number) in enumerate(zip(top_k, experts, strict=True))
            if most > number
        ][:1],
    )
    return MoLA(
        experts=experts,
        top_k=top_k,
        rank=rank,
        alpha=config.lora_alpha,
        targets=targets,
        dropout=config.lora_dropout,
        balance=BALANCE if config.obalance else 0.0,
        seed=config.seed,
    )
