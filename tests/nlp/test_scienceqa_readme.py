"""Every command of MoLA's README, with its exact flags, on a tiny model of 32 layers."""

import json
import shlex
import sys

import datasets
import pytest

from mole_vl.faults import as_messages
from mole_vl.gate_file import read_gates
from nlp.scienceqa.__main__ import main
from tests.nlp.scienceqa_toys import as_json, base, pick

COMMANDS = {
    "preparation_scienceqa_data.py": "prepare",
    "mola_training.py": "train",
    "evaluation_scienceqa.py": "evaluate",
    "preparation_instruction_data.py": "prepare_instruction",
    "mola_training_instruction.py": "train_instruction",
}
PREPARE = """
python preparation_scienceqa_data.py \
         --save_path "./scienceqa"
"""
SAMPLE = """
python mola_training.py \
         --base_model "NousResearch/Llama-2-7b-hf" \
         --data_path "./sampled_data/sampled_scienceqa_train_all.hf" \
         --output_dir "./sampled_scienceqa_mola" \
         --batch_size 128 \
         --micro_batch_size 8 \
         --num_epochs 1 \
         --learning_rate 3e-4 \
         --cutoff_len 256 \
         --val_set_size 1 \
         --lora_r "8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8" \
         --lora_alpha 16 \
         --lora_dropout 0.05 \
         --lora_target_modules "q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj" \
         --number_experts "2,2,2,2,2,2,2,2,4,4,4,4,4,4,4,4,6,6,6,6,6,6,6,6,8,8,8,8,8,8,8,8" \
         --top_k "2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2" \
         --train_on_inputs \
         --group_by_length \
         --add_eos_token
"""
WHOLE = (
    SAMPLE.replace("./sampled_data/sampled_scienceqa_train_all.hf", "./scienceqa/science_qa.hf")
    .replace("./sampled_scienceqa_mola", "./scienceqa_mola")
    .replace("--num_epochs 1 ", "--num_epochs 20 ")
)
EVALUATE = """
python evaluation_scienceqa.py \
         --test_dataset "./scienceqa/scienceq_test.json" \
         --base_model "NousResearch/Llama-2-7b-hf" \
         --mola_weights "./scienceqa_mola" \
         --batch_size 8 \
         --lora_target_modules "q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj" \
         --number_experts "2,2,2,2,2,2,2,2,4,4,4,4,4,4,4,4,6,6,6,6,6,6,6,6,8,8,8,8,8,8,8,8" \
         --top_k "2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2" \
         --save_path "./results/mola_test_sciqa.json"
"""
DRAW = """
python preparation_instruction_data.py \
         --num_samples 50000 \
         --save_path './meta_moe_50k.hf' \
"""
BEFORE = (
    SAMPLE.replace("mola_training.py", "mola_training_instruction.py")
    .replace("./sampled_data/sampled_scienceqa_train_all.hf", "meta_moe_50k.hf")
    .replace("./sampled_scienceqa_mola", "./meta_moe_llm2_3ep_2468")
    .replace("--num_epochs 1 ", "--num_epochs 3 ")
    .replace("--group_by_length ", "")
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders that are called as the Hub's base and datasets are."""
    folder = tmp_path_factory.mktemp("readme")
    base(folder / "NousResearch/Llama-2-7b-hf", layers=32, width=8)
    for split in ("train", "validation", "test"):
        (folder / "derek-thomas/ScienceQA").mkdir(parents=True, exist_ok=True)
        as_json(folder / f"derek-thomas/ScienceQA/{split}.json", [pick(n) for n in range(3)])
    (folder / "Open-Orca/OpenOrca").mkdir(parents=True)
    row = {"id": "flan.1", "question": "Q?", "response": "R."}
    lines = [json.dumps({**row, "id": f"{('flan', 'cot')[n % 2]}.{n}"}) for n in range(52500)]
    (folder / "Open-Orca/OpenOrca/train.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")

    def run(command):
        _, script, *flags = shlex.split(command)
        monkeypatch.setattr(sys, "argv", ["nlp.scienceqa", COMMANDS[script], *flags])
        with as_messages("nlp"):
            main()

    return run


def test_from_the_readmes_data_to_its_results(run, place):
    run(PREPARE)
    assert sorted(path.name for path in (place / "scienceqa").iterdir()) == [
        "science_qa.hf", "scienceq_test.json", "scienceq_train.json", "scienceq_validation.json",
    ]  # fmt: skip
    run(WHOLE)
    found = read_gates(place / "scienceqa_mola/gates/model.safetensors")
    rows = {len(tensor) for tensor in found.tensors.values()}
    assert rows == {2, 4, 6, 8} and len(found.tensors) == 7 * 32 and len(found.names) == 8
    run(EVALUATE)
    said = json.loads((place / "results/mola_test_sciqa.json").read_text())
    assert said["len"] == 3 and len(said["outputs"]) == len(said["results"]) == 3
    assert said["acc"] == pytest.approx(100 * said["correct"] / 3)
    assert said["answers"] == ["A", "B", "A"]


def test_the_readmes_sample_is_trained_on(run, place):
    rows = [
        {"instruction": f"Say {n}.", "input": None, "output": "Answer: The answer is A."}
        for n in range(3)
    ]
    parts = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    parts.save_to_disk(place / "sampled_data/sampled_scienceqa_train_all.hf")
    run(SAMPLE)
    assert (place / "sampled_scienceqa_mola/experts/expert7/adapter_config.json").is_file()
    assert (place / "sampled_scienceqa_mola_run/held_out.json").is_file()


def test_the_readmes_instruction_pretraining(run, place):
    run(DRAW)
    saved = datasets.load_from_disk(place / "meta_moe_50k.hf")
    assert {split: len(table) for split, table in saved.items()} == {
        "train": 50000, "validation": 1000, "test": 1000,
    }  # fmt: skip
    # So many rows would take long: the training is on a few of them.
    few = datasets.DatasetDict(train=datasets.Dataset.from_list(saved["train"].to_list()[:9]))
    few.save_to_disk(place / "few.hf")
    run(BEFORE.replace("meta_moe_50k.hf", "few.hf"))
    log = (place / "meta_moe_llm2_3ep_2468_run/metrics.jsonl").read_text().splitlines()
    assert "balance" in json.loads(log[-1])
