# `make` alone lists what there is. Everything runs in .venv, which is made on first use; nothing outside this folder changes.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
LOG := $(VENV)/install.log
NETWORK_ERRORS := Retry\(total=0,|NewConnectionError|NameResolutionError|MaxRetryError|ConnectTimeout|ReadTimeout|ProtocolError|IncompleteRead|SSLError|ProxyError
PYTHON ?=
ARGS ?=
WORKERS ?= 2
VERIFIED := tests/demo/test_published_runs.py \
	tests/models/encoders/test_features.py::test_features_are_the_hidden_states_of_the_class \
	tests/models/test_known.py::test_a_tiny_one_gives_the_logits_of_its_class \
	tests/models/projectors/test_projections.py::test_two_layers_are_llava_next_videos_projector

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all test-weights verified gpu models pages docs docs-serve check format dist clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=python3.12 is the interpreter of a new .venv, ARGS=\"...\" goes to demo and test, WORKERS=4 to test."

venv: $(STAMP) ## make .venv with the tested versions (once; again when pyproject.toml or constraints.txt change)

demo: $(STAMP) ## train the demo on the CPU: eight minutes on two cores, no download (ARGS="seed=1 ...")
	$(BIN)/python train.py $(ARGS)

test: $(STAMP) ## run the tests that need no GPU and no network (ARGS="-k name")
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

test-all: $(STAMP) ## run the slow tests too (whole programs killed and resumed, several processes, large matrices)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "slow and not gpu and not network and not weights" $(ARGS)

test-weights: $(STAMP) ## train published weights out of three packages (190 MB, kept in the cache): a quarter of an hour
	$(BIN)/python -m pytest -q -m weights -rs $(ARGS) tests/demo/test_published_runs.py

# Without $(STAMP): a machine with a GPU may have PyTorch and no package index.
gpu: ## run the acceptance checks on a GPU, under eight minutes (ARGS="--only decode"; PYTHON=python3 where .venv is not there)
	@"$(or $(PYTHON),$(wildcard $(BIN)/python),python3)" -m benchmarks.gpu $(ARGS)

models: $(STAMP) ## measure parity with the reference implementations, check all combinations, write docs/reference/models.md
	$(BIN)/python -m pytest -q -n $(WORKERS) -o junit_family=xunit1 --junit-xml=.parity.xml tests/models
	$(BIN)/python -m tools.combinations
	$(BIN)/python -m tools.model_page --measured .parity.xml
	@rm -f .parity.xml; echo "docs/reference/models.md is current."

verified: $(STAMP) ## run test-weights and the parity tests of the recommended parts, and write docs/reference/verified.md
	$(BIN)/python -m pytest -q -m "not gpu and not network" -o junit_family=xunit1 --junit-xml=.verified.xml $(VERIFIED)
	$(BIN)/python -m tools.verified_page --measured .verified.xml
	@rm -f .verified.xml; echo "docs/reference/verified.md is current."

pages: $(STAMP) ## write the pages and tables of the docs that repeat the code: keys, commands, choices, GPUs
	$(BIN)/python -m tools.keys_page
	$(BIN)/python -m tools.site_pages

docs: $(DOCS_STAMP) ## build the documentation site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

docs-serve: $(DOCS_STAMP) ## show the documentation site while you write it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

check: $(STAMP) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## format and fix what ruff can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

dist: $(STAMP) ## build the wheel and the source distribution, and check them for the package index
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

clean: ## remove caches and dist/; .venv, data/ and outputs/ stay
	rm -rf dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# The stamp is written last and holds what was installed: an interrupted install is finished by the next make, and files that only
# look newer (a checkout, a copy) install nothing. pip writes RECORD last, so a package without it is one that a kill cut short.
$(STAMP): pyproject.toml constraints.txt
	@set -eu; \
	rm -rf $(VENV)/lib/python*/site-packages/~*; \
	for info in $(VENV)/lib/python*/site-packages/*.dist-info; do [ -e "$$info/RECORD" ] || rm -rf "$$info"; done; \
	is_usable='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; \
	has_pip='import pip._internal.cli.main; from importlib.metadata import version; version("pip")'; \
	if ! $(BIN)/python -c "$$is_usable" 2>/dev/null || ! $(BIN)/python -c "$$has_pip" 2>/dev/null; then \
		chosen=; without_venv=; \
		for python in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3); do \
			"$$python" -c "$$is_usable" 2>/dev/null || continue; \
			if "$$python" -c 'import ensurepip, venv' 2>/dev/null; then chosen=$$python; break; fi; \
			without_venv=$${without_venv:-$$("$$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')}; \
		done; \
		if [ -z "$$chosen" ] && [ -n "$$without_venv" ]; then \
			echo "$$without_venv cannot make virtual environments; on Debian and Ubuntu: sudo apt install $$without_venv-venv" >&2; exit 1; \
		elif [ -z "$$chosen" ]; then \
			echo "vlmcap needs Python 3.11, 3.12 or 3.13, and found" \
				"$$("$(or $(PYTHON),python3)" --version 2>/dev/null || echo none); on Debian and Ubuntu:" \
				"sudo apt install python3.11 python3.11-venv (or make PYTHON=/path/to/python3.12)" >&2; exit 1; \
		fi; \
		echo "Making $(VENV) with $$("$$chosen" --version)"; \
		rm -rf $(VENV); "$$chosen" -m venv $(VENV); \
	elif cat pyproject.toml constraints.txt | cmp -s - $@; then \
		touch $@; exit 0; \
	fi; \
	rm -f $@; \
	echo "Installing the versions of constraints.txt (minutes; PyTorch for NVIDIA GPUs is a download of several GB)"; \
	{ PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
		-c constraints.txt -e ".[dev]" 2>&1 && echo INSTALL-DONE; } | tee $(LOG) | { \
		count=0; \
		while IFS= read -r line; do case "$$line" in \
			Obtaining*|Collecting*|Processing*) count=$$((count + 1)); [ $$((count % 20)) -ne 0 ] || echo "  $$count packages found";; \
			"Installing collected"*) echo "  $$count packages found, installing";; \
			*"Retry(total=0,"*) echo "  no answer from the package index, last try";; \
		esac; done; }; \
	if ! tail -n 1 $(LOG) | grep -q '^INSTALL-DONE$$'; then \
		if grep -v 'Retry(total=[1-9]' $(LOG) | grep -qE '$(NETWORK_ERRORS)'; then \
			echo "The package index cannot be reached, or the connection broke: check the network or the proxy and run make again," \
				"which goes on with the packages that pip has kept; $(LOG) has the details." >&2; \
		elif grep -q 'No space left on device' $(LOG); then \
			echo "The disk is full: $(VENV) and pip's temporary files need about 10 GB with PyTorch for NVIDIA GPUs (TMPDIR moves the" \
				"latter); make room and run make again." >&2; \
		else \
			sed -nE 's/^ *((ERROR|error):.*)/  \1/p' $(LOG) >&2; \
			echo "The installation failed; $(LOG) has the details, and the next make tries again." >&2; \
		fi; exit 1; \
	fi; \
	cat pyproject.toml constraints.txt > $@; echo "$(VENV) is ready."

$(DOCS_STAMP): $(STAMP)
	@echo "Installing the documentation tools"
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet -c constraints.txt -e ".[docs]"
	@touch $@
