#!/bin/sh
# Checks that the machine has the tools for a build, and names everything that is missing and how to install it:
# check-tools.sh [rust] [node] [cc]; by default all three. Needs no tool but the shell.
set -u
case $0 in */*) root=${0%/*}/.. ;; *) root=.. ;; esac
cargo=${CARGO:-cargo}
problems=

# problem WHAT HOW
problem() {
  problems="$problems
  $1
      $2"
}

# at_least HAVE NEED: succeeds if version HAVE ("1.95.0", "v20.19.1-nightly") is NEED ("1.95") or newer.
at_least() {
  have=${1#v} least=$2
  while [ -n "$least" ]; do
    a=${have%%[!0-9]*} b=${least%%[!0-9]*}
    if [ "${a:-0}" -gt "$b" ]; then return 0; fi
    if [ "${a:-0}" -lt "$b" ]; then return 1; fi
    case $have in *.*) have=${have#*.} ;; *) have= ;; esac
    case $least in *.*) least=${least#*.} ;; *) least= ;; esac
  done
}

# quoted FILE KEY: prints the version in the first line of FILE that contains KEY.
quoted() {
  while IFS= read -r line; do
    case $line in
    *"$2"*)
      line=${line#*"$2"}
      line=${line#"${line%%[0-9]*}"}
      printf '%s' "${line%%[!0-9.]*}"
      return
      ;;
    esac
  done <"$1"
}

check_rust() {
  need=$(quoted "$root/Cargo.toml" 'rust-version =')
  rustup="install rustup (https://rustup.rs), then run: rustup default stable"

  if ! command -v ${cargo%% *} >/dev/null 2>&1; then
    home=${CARGO_HOME:-${HOME:-/nonexistent}/.cargo}
    if [ -x "$home/bin/cargo" ]; then
      problem "cargo is installed in $home/bin, which is not in PATH" "run: export PATH=\"$home/bin:\$PATH\""
    else
      problem "cargo is not installed; the build needs Rust $need or newer" "$rustup"
    fi
    return
  fi

  # Check both: distributions package them separately, and rustup's proxies exist even if no toolchain is installed.
  for tool in "$cargo" "${RUSTC:-rustc}"; do
    if ! said=$($tool --version 2>&1); then
      problem "$tool does not run: ${said%%
*}" "with rustup: rustup default stable; without it: $rustup"
      continue
    fi
    version=${said#* }
    version=${version%% *}
    if ! at_least "$version" "$need"; then
      problem "$tool is $version; the build needs Rust $need or newer" \
        "with rustup: rustup update stable; packages of distributions are often older: $rustup"
    fi
  done
}

check_node() {
  need=$(quoted "$root/frontend/package.json" '"node":')
  how="from https://nodejs.org, with nvm or from NodeSource; the nodejs of Debian and Ubuntu may be too old"

  if ! command -v node >/dev/null 2>&1; then
    problem "node is not installed; the front end needs Node $need or newer, and npm" "install it $how"
    return
  fi
  if ! said=$(node --version 2>&1); then
    problem "node does not run: ${said%%
*}" "install Node $need or newer $how"
  elif ! at_least "$said" "$need"; then
    problem "node is ${said#v}; the front end needs Node $need or newer" "install a newer one $how"
  fi
  if ! command -v npm >/dev/null 2>&1; then
    problem "npm is not installed; it fetches the dependencies of the front end" \
      "Debian and Ubuntu package it separately (apt-get install npm); elsewhere it comes with Node"
  fi
}

check_cc() {
  cc=${CC:-cc}
  how="Debian, Ubuntu: apt-get install build-essential; Fedora: dnf install gcc glibc-devel; macOS: xcode-select --install"
  if ! command -v ${cc%% *} >/dev/null 2>&1; then
    problem "there is no C compiler ($cc), which SQLite and the cryptography need" "$how"
  elif ! printf '#include <stdlib.h>\n' | $cc -x c -fsyntax-only - >/dev/null 2>&1; then
    problem "the C compiler $cc cannot compile: the headers of the C library are missing" "$how"
  fi
}

if [ $# -eq 0 ]; then set -- rust node cc; fi
for what in "$@"; do
  case $what in
  rust | node | cc) "check_$what" ;;
  *)
    echo "check-tools: unknown tool $what; use rust, node or cc" >&2
    exit 2
    ;;
  esac
done

if [ -n "$problems" ]; then
  echo "Nothing was built, because tools are missing or too old:$problems" >&2
  exit 1
fi
