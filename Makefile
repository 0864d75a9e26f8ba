# All commands of the project; `make help` lists them. `make reproduce` and `make test` each work alone on a
# machine that has Python 3.11 or newer with pip: whatever else they need they install into $(VENV).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

PYTHON ?= python3
VENV ?= .venv
LOCK ?= constraints.txt
PROFILE ?= quick
JOBS ?= 2
ARGS ?=

# One thread per process: two processes run side by side nearly everywhere below, and they slow each other
# down manyfold when each of them also starts a thread per core.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS
# glibc hands large blocks back to the system when they are freed, and faults them in again in the next step
keep_memory := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
# Whatever the environment holds, the code that runs is this checkout's.
export PYTHONPATH := $(CURDIR)

# TORCH is what pip is asked for; the choice is remembered with the environment. `TORCH=` keeps what is there.
TORCH ?= $(or $(shell cat $(VENV)/.torch 2>/dev/null),torch==2.14.1 torchvision==0.29.1)
torch := $(or $(strip $(TORCH)),torch torchvision)

bin := $(abspath $(VENV))/bin
python = PATH="$(bin):$$PATH" $(bin)/python
isolated := $(bin)/python -I
pip := $(isolated) -m pip --disable-pip-version-check
ready := $(VENV)/.ready
quiet := --quiet --no-compile
lock := $(if $(LOCK),--constraint $(LOCK))
pytest = MPLBACKEND=agg $(python) -m pytest
root_only = $(if $(filter 0,$(shell id -u)),--allow-root)

##@ For everyone

.PHONY: help
help: ## list the commands
	@awk -F ':.*## ' '/^##@ /{printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@printf '\nVariables\n'
	@printf '  %-9s %s\n' PYTHON 'the Python that makes the environment ($(PYTHON))' \
		VENV 'the environment, also one of yours ($(VENV))' \
		TORCH 'your build of torch; empty keeps the one installed ($(torch))' \
		LOCK 'the versions of everything else; empty takes the newest ($(LOCK))' \
		PROFILE 'quick, full or paper ($(PROFILE))' JOBS 'processes side by side ($(JOBS))' ARGS 'handed on to the command'

.PHONY: setup
setup: $(ready) ## make the environment (also done by every command that needs it)

.PHONY: reproduce
reproduce: $(ready) ## recompute the tables and figures of PROFILE (default: quick), or resume doing so
	$(keep_memory) $(python) .ci/workflow.py --cores $(JOBS) --profile $(PROFILE) $(ARGS)
	@printf '\nTables and executed notebooks are in results/%s, pictures in figures/%s.\n' $(PROFILE) $(PROFILE)

.PHONY: test
test: $(ready) ## every test: gates, notebooks, docs, workflow, wheel, pytest
	@for part in check test-notebooks docs test-product test-python; do \
		printf '\n=== make %s (%s s since the start)\n' "$$part" "$$SECONDS"; \
		$(MAKE) --no-print-directory "$$part"; \
	done; printf '\nAll tests passed in %s s.\n' "$$SECONDS"

.PHONY: lab
lab: $(ready) ## open the notebooks in JupyterLab
	$(python) -m jupyter lab --LabApp.default_url=/lab/tree/nbs --LabApp.extension_manager=readonly \
		--LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $(root_only) $(ARGS)

.PHONY: docs
docs: $(ready) ## build the website into _site (warnings are errors)
	$(python) docs/build.py --jobs $(JOBS) $(ARGS)

##@ For developers

.PHONY: export
export: $(ready) ## write the package from the notebooks
	$(bin)/nbdev_export

.PHONY: clean-notebooks
clean-notebooks: $(ready) ## strip what should not be committed from the notebooks
	$(bin)/nbdev_clean

.PHONY: check
check: $(ready) ## only the gates: export in sync, notebooks clean, import order, ruff, pyflakes, budgets
	$(pytest) tests/test_house.py $(ARGS)

.PHONY: test-notebooks
test-notebooks: $(ready) ## run every cell of the library notebooks
	PATH="$(bin):$$PATH" nbdev_test --n_workers $(JOBS) --do_print $(ARGS)

.PHONY: test-product
test-product: $(ready) ## the wheel, the README program and the workflow on its smallest profile
	$(pytest) tests/test_product.py $(ARGS)

.PHONY: test-python
test-python: $(ready) ## the pytest suite without the gates and the product tests
	$(pytest) -m "not gate and not product" --numprocesses $(JOBS) --dist worksteal --durations 10 $(ARGS)

.PHONY: bench
bench: $(ready) ## how fast, as ratios measured side by side; leave the machine alone meanwhile
	for part in decode impact continuous objectives; do $(keep_memory) $(python) bench/$$part.py $(ARGS); done

.PHONY: wheel
wheel: $(ready) ## build wheel and sdist into dist
	rm -rf build/lib
	$(python) -m build --no-isolation --outdir dist .

.PHONY: lock
lock: $(ready) ## write the versions of the environment to constraints.txt
	{ grep '^#' constraints.txt; $(pip) freeze --all --exclude-editable \
		| grep -viE '^(#|pip=|torch=|torchvision=|triton=|nvidia-|cuda-)' | LC_ALL=C sort -f; } > constraints.new
	mv constraints.new constraints.txt

.PHONY: clean
clean: ## remove what was built, but not the environment, nor results and what they are resumed from
	rm -rf build/lib build/bdist.* build/smoke results/smoke dist ./*.egg-info _proc _docs _site docs/_generated
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# ---- the environment ------------------------------------------------------------------------------------
# The stamp is written last, so an interrupted set-up is taken up again; pip trusts a distribution whose metadata
# are there, so those with files missing are found and installed anew.

.PHONY: always
$(VENV)/.torch: always
	@mkdir -p $(VENV)
	@[ "$$(cat $@ 2>/dev/null)" = '$(torch)' ] || echo '$(torch)' > $@

$(ready): $(VENV)/.torch settings.ini setup.py pyproject.toml $(LOCK)
	@rm -f $@
	@$(bin)/python -c pass 2>/dev/null || { rm -f $(bin)/python*; \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }; }
	@$(pip) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV): $(torch) and $(or $(LOCK),the newest of everything else); this takes minutes.'
	@$(pip) install $(quiet) $(lock) 'setuptools>=77.0.3'
	@$(pip) install $(quiet) $(lock) --no-build-isolation $(foreach word,$(torch),'$(word)') --editable '.[dev]'
	@broken=$$($(isolated) .ci/incomplete.py); [ -z "$$broken" ] || { \
		echo "incomplete, installed anew: $$broken"; $(pip) install $(quiet) --force-reinstall --no-deps $$broken; }
	@$(isolated) .ci/incomplete.py --imports
	@touch $@
