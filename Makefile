# `make` lists what there is to make. Needs make and Python 3.11 or newer, nothing else.

VENV   ?= .venv
PYTHON ?= python3

# The course's parameters, as in `make course DATASET=digits:200 SEED=1`; unset: the notebooks' own defaults.
PARAMETERS = $(if $(DATASET),-p dataset "$$DATASET") $(if $(BACKBONE),-p backbone "$$BACKBONE") \
             $(if $(RECIPE),-p recipe "$$RECIPE") $(if $(SEED),-p seed "$$SEED") \
             $(if $(RUNS_DIR),-p runs_dir "$$RUNS_DIR")
RUNS      = $(or $(RUNS_DIR),runs)
course:    NOTEBOOKS = $(sort $(wildcard notebooks/0[0-7]_*.ipynb))
inversion: NOTEBOOKS = $(sort $(wildcard notebooks/0[89]_*.ipynb))
augmented: NOTEBOOKS = $(sort $(wildcard notebooks/1[01]_*.ipynb))
mixed:     NOTEBOOKS = $(sort $(wildcard notebooks/1[234]_*.ipynb))

# The environment's own kernel runs the notebooks, even where the user has another one called python3.
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help course inversion augmented mixed test test-all lint lab clean

help:
	@echo "make course  run notebooks 00 to 07 and print the tables; DATASET, BACKBONE, RECIPE, SEED, RUNS_DIR to choose"
	@echo "make inversion  run notebooks 08 and 09 (Diffusion Inversion); the same to choose"
	@echo "make augmented  run notebooks 10 and 11 (augmented conditioning); the same to choose"
	@echo "make mixed   run notebooks 12 to 14 (real and generated together, filters, other test sets); the same to choose"
	@echo "make test    run the tests, and the notebooks of the paper's method in their default size"
	@echo "make test-all  the same, and the notebooks of the other methods in their default size (half an hour more)"
	@echo "make lab     open the notebooks in JupyterLab"
	@echo "make lint    check the code and its format with ruff"
	@echo "make clean   remove caches and build products; keeps runs/ and the environment"
	@echo "Each installs what it needs into $(VENV) first (VENV=... for another place)."

course inversion augmented mixed: $(VENV)/.installed
	@mkdir -p "$(RUNS)/executed"
	@for notebook in $(NOTEBOOKS); do \
		executed="$(RUNS)/executed/$$(basename $$notebook)"; \
		echo "== $$notebook"; \
		$(VENV)/bin/python -m papermill -k python3 --log-level WARNING "$$notebook" "$$executed" $(PARAMETERS) \
			|| { echo "$$notebook stopped; how far it came is in $$executed" >&2; exit 1; }; \
	done
	@echo
	@test $@ != course || { $(VENV)/bin/python -m sdgen_lib report "$(RUNS)" && echo; }
	@echo "The executed notebooks are in $(RUNS)/executed/"

test: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile tests
	@$(VENV)/bin/python -m pytest --nbval-lax --nbval-current-env $(sort $(wildcard notebooks/0[0-7]_*.ipynb))

test-all: test
	@$(VENV)/bin/python -m pytest --nbval-lax --nbval-current-env \
		$(sort $(wildcard notebooks/0[89]_*.ipynb notebooks/1?_*.ipynb))

lint: $(VENV)/.installed
	@$(VENV)/bin/python -m ruff check .
	@$(VENV)/bin/python -m ruff format --check .

lab: $(VENV)/.installed
	@$(VENV)/bin/python -m jupyterlab --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

clean:
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache out.ipynb
	@find sdgen_lib tests notebooks -depth \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

# Made again when requirements.txt or pyproject.toml changes.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python 3.11 or newer is needed; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12 ..." % v[:2])'
	@test -x $(VENV)/bin/pip || { echo "Making the environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing requirements.txt into $(VENV) (minutes, the first time)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	@touch $@
