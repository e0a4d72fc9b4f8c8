# make demo      from nothing to a trained model with numbers, in about five minutes on two CPU cores
# make test      the quick tests           make test-all   all tests: drills, kills, full-size models too
# make bench     speed and memory of the demo's step and loader
# make env       .venv alone               make clean      delete the demo's data and run
PYTHON ?= python3
PY := .venv/bin/python
DATA := data/icons
RUN := runs/demo
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Servers, signals and browsers are real, and a busy machine answers late: what fails beside other tests is run
# once more, alone. What fails there too is a failure, and so is a run that did not come to its end.
define tests
	$(PYTEST) -m "$(1)" || { [ $$? = 1 ] && echo "== Once more, alone: the tests that failed" \
	  && $(PY) -m pytest -m "$(1)" --last-failed --last-failed-no-failures none; }
endef

.PHONY: demo lint test test-all bench env clean

env: .venv/installed

.venv/installed: pyproject.toml $(wildcard requirements*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "needs Python 3.10 or newer, this is %s: make PYTHON=python3.12" % sys.version.split()[0])'
	@$(PYTHON) -m venv .venv || { echo "on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "installing: about 5 GB, most of it CUDA libraries that come with torch; one to five minutes"
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[all,test]'
	@touch $@

$(DATA)/icons.csv: | .venv/installed
	$(PY) -m data_prep icons --out $(DATA) --overwrite

$(DATA)/shards/manifest.json: $(DATA)/icons.csv
	$(PY) -m data_prep build $(DATA)/icons.csv --out $(DATA)/shards --image-column file_path --caption-column caption --group-column group --overwrite

demo: $(DATA)/shards/manifest.json
	$(PY) -m train train/recipes/demo.yaml --data $(DATA)/shards --run $(RUN)
	@echo; echo "== Before training, and after, on the test split: icons of groups that training never saw"
	@$(PY) -m eval retrieval demo-vit:none --data $(DATA)/shards --split test --json $(RUN)/test-before.json > /dev/null
	@$(PY) -m eval retrieval $(RUN) --data $(DATA)/shards --split test --json $(RUN)/test.json --against $(RUN)/test-before.json --page $(RUN)/test.html
	@echo; echo "== An index of all icons"
	@$(PY) -m eval embed $(RUN) --data $(DATA)/shards --out $(RUN)/index --overwrite > /dev/null
	@$(PY) -m eval search $(RUN)/index --text "calendar check" --k 5
	@echo; echo "Search them: $(PY) -m eval serve $(RUN)/index      then open http://127.0.0.1:8000: type, or drop an image"
	@echo "Open next:   $(CURDIR)/$(RUN)/test.html"
	@echo "  curves:    .venv/bin/tensorboard --logdir $(RUN)"
	@echo "  numbers:   $(RUN)/test.json      the data: $(DATA)/shards/report.html"

lint: | .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

test: lint
	$(call tests,not slow)

test-all: test
	$(call tests,slow)

bench: $(DATA)/shards/manifest.json
	$(PY) -m train.bench train/recipes/demo.yaml --data $(DATA)/shards

clean:
	rm -rf data/icons runs/demo
