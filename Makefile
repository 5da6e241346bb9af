# What can be done here: `make` lists it. Needs GNU make and Python 3.11 or later, nothing else.

PYTHON ?= python3
# Options for pip, such as the address of an index with a build of torch for CPUs alone.
PIP_ARGS ?=
# Options for the command that a target runs, such as ARGS="-k slot" for test.
ARGS ?=
# How many tests run at a time, each on a server of its own: they wait more than they compute.
JOBS ?= 4
# How many histories `make chaos` runs.
SEEDS ?= 200

# Bytecode that is not kept is compiled again by every process: half a second for each of the hundreds that tests start.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
STAMP := .venv/.cdcsync-setup

.DEFAULT_GOAL := help
.PHONY: help setup demo docs pictures test prove chaos kills mutants simulate soak fuzz image-test lock pin-images sbom lint audit type bench pgai clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything the other targets need; does nothing when it is current

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "cdcsync needs Python 3.11 or later as '$(PYTHON)': name another one, make PYTHON=python3.12 setup" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "'$(PYTHON)' cannot make virtual environments: install its venv package (Debian: python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[demo,dev]'
	@# pip would compile one file at a time. Templates that are no Python yet are left as they are.
	@$(BIN)/python -m compileall -qq -j 0 .venv || true
	@touch $@

demo: setup ## watch an index follow its table, on a PostgreSQL server made for it
	$(BIN)/cdcsync demo $(ARGS)

docs: setup ## build the documentation as a site, build/site/index.html; a broken link fails
	PYTHONPATH=. $(BIN)/python docs/reference.py
	$(BIN)/python -m sphinx --quiet --nitpicky --fail-on-warning --keep-going --builder html docs build/site $(ARGS)
	@echo "build/site/index.html"

pictures: setup ## take the pictures of the documentation again; needs Chromium and chromedriver
	PYTHONPATH=. $(BIN)/python docs/record.py
	CDCSYNC_PICTURES=1 $(BIN)/python -m pytest -q tests/server/test_browser.py tests/server/serve/test_page.py $(ARGS)

test: setup ## run all tests
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

prove: setup ## run the long proofs, which `make test` leaves out
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m proof $(ARGS)

chaos: setup ## run SEEDS=200 histories of faults, JOBS at a time; SEED=17 runs that one again
	$(BIN)/python -m tests.chaos --jobs $(JOBS) $(if $(SEED),--seed $(SEED),--seeds $(SEEDS)) $(ARGS)

kills: setup ## run the tests that kill at the crash points that no history comes to, and count the deaths
	$(BIN)/python -m tests.chaos.elsewhere --jobs 2 $(ARGS)

mutants: setup ## put known faults back one at a time and see that each is found: ten minutes on two processors
	$(BIN)/python -m tests.mutants --jobs 2 $(ARGS)

simulate: setup ## run simulated histories of the pure modules for MINUTES=1; ARGS="--seed 17" runs that one again
	$(BIN)/python -m tests.simulation --minutes $(or $(MINUTES),1) $(ARGS)

soak: setup ## run a worker under an even load for MINUTES=30 and see that nothing grows; build/soak.svg shows it
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30) $(ARGS)

fuzz: setup ## feed arbitrary bytes to every parser, MINUTES=5 in all
	$(BIN)/python -m fuzz --minutes $(or $(MINUTES),5) $(ARGS)

image-test: setup ## build the container images and run them; needs docker or podman, says so where there is none
	$(BIN)/python -m pytest -q -rs -m image tests/images $(ARGS)

lock: setup ## write docker/requirements.txt: what the image installs, each package with its hashes
	$(BIN)/uv pip compile pyproject.toml --extra serve --quiet --generate-hashes --no-header --no-annotate -c constraints.txt \
		--python-version 3.13 -o docker/requirements.txt $(ARGS)

pin-images: setup ## write docker/images.env: the container images by digest, as an engine finds them now
	$(BIN)/python docker/pin.py

sbom: setup ## write build/sbom.json, a CycloneDX bill of the packages that an install brings
	@mkdir -p build
	@test -x build/sbom/bin/python || $(PYTHON) -m venv build/sbom
	build/sbom/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt .
	$(BIN)/cyclonedx-py environment --output-reproducible --of JSON -o build/sbom.json build/sbom/bin/python $(ARGS)

lint: setup ## check style, format, security and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive cdcsync docker
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile

audit: ## look the pinned packages up in the database of advisories; needs the network
	@test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit \
		&& build/audit/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) pip-audit; }
	build/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt $(ARGS)

type: setup ## check the types
	$(BIN)/mypy

bench: setup ## measure the goals of speed, within 20 minutes, into docs/benchmarks.md; NAMES="native tiers", more or all
	$(BIN)/python bench/_all.py $(NAMES)

pgai: ## install pgai in an environment of its own, build/pgai, for which bench measures both sides then
	@test -x build/pgai/bin/pgai || { $(PYTHON) -m venv build/pgai \
		&& build/pgai/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) 'pgai[vectorizer-worker]'; }

clean: ## remove what the other targets made, .venv included
	rm -rf .venv build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache \
		.coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
