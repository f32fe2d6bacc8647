# Each target sets up what it needs: a virtual environment with the pinned requirements, made once.
PYTHON ?= python3
BIN = .venv/bin
DEMO = --sample --n-splits 2

# the core of the suite: data, models, training, statistics, store, figures, notebooks
CORE = $(patsubst %,tests/test_%.py,layout datasets splits models library_models kernels training tracking statistics \
         comparison figures notebook elsewhere)

.PHONY: demo test sweep oldest lint task1 task2 task3 ui server notebook race clean

demo: .venv/ready                ## all three tasks on generated images with two models each, 1 to 4 minutes on 2 cores
	$(BIN)/python experiments/task1.py $(DEMO) -m lenet5 -m vggnet --epochs 2 --batch-size 16
	$(BIN)/python experiments/task2.py $(DEMO) -m lenet5 -m efficientnet_b0 --epochs 2 --batch-size 16
	$(BIN)/python experiments/task3.py $(DEMO) -m lenet5 -m vggnet --epochs 3 --batch-size 8

task1 task2 task3: .venv/ready   ## the real thing; downloads the data where they are not there
	$(BIN)/python experiments/$@.py

test: .venv/ready-dev lint       ## lint, types, and the tests but for those of `make sweep`
	$(BIN)/python -m pytest -m "not slow"

sweep: .venv/ready-dev           ## the slow tests: all models of all tasks, kills, clusters, servers; part of CI
	$(BIN)/python -m pytest -m slow

oldest: .venv-oldest/ready        ## the core of the suite with the oldest versions that are promised; PYTHON names the Python
	.venv-oldest/bin/python -m pytest $(CORE)

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: .venv/ready                  ## the MLflow UI on mlruns/, on loopback
	$(BIN)/python -m tracking ui

server: .venv/ready-cluster      ## the tracking server on PostgreSQL, on loopback; deploy/README.md says what it needs
	PATH="$(CURDIR)/$(BIN):$$PATH" deploy/server.sh

notebook: .venv/ready-notebook   ## comparison.ipynb on mlruns/, in a browser
	$(BIN)/jupyter lab analysis/comparison.ipynb

race: .venv/ready-benchmarks     ## the suite against other loops, an hour and a half; DATA_DIR names the data
	$(BIN)/python -m benchmarks.race

clean:                           ## the virtual environments and caches; results and data stay
	rm -rf .venv .venv-oldest .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

.venv/ready-cluster: .venv/ready requirements-cluster.txt
	$(BIN)/pip install --quiet --requirement requirements-cluster.txt
	touch $@

.venv/ready-notebook: .venv/ready requirements-notebook.txt
	$(BIN)/pip install --quiet --requirement requirements-notebook.txt
	touch $@

.venv/ready-benchmarks: .venv/ready requirements-benchmarks.txt
	$(BIN)/pip install --quiet --requirement requirements-benchmarks.txt
	touch $@

.venv/ready-dev: .venv/ready-cluster requirements-tuning.txt requirements-dev.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

# the lower ends of requirements-ranges.txt, and what the tests need beside the program
.venv-oldest/ready: requirements-ranges.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-oldest
	sed 's/>=/==/; s/,.*//' requirements-ranges.txt > .venv-oldest/requirements.txt
	grep -E '^(baycomp|hypothesis|ipykernel|moto|nbclient|nbformat|pytest|ruff|seaborn|statsmodels)\b' \
		requirements-dev.txt >> .venv-oldest/requirements.txt
	.venv-oldest/bin/pip install --quiet --requirement .venv-oldest/requirements.txt
	touch $@
