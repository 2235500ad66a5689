# make run: build and start.  make test: install what tests need, run them all.  make bench: our figures beside our peers'.
.PHONY: run build test deps frontend fmt bench fuzz memcheck audit tools

CARGO ?= cargo
# Seconds for each fuzz target.
FUZZ ?= 60

run: build
	./target/release/beamline up --data-dir data

build: tools frontend
	$(CARGO) build --release -p beamline

# The pages come before cargo: they are put into the binary.
test: deps frontend
	./scripts/test.sh

bench: build
	$(CARGO) bench --quiet -p checks --bench bench -- --write "$(CURDIR)/docs/benchmarks.md"

fuzz: tools
	./scripts/fuzz.sh $(FUZZ)

memcheck: tools
	./scripts/memory-check.sh

# Known faults of what we build on; takes cargo-deny and its database.
audit: tools
	@CARGO='$(CARGO)' ./scripts/check-advisories.sh

fmt: tools
	$(CARGO) fmt --all
	npm --prefix frontend run --silent format

frontend: tools
	./scripts/build-frontend.sh

deps: tools
	./scripts/install-test-deps.sh

# Whatever is missing is told before anything is built. What a target needs less than all three of is said below, for it
# and what it depends on; `deps` installs the C compiler.
TOOLS =
tools:
	@CARGO='$(CARGO)' ./scripts/check-tools.sh $(TOOLS)

test deps: TOOLS = rust node
frontend: TOOLS = node
audit: TOOLS = rust
fmt: TOOLS = rust node
fuzz memcheck: TOOLS = rust cc
