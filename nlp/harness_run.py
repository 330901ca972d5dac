"""lm-eval, an extra, which comes in for those who evaluate."""

import json
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from nlp.around import Around
from nlp.data import Style, Tokenizer

_HARNESS = "lm_eval"


class Harness:
    """Measures language models on tasks of lm-eval.

    Raises:
        ValueError: It is not installed.
    """

    def __init__(self) -> None:
        if find_spec(_HARNESS) is None:
            raise ValueError(
                "evaluation needs the package lm-eval: pip install 'mole-vl[evaluate]'"
            )
        self._lm_eval, self._utils, self._harness, self._tasks = map(
            import_module, (_HARNESS, f"{_HARNESS}.utils", "nlp.harness", "nlp.harness_tasks")
        )

    def load(self, tasks: Sequence[str]) -> list[Any]:
        """Tasks and groups with their data, as `nlp.harness_tasks.load_tasks` reads them."""
        return self._tasks.load_tasks(tasks)

    def measure(
        self,
        model: Any,
        tokenizer: Tokenizer,
        tasks: Sequence[Any],
        *,
        num_fewshot: int | None = None,
        limit: int | None = None,
        batch_rows: int = 8,
        style: Style = "plain",
        around: Around | None = None,
    ) -> dict[str, Any]:
        """lm-eval's results.

        Args:
            model: A language model of transformers, plain or mixed.
            tokenizer: Its tokenizer.
            tasks: What `load` gave.
            num_fewshot: Worked examples before each question; each task's own number if None.
            limit: The first so many questions of each task; all of them if None.
            batch_rows: Rows in one forward.
            style: Questions as they stand (plain), or in the model's chat template (chat).
            around: As of `nlp.harness.HarnessModel`.
        """
        return self._lm_eval.simple_evaluate(
            model=self._harness.HarnessModel(
                model, tokenizer, batch_rows=batch_rows, around=around
            ),
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_rows,
            apply_chat_template=style == "chat",
            log_samples=False,
            # The tasks are here: nobody is to list all others.
            task_manager=self._tasks.TaskManager(include_defaults=False),
        )

    def table(self, found: dict[str, Any]) -> str:
        """Results in Markdown, of groups too."""
        parts = [self._utils.make_table(found)]
        if found.get("groups"):
            parts.append(self._utils.make_table(found, "groups"))
        return "\n".join(parts)

    def to_json(self, found: Any) -> str:
        """Results, or what holds them, as JSON."""
        return json.dumps(
            found, indent=2, default=self._utils.handle_non_serializable, ensure_ascii=False
        )
