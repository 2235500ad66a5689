#!/usr/bin/env bash
# Checks the packages for memory errors and leaks: memory-check.sh [PACKAGE...], by default gateway, wire and bus.
#  1. Runs all their tests under AddressSanitizer and LeakSanitizer. Our code, every Rust dependency and the generic
#     part of the standard library are instrumented. Precompiled library code and C code (SQLite, cryptography) are not,
#     but their allocations, frees and calls of memcpy and the like are checked too.
#  2. Runs their unit tests, and the gateway's sessions over real sockets, under valgrind if it is installed: valgrind
#     checks every instruction, whichever compiler produced it.
# Our own code has no `unsafe`, so this looks for errors in the code below it, and for leaks. The stable compiler will do.
set -eu
cd "$(dirname "$0")/.."
packages=("$@")
if [ ${#packages[@]} -eq 0 ]; then packages=(gateway wire bus); fi
triple=$(rustc -vV | sed -n 's/^host: //p')
options=$(printf -- '-p %s ' "${packages[@]}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1
valgrind=(valgrind --quiet --error-exitcode=99 --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite)

echo "== self-test: a program that leaks, and one that reads freed memory"
cat >"$scratch/leak.rs" <<'RUST'
fn main() {
    let leaked: &mut [u8] = vec![1; 4242].leak();
    println!("{}", std::hint::black_box(leaked).len());
}
RUST
cat >"$scratch/freed.rs" <<'RUST'
fn main() {
    let freed = Box::into_raw(Box::new(42_u64));
    unsafe {
        drop(Box::from_raw(freed));
        println!("{}", freed.read_volatile());
    }
}
RUST
# The program must fail because the checker reports the error, and for no other reason.
must_report() {
  local what=$1
  shift
  if "$@" >"$scratch/report" 2>&1 || ! grep -q "$what" "$scratch/report"; then
    cat "$scratch/report" >&2
    echo "memory-check: $1 did not report '$what': the checker does not work here" >&2
    exit 1
  fi
}
for program in leak freed; do
  RUSTC_BOOTSTRAP=1 rustc -Zsanitizer=address --target "$triple" -o "$scratch/$program-asan" "$scratch/$program.rs"
  rustc -o "$scratch/$program" "$scratch/$program.rs"
done
must_report 'detected memory leaks' "$scratch/leak-asan"
must_report 'heap-use-after-free' "$scratch/freed-asan"
if command -v valgrind >/dev/null; then
  must_report 'definitely lost' "${valgrind[@]}" "$scratch/leak"
  must_report 'Invalid read' "${valgrind[@]}" "$scratch/freed"
fi

echo "== AddressSanitizer and LeakSanitizer: all tests of ${packages[*]}"
RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo test --quiet --target "$triple" --target-dir target/asan --tests $options

if ! command -v valgrind >/dev/null; then
  echo "memory-check: clean; skipped valgrind, which is not installed"
  exit 0
fi
# The test binaries, from cargo's lines `Executable unittests src/lib.rs (target/debug/deps/wire-…)`.
built=$(cargo test --no-run --tests $options 2>&1 | sed -n 's/^ *Executable \(.*\) (\(.*\))$/\1|\2/p')
root=$PWD
while IFS='|' read -r of binary; do
  case $binary in /*) ;; *) binary=$root/$binary ;; esac
  tests=()
  if [[ $of != unittests* ]]; then
    # Only the sessions over sockets: the other integration tests repeat them or need real servers, and take too long.
    if ! grep -qa 'crates/gateway/tests/it/session.rs' "$binary"; then continue; fi
    tests=(session:: injection:: old_clients::)
  fi
  echo "== valgrind: $(basename "$binary") ${tests[*]}"
  (cd "$scratch" && PROPTEST_CASES=32 "${valgrind[@]}" "$binary" --quiet --test-threads=1 ${tests[@]+"${tests[@]}"} </dev/null)
done <<<"$built"
echo "memory-check: clean"
