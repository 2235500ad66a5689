# make run: build and start.  make test: install what tests need, run them all.  make bench: our figures beside our peers'.
.PHONY: run test deps frontend fmt bench

CARGO ?= cargo

run: frontend
	$(CARGO) build --release --bin beamline
	./target/release/beamline up

frontend:
	./scripts/build-frontend.sh

deps:
	./scripts/install-test-deps.sh

test: deps frontend
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) test --workspace
