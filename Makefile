# `make demo` and `make test` set everything up themselves: a virtual environment in .venv and the packages in it.
PYTHON ?= python3
RUN := .venv/bin/python
# processes that fine-tune experts side by side: one for each GPU, or for each core, four at most
PROCESSES = $(shell $(RUN) -c 'import os, torch; print(torch.cuda.device_count() or min(4, os.cpu_count()))')
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# waiting threads spin for some microseconds, then sleep: on a shared machine a step is 10 times as fast as with
# libgomp's own setting (which spins for long), and on a quiet one 1.4 times as fast as without any spinning
export GOMP_SPINCOUNT := 20000

.PHONY: setup demo test lint bench results docs clean
.DELETE_ON_ERROR:

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 14) else "error: Python %d.%d found; 3.10 to 3.13 is needed: make PYTHON=python3.12 setup" % sys.version_info[:2])'
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup
	$(RUN) train.py --budget 0.5 --out runs/emoji-0.5
	.venv/bin/torchrun --nproc-per-node $(PROCESSES) -- finetune.py --run runs/emoji-0.5 --steps 25
	$(RUN) sample.py --run runs/emoji-0.5 --prompts-file assets/prompts/emoji.txt --compare --out runs/emoji-0.5/samples
	$(RUN) evaluate.py --run runs/emoji-0.5

# a process for each core, four at most, of one thread each; a module's tests stay in one process
test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n logical --maxprocesses 4 --dist loadfile

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m codespell_lib

bench: setup
	$(RUN) -m pytest bench/ --benchmark-only

# every cell of docs/results.md, then its tables and figures: about 14 hours of one core; it goes on where it was stopped
results: setup
	while read -r cells; do $(RUN) compare.py $$cells || exit; done < docs/results/cells.txt
	$(RUN) -m docs.results --keep runs

docs: setup
	$(RUN) -m docs.site

clean:
	rm -rf runs docs/site .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
