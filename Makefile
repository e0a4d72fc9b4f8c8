# make demo    from nothing to a trained model with numbers, in about ten minutes on two CPU cores
# make test    the tests                make bench   speed and memory of the demo's step and loader
# make env     .venv alone              make clean   forget the demo's data and run
PYTHON ?= python3
PY := .venv/bin/python
DATA := data/icons
RUN := runs/demo

.PHONY: demo test bench env clean

env: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is wanted, this is %s; make PYTHON=python3.12" % sys.version.split()[0])'
	@$(PYTHON) -m venv .venv || { echo "on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "installing: about 5 GB, most of it CUDA libraries that come with torch; one to five minutes"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(DATA)/icons.csv: | .venv/installed
	$(PY) -m data_prep icons --out $(DATA) --overwrite True

$(DATA)/shards/manifest.json: $(DATA)/icons.csv
	$(PY) -m data_prep build $(DATA)/icons.csv --out $(DATA)/shards --image-column file_path --caption-column caption --group-column group --overwrite True

demo: $(DATA)/shards/manifest.json
	$(PY) -m train train/recipes/demo.yaml --data $(DATA)/shards --run $(RUN)
	@echo; echo "== Before training, and after, on the test split: icons of groups that training never saw"
	@$(PY) -m eval retrieval demo-vit:none --data $(DATA)/shards --split test --json $(RUN)/test-before.json > /dev/null
	@$(PY) -m eval retrieval $(RUN) --data $(DATA)/shards --split test --json $(RUN)/test.json --against $(RUN)/test-before.json --page $(RUN)/test.html
	@echo; echo "== An index of all icons"
	@$(PY) -m eval embed $(RUN) --data $(DATA)/shards --out $(RUN)/index --overwrite True > /dev/null
	@$(PY) -m eval search $(RUN)/index --text "calendar check" --k 5
	@echo; echo "Search them: $(PY) -m eval serve $(RUN)/index      then open http://127.0.0.1:8000: type, or drop a picture"
	@echo "Open next:   $(CURDIR)/$(RUN)/test.html"
	@echo "  curves:    .venv/bin/tensorboard --logdir $(RUN)"
	@echo "  numbers:   $(RUN)/test.json      what was built, and from what: $(DATA)/shards/report.json"

test: | .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(DATA)/shards/manifest.json
	$(PY) -m train.bench train/recipes/demo.yaml --data $(DATA)/shards

clean:
	rm -rf data/icons runs/demo
