"""Judge the adapters of a file of m-LoRA's settings."""

import json

from accelerate import PartialState

from mole_vl.files import new_file
from nlp.alpaca import encode_alpaca
from nlp.data import check_lengths
from nlp.forms import form_of
from nlp.mixlora_config import MixLoRASettings
from nlp.mixlora_place import Adapters, Place
from nlp.mixlora_rows import held_out_rows
from nlp.train_experts import Score
from nlp.train_mixture import hits_by_arm


def evaluate(settings: MixLoRASettings, place: Place, test_data: str | None = None) -> list[Score]:
    """Exact match of the base and of each adapter on rows that it did not learn.

    An answer is what stands before the first line's end.

    Args:
        settings: The adapters; the scores are written to `evaluate_result`, if it is set.
        place: The base, and where they stand.
        test_data: Rows in place of those that the settings name.

    Raises:
        FileNotFoundError: A base, rows, or an adapter, that is not there.
        ValueError: They do not go together, or there are no rows.
    """
    rows = {one.name: held_out_rows(one, place.seed, test_data) for one in settings.lora}
    adapters = Adapters(settings, place)
    longest = form_of(adapters.model).longest
    scores = []
    for one in settings.lora:
        encoded = encode_alpaca(rows[one.name], adapters.tokenizer, cutoff=None)
        if longest is not None:
            lengths = [len(row.prompt) + len(row.answer) for row in encoded]
            where = f"rows of {one.name}: longer than the {longest} tokens that the base reads"
            check_lengths(where, encoded, lengths, longest)
        with adapters.speaking(one.name) as mixture:
            hits = hits_by_arm(mixture, adapters.tokenizer, encoded, one.test_rows)
        base, own = (sum(arm) / len(encoded) for arm in hits.values())
        scores.append(Score(one.name, len(encoded), base, own))
    if settings.evaluate_result is not None and PartialState().is_main_process:
        found = {s.task: {"rows": s.rows, "base": s.base, "adapter": s.expert} for s in scores}
        with new_file(settings.evaluate_result) as partial:
            partial.write_text(json.dumps(found, indent=2) + "\n")
    return scores
