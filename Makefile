# make run: build and start.  make test: install what tests need, run them all.  make bench: our figures beside our peers'.
.PHONY: run build test deps frontend fmt bench fuzz memcheck

CARGO ?= cargo
# Seconds for each fuzz target.
FUZZ ?= 60

run: build
	./target/release/beamline up --data-dir data

build: frontend
	$(CARGO) build --release -p beamline

# The pages come before cargo: they are put into the binary.
test: deps frontend
	./scripts/test.sh

bench: build
	$(CARGO) bench --quiet -p checks --bench bench -- --write "$(CURDIR)/docs/benchmarks.md"

fuzz:
	./scripts/fuzz.sh $(FUZZ)

memcheck:
	./scripts/memory-check.sh

fmt:
	$(CARGO) fmt --all

frontend:
	./scripts/build-frontend.sh

deps:
	./scripts/install-test-deps.sh
