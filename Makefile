# vl_tutor: `make demo` and `make test` are all one needs; `make help` lists the rest.
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 7860
NB     ?= $(sort $(shell find nbs -name '[!._]*.ipynb' -not -path '*/.*'))
BIN    := $(VENV)/bin
# An install is repeated only when the metadata changes: the stamps carry its checksum.
KEY    := $(shell cat settings.ini setup.py pyproject.toml | cksum | cut -d' ' -f1)
USE    := $(VENV)/.installed-$(KEY)
DEV    := $(VENV)/.installed-dev-$(KEY)
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input

export OMP_NUM_THREADS ?= 2
export MPLBACKEND ?= Agg
export GRADIO_ANALYTICS_ENABLED = False
export HF_HUB_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL := help
.PHONY: help demo test install install-dev sync docs pytest export notebooks claims clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(USE) ## environment, install, and the demo on http://127.0.0.1:7860 (no network after the install)
	HF_HUB_OFFLINE=1 $(BIN)/vl-tutor demo --port $(PORT)

test: $(DEV) ## environment, install, and every check: export in sync, docs without a warning, notebooks, parity, browser
	@$(MAKE) --no-print-directory sync docs pytest

install: $(USE) ## the environment for using the package
install-dev: $(DEV) ## the environment for changing it

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(USE): | $(BIN)/python
	@echo "installing vl-tutor and what it needs (torch and friends: some 5 GB, about three minutes) ..."
	$(PIP) install --quiet --progress-bar off -e .
	@rm -f $(VENV)/.installed-*; touch $@; $(PIP) list 2>/dev/null | grep -E '^(vl-tutor|torch|fastai|gradio|transformers) '

$(DEV): | $(BIN)/python
	@echo "installing vl-tutor, what it needs and what its checks need (some 6 GB, about three minutes) ..."
	$(PIP) install --quiet --progress-bar off -e '.[dev]'
	@rm -f $(VENV)/.installed-*; touch $@ $(USE); $(PIP) list 2>/dev/null | grep -E '^(vl-tutor|torch|fastai|gradio|transformers|pytest|Sphinx) '

sync: $(DEV) ## are notebooks clean, and is vl_tutor/ what they export?
	$(BIN)/python -m pytest -q tests/test_house.py -k in_sync

docs: $(DEV) ## the site in docs/_build/html, warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -E -b html -c docs nbs docs/_build/html
	@echo "docs/_build/html/index.html: $$(find docs/_build/html -name '*.html' | wc -l) pages"

pytest: $(DEV) ## the tests alone
	$(BIN)/python -m pytest -q tests

export: $(DEV) ## write vl_tutor/ from the notebooks, and clean them
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

notebooks: $(DEV) ## run the notebooks and store their outputs (NB="nbs/world/10_scenes.ipynb" for one)
	@for nb in $(NB); do \
	  echo "$$nb"; \
	  $(BIN)/python -c "import sys; from nbdev.test import nbdev_test; nbdev_test(sys.argv[1], save=True, timing=True)" $$nb || exit 1; \
	  $(BIN)/nbdev-clean --fname $$nb || exit 1; \
	done

claims: $(USE) ## make the recorded runs of nbs/recipes/49, 55 and nbs/explain/53 that are missing (delete a file to make all of it: 20, 35 and 8 minutes)
	$(BIN)/python -c "from vl_tutor.recipes.captioner_claims import record_claims; record_claims()"
	$(BIN)/python -c "from vl_tutor.recipes.vlc_claims import record_claims; record_claims()"
	$(BIN)/python -c "from vl_tutor.explain.standings import record_standings; record_standings()"

clean: ## remove what can be made again (not the environment, not the recorded runs)
	rm -rf docs/_build _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	find nbs vl_tutor tests docs -name __pycache__ -o -name .ipynb_checkpoints -o -name .last_checked | xargs -r rm -rf

distclean: clean ## the environment as well
	rm -rf $(VENV)
