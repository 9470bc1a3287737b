#!/bin/sh
# Tests of the preload library, each C file one or more named tests.
#   run.sh OUTDIR PRELOAD_SO [PLAIN_SO]
# OUTDIR is created; PLAIN_SO (default: libtms_memcache.so beside the build of PRELOAD_SO) is the
# second copy in the tests with two. Prints "ok NAME" or "FAIL NAME"; the status is 1 if any failed.
# CC, PYTHON and TMS_TEST_WHEELS (a folder with the wheel nvidia_cuda_runtime_cu12, for machines
# without a network) may be set.
set -u

[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
preload=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
plain=${3:-$(dirname "$(dirname "$preload")")/libtms_memcache.so}
cc=${CC:-cc}
python=${PYTHON:-python3}
failed=0

report() { # NAME STATUS
    if [ "$2" -eq 0 ]; then
        echo "ok $1"
    else
        echo "FAIL $1"
        sed 's/^/#   /' "$out/log" | tail -n 20
        failed=1
    fi
}

run() { # NAME COMMAND...
    name=$1
    shift
    timeout 60 "$@" >"$out/log" 2>&1
    report "$name" $?
}

hooked() { # NAME PROGRAM ARGUMENTS..., with the library preloaded
    name=$1
    program=$2
    shift 2
    run "$name" env LD_PRELOAD="$preload" "$out/$program" "$@"
}

build() {
    "$cc" -std=gnu11 -D_GNU_SOURCE -O1 -g -Wall -Wextra -Werror "$@" || { echo "FAIL build: $*"; exit 1; }
}

runtime() { # FILE SONAME VERSION_NODE
    mkdir -p "$(dirname "$out/$1")"
    echo "$3 { global: *; };" >"$out/versions"
    build -shared -fPIC -pthread -Wl,-soname,"$2" -Wl,--version-script,"$out/versions" \
        -o "$out/$1" "$here/fakecudart.c"
}

[ -f "$preload" ] || { echo "FAIL build: $preload does not exist"; exit 1; }
runtime rt12/libcudart.so.12 libcudart.so.12 libcudart.so.12
runtime rt13/libcudart.so.13 libcudart.so.13 libcudart.so.13
runtime rt11/libcudart.so.11.0 libcudart.so.11.0 libcudart.so.11.0
runtime vendored/libcudart-9a5e2c3f.so.12.8.90 libcudart-9a5e2c3f.so.12.8.90 libcudart.so.12
for test in symbols host_region host_foreign late_runtime region_with_runtime driver leave \
    two_copies real_runtime; do
    build -pthread -o "$out/$test" "$here/$test.c" -ldl
done
build -o "$out/linked" "$here/linked.c" "$out/rt12/libcudart.so.12" -ldl

run preload-symbols "$out/symbols" "$preload"

# No version on any name that we define, and no CUDA library needed.
readelf --dyn-syms -W "$preload" | awk '$7 != "UND" { print $8 }' >"$out/defined"
if grep -E '^(cuda|tms_|set_memory)[A-Za-z_0-9]*@' "$out/defined" >"$out/log" ||
    readelf -d -W "$preload" | grep NEEDED | grep -i cuda >"$out/log"; then
    report preload-unversioned 1
else
    report preload-unversioned 0
fi

# Tests that mean "no CUDA library on this machine" ask for the host device where there is one.
nocuda=""
if "$python" -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>"$out/log" ||
    "$python" -c 'import ctypes; ctypes.CDLL("libcudart.so.12")' 2>"$out/log" ||
    "$python" -c 'import ctypes; ctypes.CDLL("libcudart.so.13")' 2>"$out/log"; then
    echo "# a CUDA library is installed here: the host device is asked for by TMS_DEVICE=host"
    nocuda="TMS_DEVICE=host"
fi
# shellcheck disable=SC2086 # the variable holds one assignment or nothing
alone() { name=$1; program=$2; shift 2
    run "$name" env $nocuda LD_PRELOAD="$preload" "$out/$program" "$@"; }

alone preload-host-region host_region
alone preload-host-foreign host_foreign
alone preload-runtime-neither host_foreign
alone preload-runtime-12 late_runtime "$out/rt12/libcudart.so.12"
alone preload-runtime-13 late_runtime "$out/rt13/libcudart.so.13"
alone preload-runtime-11 late_runtime "$out/rt11/libcudart.so.11.0"
alone preload-runtime-vendored-name late_runtime "$out/vendored/libcudart-9a5e2c3f.so.12.8.90"
alone preload-runtime-13-then-12 late_runtime "$out/rt13/libcudart.so.13" "$out/rt12/libcudart.so.12"
alone preload-runtime-12-then-13 late_runtime reversed "$out/rt13/libcudart.so.13" \
    "$out/rt12/libcudart.so.12"
run preload-region-host-asked env TMS_DEVICE=host LD_PRELOAD="$preload" \
    "$out/region_with_runtime" "$out/rt12/libcudart.so.12"
if [ -z "$nocuda" ]; then
    hooked preload-region-never-falls-back region_with_runtime "$out/rt12/libcudart.so.12"
fi
run preload-linked-versioned env TMS_DEVICE=host LD_LIBRARY_PATH="$out/rt12" \
    LD_PRELOAD="$preload" "$out/linked"
for how in live threads fork exit-in-thread thread-teardown atexit-before atexit-after; do
    alone "preload-leave-$how" leave "$how"
done

if [ -f "$plain" ]; then
    alone preload-two-copies-preloaded two_copies preloaded "$plain"
    run preload-two-copies-preload-first env TMS_DEVICE=host "$out/two_copies" "$preload" "$plain"
    run preload-two-copies-plain-first env TMS_DEVICE=host "$out/two_copies" "$plain" "$preload"
    cp "$preload" "$out/libtms_preload_other.so"
    alone preload-two-copies-of-preload two_copies preloaded "$out/libtms_preload_other.so"
else
    echo "$plain does not exist" >"$out/log"
    report preload-two-copies 1
fi

# A driver can be loaded: the software driver stands for it.
driven() { # NAME VARIABLE=VALUE PROGRAM ARGUMENTS...
    name=$1
    variable=$2
    program=$3
    shift 3
    run "$name" env -u TMS_DEVICE LD_LIBRARY_PATH="$out/fakecuda" "$variable" \
        LD_PRELOAD="$preload" "$out/$program" "$@"
}
if "$here/../fakecuda/build.sh" "$out/fakecuda" >"$out/log" 2>&1; then
    driven preload-driver-serves FAKECUDA_DEVICES=1 driver serves
    driven preload-driver-and-runtime-serve FAKECUDA_DEVICES=1 driver serves \
        "$out/rt13/libcudart.so.13"
    driven preload-driver-without-device FAKECUDA_DEVICES=0 driver refuses
    driven preload-driver-stub FAKECUDA_INIT=34 driver refuses
    driven preload-driver-without-device-and-runtime FAKECUDA_DEVICES=0 driver refuses \
        "$out/rt13/libcudart.so.13"
    for how in threads fork exit-in-thread atexit-before atexit-after; do
        driven "preload-driver-leave-$how" FAKECUDA_LATE=1 leave "$how"
    done
else
    report preload-driver 1
fi

# NVIDIA's runtime, from its wheel.
wheels=${TMS_TEST_WHEELS:-$out/wheels}
real=$out/real/nvidia/cuda_runtime/lib/libcudart.so.12
if [ ! -f "$real" ]; then
    ls "$wheels"/nvidia_cuda_runtime_cu12-*.whl >"$out/log" 2>&1 ||
        "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
            -d "$wheels" 'nvidia-cuda-runtime-cu12==12.8.90' >"$out/log" 2>&1
    for wheel in "$wheels"/nvidia_cuda_runtime_cu12-*.whl; do
        [ -f "$wheel" ] && "$python" -m zipfile -e "$wheel" "$out/real" >>"$out/log" 2>&1
    done
fi
if [ -f "$real" ]; then
    hooked preload-real-runtime real_runtime "$real"
else
    echo "the wheel nvidia-cuda-runtime-cu12 could not be fetched" >>"$out/log"
    report preload-real-runtime 1
fi
exit $failed
