#!/usr/bin/env bash
# Installs what `cargo build --release --all-targets` built:
#
#     examples/install.sh PREFIX
#
#   PREFIX/include/tms.h memcache.h
#   PREFIX/lib/libtms_memcache.so.VERSION, with links .so.ABI (the soname) and .so
#   PREFIX/lib/libtms_preload.so                for LD_PRELOAD
#   PREFIX/lib/pkgconfig/tms-memcache.pc        for pkg-config --cflags --libs tms-memcache
#
# DESTDIR is put in front of every path that is written, for packagers. CARGO_TARGET_DIR is where
# cargo put its results, if not ./target.
set -euo pipefail

if [ $# -ne 1 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
mkdir -p "${DESTDIR:-}$1"
case $1 in
/*) prefix=${1%/} ;;
*) prefix=$(pwd)/${1%/} ;;
esac
target=${CARGO_TARGET_DIR:-}
[ -z "$target" ] || target=$(cd "$target" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
built=${target:-target}/release
root=${DESTDIR:-}$prefix

for file in "$built/libtms_memcache.so" "$built/examples/libtms_preload.so"; do
    if [ ! -f "$file" ]; then
        echo "install.sh: $file does not exist; run: cargo build --release --all-targets" >&2
        exit 1
    fi
done

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
soname=$(readelf -d "$built/libtms_memcache.so" | sed -n 's/.*(SONAME).*\[\(.*\)\].*/\1/p')

mkdir -p "$root/include" "$root/lib/pkgconfig"
install -m 644 include/tms.h include/memcache.h "$root/include/"
install -m 755 "$built/libtms_memcache.so" "$root/lib/libtms_memcache.so.$version"
ln -sfn "libtms_memcache.so.$version" "$root/lib/$soname"
ln -sfn "$soname" "$root/lib/libtms_memcache.so"
install -m 755 "$built/examples/libtms_preload.so" "$root/lib/"
sed -e "s|@PREFIX@|$prefix|" -e "s|@VERSION@|$version|" examples/c/tms-memcache.pc.in \
    >"$root/lib/pkgconfig/tms-memcache.pc"
echo "installed tms-memcache $version ($soname) in $root"
