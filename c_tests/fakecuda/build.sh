#!/usr/bin/env bash
# Builds the software CUDA driver: OUTDIR/libcuda.so.1, and the link OUTDIR/libcuda.so beside it.
# usage: build.sh OUTDIR [--without SYMBOL[,SYMBOL...]] [--stub]
#   --without  leaves these entry points out of the dynamic symbol table (an older driver)
#   --stub     every entry point returns 34 (the stub library of the toolkit)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

[ $# -ge 1 ] || usage
out=$1
shift
without=
flags=()
while [ $# -gt 0 ]; do
    case $1 in
    --without) [ $# -ge 2 ] || usage; without=$2; shift 2 ;;
    --stub) flags+=(-DFAKECUDA_STUB); shift ;;
    *) usage ;;
    esac
done

mkdir -p "$out"
script=$(mktemp)
trap 'rm -f "$script"' EXIT
{
    printf '{ global: cu*; fakecuda_*; local:'
    for symbol in ${without//,/ }; do printf ' %s;' "$symbol"; done
    printf ' *; };\n'
} >"$script"

sources=(entry object range fault error device context vmm plain host copy stream worker event capture module kernels control)
paths=("${sources[@]/%/.c}")
paths=("${paths[@]/#/$here/}")
"${CC:-gcc}" -std=gnu11 -O1 -g -Wall -Wextra -Werror -fPIC -shared -pthread -fvisibility=hidden "${flags[@]}" \
    -Wl,-soname,libcuda.so.1 -Wl,-z,nodelete -Wl,-z,defs -Wl,-Bsymbolic -Wl,--version-script="$script" \
    -o "$out/libcuda.so.1" "${paths[@]}" -ldl
ln -sfn libcuda.so.1 "$out/libcuda.so"
