#!/usr/bin/env bash
# Fuzzes the decoders and the gateway's sessions with libFuzzer: fuzz.sh [SECONDS-EACH] [TARGET...].
# Needs the stable Rust compiler and a C++ compiler.
set -eu
cd "$(dirname "$0")/../fuzz"
seconds=${1:-60}
shift || true
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then targets=(ipc websocket realtime app session); fi

# The flags of cargo-fuzz, without the sanitizer: it needs a nightly compiler, and our code has no `unsafe`. Panics are
# found without it. With --target, cargo does not apply the flags to build scripts.
triple=$(rustc -vV | sed -n 's/^host: //p')
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing"
export CARGO_TARGET_DIR=$PWD/target
features=()
if [[ " ${targets[*]} " == *" session "* ]]; then features=(--features session); fi
cargo build --release --quiet --target "$triple" "${features[@]}" $(printf -- '--bin %s ' "${targets[@]}")
RUSTFLAGS='' cargo run --release --quiet --bin seeds -- ../fixtures/wire corpus

for target in "${targets[@]}"; do
  echo "fuzz $target: ${seconds}s"
  mkdir -p "artifacts/$target"
  log=artifacts/$target.log
  if ! "$CARGO_TARGET_DIR/$triple/release/$target" "corpus/$target" -artifact_prefix="artifacts/$target/" \
    -max_total_time="$seconds" -max_len=8192 -timeout=5 -rss_limit_mb=1024 >"$log" 2>&1; then
    tail -n 40 "$log"
    echo "fuzz $target: failed; see fuzz/$log, and reproduce it with: fuzz/target/$triple/release/$target fuzz/artifacts/$target/FILE" >&2
    exit 1
  fi
  grep -E '^#[0-9]+[[:space:]]+DONE' "$log"
done
echo "fuzz: clean"
