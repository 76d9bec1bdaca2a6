# make demo   everything on real data, from nothing: environment, data, training, evaluation, a page to look at
# make test   environment, all tests, lint among them; as root it installs TOOLS, else they must be there (without SLURM its tests are skipped)
# make results  GRID, UrbanSound8K and ESC-10, as far as DATA has them, against a plain baseline: docs/results.md
# make lint   ruff and mypy
# make api    the API reference, from the docstrings: build/api/index.html
# make dist   wheel and sdist: dist/
# make faults hours of kills, full disks, damaged files and long runs: docs/reliability.md (as root, Debian)
# All need Python 3.11-3.12 with venv, and git. PYTHON and VENV can be set.
PYTHON ?= python3
VENV ?= .venv
SET ?= stamps
DATA ?= data
PIP = $(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt
TOOLS = chromium default-jre-headless faketime ffmpeg munge slurmctld slurmd slurm-client
.DELETE_ON_ERROR:
.PHONY: demo test results tools lint api dist faults

demo: $(VENV)/installed
	@PATH="$(abspath $(VENV))/bin:$$PATH" bash launch/demo.sh $(SET)

test: $(VENV)/installed tools
	@PATH="$(abspath $(VENV))/bin:$$PATH" PYTHONDONTWRITEBYTECODE= PYTHONUTF8=1 python -m pytest -q -rs --durations=12 -p no:cacheprovider \
		-n 2 --dist loadfile --no-loadscope-reorder tests

results: $(VENV)/installed
	@PATH="$(abspath $(VENV))/bin:$$PATH" python launch/results.py --data $(DATA)

tools:
	@which chromium faketime ffmpeg java munged slurmctld slurmd sbatch >/dev/null || [ "$$(id -u)" != 0 ] || \
		{ apt-get update -qq && apt-get install -y -qq $(TOOLS); } >/dev/null

lint: $(VENV)/installed
	@$(VENV)/bin/ruff check --no-cache . && $(VENV)/bin/ruff format --no-cache --check .
	@$(VENV)/bin/mypy --cache-dir $(VENV)/mypy

api: $(VENV)/installed
	@$(VENV)/bin/python -m pdoc -o build/api $(subst /,.,$(basename $(filter-out %__init__.py %__main__.py,$(shell find clip4vla -name "*.py"))))

dist: $(VENV)/installed
	@$(VENV)/bin/python -m build --no-isolation

faults: $(VENV)/installed tools
	@PATH="$(abspath $(VENV))/bin:$$PATH" PYTHONPATH=tests python -m faults

$(VENV)/installed: setup.py constraints.txt
	@echo "Installing into $(VENV): 200 packages, 7 GB. A few minutes:"
	@$(PYTHON) -m venv $(VENV)
	@echo "  1 of 3: PyTorch with CUDA (3 GB to download)"
	@$(PIP) torch torchvision torchaudio
	@echo "  2 of 3: DeepSpeed, DALI, open_clip"
	@$(PIP) -e '.[train,dali]'
	@echo "  3 of 3: what evaluation, the search page and the tests use"
	@$(PIP) -e '.[dev]'
	@touch $@
