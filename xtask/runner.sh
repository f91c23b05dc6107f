#!/bin/sh
# What cargo runs this workspace's binaries with. Those of the packages below need KVM (xtask/src/test.rs names
# the same); xtask runs them where KVM works. All others run as they are, xtask itself among them.
case $CARGO_PKG_NAME in
    cubby-vmm | cubbyhole | cubby-tests | cubby-benches) ;;
    *) exec "$@" ;;
esac
root=$(dirname "$(dirname "$(readlink -f "$0")")")
xtask=${CARGO_TARGET_DIR:-$root/target}/debug/xtask
# Cargo has let go of its lock by the time it runs something.
if [ ! -x "$xtask" ] || [ -n "$(find "$root/xtask" "$root/Cargo.lock" -newer "$xtask" -print -quit)" ]; then
    (cd "$root" && "${CARGO:-cargo}" build --quiet --package xtask) || exit 125
fi
exec "$xtask" runner -- "$@"
