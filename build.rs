//! Generates the C headers from `src/ffi` and names the shared objects for the linker.

use std::path::{Path, PathBuf};
use std::{env, fs};

use cbindgen::{Braces, Builder, Config, DocumentationStyle, Language, Style};

/// The first part of each header: what holds for every function.
const TMS_PROSE: &str = include_str!("src/ffi/tms_prose.h");
const MEMCACHE_PROSE: &str = include_str!("src/ffi/memcache_prose.h");

fn config(guard: &str, prose: &str) -> Config {
    let mut config = Config {
        language: Language::C,
        cpp_compat: true,
        include_guard: Some(guard.to_string()),
        header: Some(prose.trim_end().to_string()),
        documentation_style: DocumentationStyle::Doxy,
        style: Style::Type,
        braces: Braces::SameLine,
        line_length: 96,
        tab_width: 4,
        sys_includes: vec!["stdbool.h".into(), "stddef.h".into(), "stdint.h".into()],
        no_includes: true,
        usize_is_size_t: true,
        ..Config::default()
    };
    config.function.must_use = None;
    config
}

fn generate(out: &Path, name: &str, config: Config, sources: &[&str]) {
    let mut builder = Builder::new().with_config(config);
    for source in sources {
        builder = builder.with_src(format!("src/ffi/{source}.rs"));
    }
    let bindings = match builder.generate() {
        Ok(bindings) => bindings,
        Err(error) => panic!("generating {name}: {error}"),
    };
    let generated = out.join(name);
    bindings.write_to_file(&generated);
    // The committed copy is only written when it differs, and never in a read-only checkout: a
    // test tells of the difference.
    let committed = Path::new("include").join(name);
    let (Ok(new), old) = (fs::read(&generated), fs::read(&committed).ok()) else {
        return;
    };
    if old.as_ref() != Some(&new) && fs::write(&committed, &new).is_err() {
        println!("cargo:warning=include/{name} differs from what src/ffi says");
    }
}

fn main() {
    println!("cargo:rerun-if-changed=src/ffi");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=include");
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    println!("cargo:rustc-env=TMS_HEADERS_OUT={}", out.display());
    generate(
        &out,
        "tms.h",
        config("TMS_H", TMS_PROSE),
        &[
            "status",
            "log",
            "device",
            "region",
            "options",
            "result",
            "op",
            "saver",
            "ordered",
            "pinned",
            "transfer",
            "copy",
            "copy_many",
            "torch",
            "shutdown",
        ],
    );
    generate(
        &out,
        "memcache.h",
        config("MEMCACHE_H", MEMCACHE_PROSE),
        &["memcache"],
    );
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libtms_memcache.so.0");
        // For the preload variant too, which is an example target: cargo has no key for a shared
        // object among the examples, and programs do not mind.
        // Never unloaded: threads, exit handlers and fork handlers point into the code.
        println!("cargo:rustc-link-arg=-Wl,-z,nodelete");
        // Two copies in one process must not bind to each other by accident.
        println!("cargo:rustc-link-arg=-Wl,-Bsymbolic");
    }
}
