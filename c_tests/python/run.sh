#!/bin/sh
# Tests of the Python binding, the copies of tensors, the drop-in tool, and the real package torch_memory_saver on our
# file, without a GPU: PyTorch is a stand-in (fake_torch), the device is host memory.
#   run.sh OUTDIR LIBRARY_SO PRELOAD_SO
# Prints "ok NAME" or "FAIL NAME"; the status is 1 if any failed. PYTHON may name an interpreter
# (3.9 or newer) and TMS_TEST_WHEELS a folder with the wheels torch_memory_saver 0.0.10 and numpy,
# for machines without a network.
set -u

[ $# -eq 3 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
library=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
preload=$(cd "$(dirname "$3")" && pwd)/$(basename "$3")
python=${PYTHON:-python3}
wheels=${TMS_TEST_WHEELS:-$out/wheels}
failed=0

unset TMS_INIT_ENABLE TMS_RETAIN_CPU_BACKUP LD_PRELOAD
export TMS_LIBRARY="$library" TMS_PRELOAD_LIBRARY="$preload" TMS_TEST_PACKAGE="$out/package"
export PYTHONPATH="$root/examples/python/src" PYTHONDONTWRITEBYTECODE=1
export TMS_DEVICE=host

fail() { # NAME, with the log
    echo "FAIL $1"
    sed 's/^/#   /' "$out/log" | tail -n 40
    failed=1
}

run() { # NAME COMMAND...
    name=$1
    shift
    if timeout 280 "$@" >"$out/log" 2>&1; then echo "ok $name"; else fail "$name"; fi
}

unittests() { # FILE [NAME]: each test is one line
    name=${2:-${1#test_}}
    timeout 280 "$python" "$here/$1.py" -v >"$out/log" 2>&1
    code=$?
    sed -n "s/^test_\([a-z_0-9]*\) .*\.\.\. ok\$/ok python-$name-\1/p
            s/^test_\([a-z_0-9]*\) .*\.\.\. skipped.*/ok python-$name-\1 # skipped/p" "$out/log"
    [ $code -eq 0 ] || fail "python-$name"
}

# The copies of tensors are tests over the stand-in for PyTorch.
copies() { # NAME
    PYTHONPATH="$here/fake_torch:$out/numpy:$PYTHONPATH"
    unittests test_copies "$1"
    PYTHONPATH="$root/examples/python/src"
}

fetch() { # PATTERN REQUIREMENT OPTIONS...
    pattern=$1
    requirement=$2
    shift 2
    for found in "$wheels"/$pattern; do [ -f "$found" ] && return 0; done
    "$python" -m pip download -q --disable-pip-version-check --only-binary=:all: --no-deps "$@" \
        -d "$wheels" "$requirement" >"$out/log" 2>&1
}

for file in "$library" "$preload"; do
    [ -f "$file" ] || { echo "FAIL python: $file does not exist"; exit 1; }
done

run python-basic "$python" "$root/examples/python/basic.py" --mib 64
unittests test_binding

if ! fetch 'torch_memory_saver-0.0.10-*.whl' torch_memory_saver==0.0.10; then
    fail python-package-download
    exit 1
fi
if [ ! -d "$TMS_TEST_PACKAGE" ]; then
    "$python" -m zipfile -e "$wheels"/torch_memory_saver-0.0.10-*.whl "$TMS_TEST_PACKAGE"
fi
unittests test_dropin
unittests test_scripts

# The binding as a user installs it, with the library inside the package.
rm -rf "$out/source" "$out/installed"
cp -r "$root/examples/python" "$out/source"
mkdir -p "$out/source/src/tms_memcache/lib"
cp "$library" "$out/source/src/tms_memcache/lib/libtms_memcache.so"
isolation=""
"$python" -c 'import setuptools, wheel' 2>"$out/log" && isolation=--no-build-isolation
# shellcheck disable=SC2086 # one option or nothing
run python-pip-install "$python" -m pip install -q --disable-pip-version-check $isolation \
    --no-deps --target "$out/installed" "$out/source"
run python-installed env -u TMS_LIBRARY PYTHONPATH="$out/installed" "$python" -c "
import tms_memcache
assert tms_memcache.library_path().startswith('$out/installed/'), tms_memcache.library_path()
tms_memcache.version()"

# The real package over the stand-in for PyTorch, in both hook modes. Left out: what needs a GPU's
# memory counters, kernels or graphs.
if ! fetch 'numpy-*.whl' numpy; then
    fail python-numpy-download
    exit 1
fi
if [ ! -d "$out/numpy" ]; then
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps \
        --target "$out/numpy" "$wheels"/numpy-*.whl >"$out/log" 2>&1 || fail python-numpy-install
fi
copies copies

package() { # NAME OPTIONS...
    name=$1
    shift
    PYTHONPATH="$here/fake_torch:$out/numpy" timeout 560 "$python" \
        "$root/examples/python/check_dropin.py" --wheel "$wheels" --library "$preload" \
        --skip mmap_resident_memory --skip graph_over_region_memory --skip graph_of_the_package \
        --skip full_in_a_region_is_reported --skip full_in_a_region_frees_the_cache \
        --skip full_for_good_is_an_exception \
        --skip memory_margin --skip full_at_resume --skip resume_waits_for_memory \
        --skip device_memory_drops_and_returns "$@" >"$out/package.log" 2>"$out/log"
    code=$?
    sed -n "s/^ok /ok python-$name-/p; s/^FAIL /FAIL python-$name-/p" "$out/package.log"
    [ $code -eq 0 ] && return
    failed=1
    grep -q ' checks, ' "$out/package.log" || fail "python-$name"
}

package package
# The package's own file needs a CUDA runtime, so only ours is looked at.
PYTHONPATH="$here/fake_torch:$out/numpy" "$python" \
    "$root/examples/python/bench_torch_memory_saver.py" --wheel "$wheels" --library "$preload" \
    --shape 320x32 --shrink 32 --case none --case 'pinned first' --touch-gib 1 --json \
    >"$out/bench.json" 2>"$out/log"
run python-bench "$python" -c "
import json
found = json.load(open('$out/bench.json'))['measured']['320x32']['ours']
assert found['error'] is None, found
assert [case['bytes_right'] for case in found['cases'].values()] == [True, True], found"
# Once more through the hooks and the CUDA code, on the software driver and the runtime without CUDA.
if "$here/../fakecuda/build.sh" "$out/fakecuda" >"$out/log" 2>&1 &&
    "${CC:-cc}" -D_GNU_SOURCE -shared -fPIC -pthread -Wl,-soname,libcudart.so.13 \
        -o "$out/fakecuda/libcudart.so.13" "$here/../preload/fakecudart.c" >"$out/log" 2>&1; then
    export TMS_DEVICE=cuda FAKECUDA_LATE=1 LD_LIBRARY_PATH="$out/fakecuda"
    FAKECUDA_DEVICES=2 copies copies-on-fakecuda
    package package-on-fakecuda --mode preload --skip backup_mmap
else
    fail python-package-on-fakecuda
fi
exit $failed
