#!/usr/bin/env bash
# Runs all checks and tests, the quickest first. `make test` installs and builds what they need.
set -eu
cd "$(dirname "$0")/.."
CARGO=${CARGO:-cargo}

# Runs a step, and reports its duration or its failure.
step() {
  local name=$1 began=$SECONDS
  shift
  echo "== $name"
  if ! "$@"; then
    echo "== $name FAILED: $*" >&2
    exit 1
  fi
  echo "== $name: $((SECONDS - began)) s"
}

step format $CARGO fmt --all --check
step advisories ./scripts/check-advisories.sh --if-possible
step "pages: format" npm --prefix frontend run --silent format:check
step "pages: types" npm --prefix frontend run --silent check
step "pages: tests" npm --prefix frontend run --silent test
step "pages: size" npm --prefix frontend run --silent size
step clippy $CARGO clippy --workspace --all-targets --quiet -- -D warnings
# With `xtask tidy`, which is one of the tests.
step tests $CARGO test --workspace
# For the browser; the tests have built all but the linking.
step binary $CARGO build --package beamline
step browser env BEAMLINE="$PWD/target/debug/beamline" npm --prefix frontend run --silent test:browser
echo "== all passed"
