#!/usr/bin/env bash
# Tests the software CUDA driver. usage: selftest.sh [--valgrind]; exits 1 on any failure.
# --valgrind adds a run of the groups that bear it under valgrind, if that is installed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$here/build.sh" "$work/full"
"$here/build.sh" "$work/stub" --stub
"$here/build.sh" "$work/older" --without cuMemcpyBatchAsync,cuMemRetainAllocationHandle
"${CC:-gcc}" -std=gnu11 -O1 -g -Wall -Wextra -Werror -pthread -o "$work/selftest" "$here/selftest.c" -ldl

failed=0
# run NAME [VARIABLE=VALUE...] -- LIBRARY GROUP [ARGUMENT...]
run() {
    local name=$1 settings=()
    shift
    while [ "$1" != -- ]; do settings+=("$1"); shift; done
    shift
    local library=$work/$1/libcuda.so.1
    shift
    if ! env "${settings[@]}" timeout 120 "${prefix[@]}" "$work/selftest" "$library" "$@"; then
        echo "FAILED: $name $*" >&2
        failed=1
    fi
}

groups=(basics vmm plain host copies legacy illegal capture kernels models pitched faults fork processes threads)
prefix=()
for group in "${groups[@]}"; do
    run plain -- full "$group"
    run late FAKECUDA_LATE=1 -- full "$group"
    run unreadable FAKECUDA_HOST_UNREADABLE=1 FAKECUDA_LATE=1 FAKECUDA_LATE_US=50 -- full "$group"
done
run peers FAKECUDA_DEVICES=2 -- full peers
run peers-late FAKECUDA_DEVICES=3 FAKECUDA_LATE=1 -- full peers
run environment FAKECUDA_FAIL=cuMemCreate:2:2,cuMemMap:1:999:2 -- full environment
run no-device FAKECUDA_INIT=100 -- full init-fails 100 3
run no-device FAKECUDA_DEVICES=0 -- full init-fails 100 3
run stub -- stub init-fails 34 34
run absent -- older absent cuMemcpyBatchAsync
run absent -- older absent cuMemRetainAllocationHandle

if [ "${1:-}" = --valgrind ] && command -v valgrind >/dev/null; then
    prefix=(valgrind -q --error-exitcode=9 --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite --child-silent-after-fork=yes)
    for group in basics plain host legacy capture kernels models pitched faults; do
        run valgrind -- full "$group"
    done
fi

[ "$failed" = 0 ] && echo "fakecuda: all tests passed"
exit "$failed"
