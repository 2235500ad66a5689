# make run: build and start.  make test: install what the tests need, and run them all.  make bench: measure us and our peers.
.PHONY: run build test deps frontend fmt bench peers fuzz memcheck audit tools

CARGO ?= cargo
# Seconds for each fuzz target.
FUZZ ?= 60

run: build
	./target/release/beamline up --data-dir data

build: tools frontend
	$(CARGO) build --release -p beamline

# Build the pages before the binary, which embeds them.
test: deps frontend
	./scripts/test.sh

bench: build peers
	$(CARGO) bench --quiet -p checks --bench bench -- --write "$(CURDIR)/docs/benchmarks.md"

# What the benchmarks compare with, besides the servers that the tests install.
peers: deps
	npm --prefix crates/checks/benches/peers/bullmq ci --ignore-scripts --no-audit --no-fund --loglevel=error

fuzz: tools
	./scripts/fuzz.sh $(FUZZ)

memcheck: tools
	./scripts/memory-check.sh

# Checks the dependencies for known vulnerabilities; needs cargo-deny and its database.
audit: tools
	@CARGO='$(CARGO)' ./scripts/check-advisories.sh

fmt: tools
	$(CARGO) fmt --all
	npm --prefix frontend run --silent format

frontend: tools
	./scripts/build-frontend.sh

deps: tools
	./scripts/install-test-deps.sh

# Reports every missing tool before anything is built. The variable names the tools that a target and its prerequisites
# need; by default all three. `deps` installs the C compiler.
TOOLS =
tools:
	@CARGO='$(CARGO)' ./scripts/check-tools.sh $(TOOLS)

test deps: TOOLS = rust node
frontend: TOOLS = node
audit: TOOLS = rust
fmt: TOOLS = rust node
fuzz memcheck: TOOLS = rust cc
