//! The committed headers are what `src/ffi` says.
//!
//! The build script writes a fresh copy into its output folder and brings `include/` up to date
//! where it can; `c_tests/run` tells when it had to. Where it cannot write, this test tells.

use std::fs;
use std::path::Path;

fn assert_same(name: &str) {
    let generated = Path::new(env!("TMS_HEADERS_OUT")).join(name);
    let committed = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("include")
        .join(name);
    let read = |path: &Path| {
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let (generated, committed) = (read(&generated), read(&committed));
    let different = committed
        .lines()
        .zip(generated.lines())
        .position(|(committed, generated)| committed != generated)
        .unwrap_or_else(|| committed.lines().count().min(generated.lines().count()));
    assert!(
        generated == committed,
        "include/{name} differs from line {} on: build where include/ can be written, and commit it",
        different + 1
    );
}

#[test]
fn tms_h_is_up_to_date() {
    assert_same("tms.h");
}

#[test]
fn memcache_h_is_up_to_date() {
    assert_same("memcache.h");
}
