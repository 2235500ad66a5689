#!/usr/bin/env bash
# Builds the pages into frontend/dist, from where they are put into the binary. Skips what has not changed.
set -eu
cd "$(dirname "$0")/../frontend"
if [ ! -f package.json ]; then exit 0; fi
if [ ! -d node_modules ] || [ package-lock.json -nt node_modules/.package-lock.json ]; then
  npm ci --no-audit --no-fund --loglevel=error
fi
newest=$(find src index.html package.json vite.config.ts tsconfig.json -newer dist/index.html -print -quit 2>/dev/null || echo build)
if [ ! -f dist/index.html ] || [ -n "$newest" ]; then npm run --silent build; fi
