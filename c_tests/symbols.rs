//! What the two shared objects export and need: pinned, because both are promises to others.
//!
//! Looks at the objects of the profile that this test was built with, by `nm` and `readelf`. When a
//! list is meant to change, change the committed `c_tests/exports_*.txt` with it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const MEMCACHE: &str = "libtms_memcache.so";
const PRELOAD: &str = "examples/libtms_preload.so";

/// The only libraries that may be needed; all of them are part of every Linux system.
const SYSTEM: [&str; 4] = [
    "libc.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "ld-linux-x86-64.so.2",
];

/// The folder of the profile: this test lies in its `deps`.
fn built(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.ancestors().nth(2).unwrap().join(name);
    assert!(
        path.is_file(),
        "{} does not exist: cargo build --all-targets, with the same profile",
        path.display()
    );
    path
}

fn output(program: &str, arguments: &[&str], object: &Path) -> String {
    let output = Command::new(program)
        .args(arguments)
        .arg(object)
        .env("LC_ALL", "C")
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Names of defined dynamic symbols, with `@VERSION` where they have one.
fn exports(object: &Path) -> BTreeSet<String> {
    output(
        "nm",
        &["--dynamic", "--defined-only", "--format=posix"],
        object,
    )
    .lines()
    .filter_map(|line| line.split_whitespace().next())
    .map(str::to_owned)
    .collect()
}

/// Values of the dynamic section's entries of one kind.
fn dynamic(object: &Path, kind: &str) -> Vec<String> {
    let tag = format!("({kind})");
    output("readelf", &["--dynamic", "--wide"], object)
        .lines()
        .filter(|line| line.contains(&tag))
        .map(|line| match (line.find('['), line.rfind(']')) {
            (Some(open), Some(close)) => line[open + 1..close].to_owned(),
            _ => line[line.find(&tag).unwrap() + tag.len()..]
                .trim()
                .to_owned(),
        })
        .collect()
}

fn listed(text: &str) -> BTreeSet<String> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

fn assert_exports(object: &Path, list: &str, text: &str) {
    let (found, expected) = (exports(object), listed(text));
    let more: Vec<_> = found.difference(&expected).collect();
    let fewer: Vec<_> = expected.difference(&found).collect();
    assert!(
        more.is_empty() && fewer.is_empty(),
        "{} and c_tests/{list} differ: exported but not listed {more:?}, listed but not exported {fewer:?}",
        object.display()
    );
}

fn assert_needs_only_the_system(object: &Path) {
    let needed = dynamic(object, "NEEDED");
    let foreign: Vec<_> = needed
        .iter()
        .filter(|name| !SYSTEM.contains(&name.as_str()))
        .collect();
    assert!(foreign.is_empty(), "{} needs {foreign:?}", object.display());
    assert!(
        dynamic(object, "RUNPATH").is_empty() && dynamic(object, "RPATH").is_empty(),
        "{} searches folders of the build machine",
        object.display()
    );
}

fn assert_never_unloaded(object: &Path) {
    let flags = dynamic(object, "FLAGS_1").join(" ");
    assert!(flags.contains("NODELETE"), "{}: {flags}", object.display());
}

#[test]
fn the_library_exports_its_list() {
    let text = include_str!("exports_tms_memcache.txt");
    assert_exports(&built(MEMCACHE), "exports_tms_memcache.txt", text);
    for name in listed(text) {
        assert!(
            name.starts_with("tms_") || name.starts_with("memcache_"),
            "{name}"
        );
    }
}

#[test]
fn the_preload_library_exports_its_list() {
    let text = include_str!("exports_tms_preload.txt");
    assert_exports(&built(PRELOAD), "exports_tms_preload.txt", text);
    let names = listed(text);
    // Hosts detect another family of devices by these names.
    assert!(!names.iter().any(|name| name.starts_with("tms_xpu_")));
    let library = listed(include_str!("exports_tms_memcache.txt"));
    assert!(library.is_subset(&names));
}

#[test]
fn both_need_only_the_system() {
    assert_needs_only_the_system(&built(MEMCACHE));
    assert_needs_only_the_system(&built(PRELOAD));
}

#[test]
fn both_stay_loaded() {
    assert_never_unloaded(&built(MEMCACHE));
    assert_never_unloaded(&built(PRELOAD));
}

#[test]
fn the_library_has_its_soname() {
    assert_eq!(
        dynamic(&built(MEMCACHE), "SONAME"),
        ["libtms_memcache.so.0"]
    );
}
