#!/bin/sh
# Checks the dependencies against the RustSec advisory database, as deny.toml configures it. Needs cargo-deny, and a
# database that was fetched before or can be fetched now. Without them it fails, or with --if-possible skips the check.
set -u
cd "$(dirname "$0")/.." || exit 1
cargo=${CARGO:-cargo}

cannot() {
  if [ "${if_possible:-}" = yes ]; then
    echo "SKIPPED: did not check the dependencies for advisories: $1"
    exit 0
  fi
  echo "cannot check the dependencies for advisories: $1" >&2
  exit 1
}

case ${1:-} in
'') ;;
--if-possible) if_possible=yes ;;
*)
  echo "usage: check-advisories.sh [--if-possible]" >&2
  exit 2
  ;;
esac

if ! $cargo deny --version >/dev/null 2>&1; then
  cannot "cargo-deny is not installed; install it with: cargo install --locked cargo-deny"
fi

databases=${CARGO_HOME:-${HOME:-}/.cargo}/advisory-dbs
if ! said=$($cargo deny fetch db 2>&1); then
  if [ -z "$(ls -A "$databases" 2>/dev/null)" ]; then
    cannot "$databases holds no advisory database, and fetching one failed: $(printf '%s' "$said" | tail -n 1)"
  fi
  echo "cannot fetch the advisory database; checking with the one in $databases, which may be old"
fi
exec $cargo deny check --disable-fetch advisories
