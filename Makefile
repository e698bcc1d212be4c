# Two commands on a fresh machine: make demo, make test. Both set up .venv first; a second call is quick.
PYTHON ?= python3
ENV = .venv/.ok
# where nothing may be written beside the sources, every process compiles torch again: 4 s more each
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo paper-mini test cluster image faults lint format lowest lock clean
demo: $(ENV)  ## the main job on this machine; CORPUS=path/to/raw/tars for your own documents
	.venv/bin/mom demo $(if $(CORPUS),--corpus '$(CORPUS)') $(ARGS)

paper-mini: $(ENV)  ## the paper's tables in miniature on CORPUS=path/to/raw/tars; ARGS='--minutes 480 --seeds 3' (GPU: --full)
	.venv/bin/mom paper-mini $(if $(CORPUS),--corpus '$(CORPUS)') $(ARGS)

# one thread a process: several processes whose threads spin while they wait take each other's cores
test: $(ENV)  ## all tests that run here; PYTEST='-k scan' for some
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST)

cluster: $(ENV)  ## the tests that need root and Debian's Slurm (tests/helpers/slurm.py says which packages)
	MOM_REQUIRE_CLUSTER=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -m cluster tests/cluster $(PYTEST)

image: $(ENV)  ## builds the container image and runs it (root, Debian's buildah and mmdebstrap)
	MOM_REQUIRE_CLUSTER=1 .venv/bin/python -m pytest -m image -s tests/docker $(PYTEST)

faults: $(ENV)  ## the long fault campaign (two hours or so on two cores); ARGS='--faults 20 --seed 7'
	.venv/bin/python -m tests.faults.campaign --faults 200 --seed $$(date +%j) $(ARGS)

lint: $(ENV)  ## linter, formatter, type checker and import contracts, as CI runs them
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy torchrun_launch mom_train data/mom_data tokenizers/mom_tokenizers tools/mom_tools tools/dev
	.venv/bin/lint-imports

format: $(ENV)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lowest: $(ENV)  ## the lowest versions that pyproject.toml names, in .venv-lowest, with the quick tests; TESTS='...' for others
	sh tools/dev/lowest.sh $(TESTS)

lock: $(ENV)  ## moves every dependency to its newest version that fits, in requirements.lock
	sh tools/dev/lock.sh

clean:  ## the environment and caches; runs/ stays
	rm -rf .venv .venv-lowest .mypy_cache .ruff_cache .pytest_cache *.egg-info

$(ENV): pyproject.toml requirements.lock tools/dev/install.sh
	PYTHON=$(PYTHON) sh tools/dev/install.sh
	touch $@
