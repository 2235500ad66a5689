#!/usr/bin/env bash
# Builds the pages into frontend/dist, which the binary embeds. Skips the build if nothing has changed.
set -eu
cd "$(dirname "$0")/../frontend"
if [ package-lock.json -nt node_modules/.package-lock.json ]; then
  npm ci --no-audit --no-fund --loglevel=error
fi
from=(src scripts index.html package.json package-lock.json vite.config.ts tsconfig.json)
newest=$(find "${from[@]}" -newer dist/index.html -print -quit 2>/dev/null || echo build)
if [ ! -f dist/index.html ] || [ -n "$newest" ]; then npm run --silent build; fi
