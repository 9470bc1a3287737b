//! One process, several copies of the library: preloaded, loaded by ctypes, linked. There is one
//! default saver and one set of thread state a process, in the copy that the loader lists first.
//! A later copy finds it and passes every stateful call on; the loader's order is the same for all,
//! so two copies that start at once agree.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

use crate::error::{Error, ErrorKind, Result};

/// The copy that owns the state, as seen from this one.
enum Owner {
    Me,
    /// A handle of the loader.
    Other(usize),
    /// Another copy came first, and its ABI is not ours.
    Mismatch(u32),
}

static OWNER: OnceLock<Owner> = OnceLock::new();

/// What a copy is recognised by.
const MARK: &CStr = c"tms_abi_version";
const MARK_TOO: &CStr = c"tms_saver_default";

unsafe extern "C" fn collect(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    names: *mut c_void,
) -> c_int {
    // SAFETY: the loader passes a valid entry, and `names` is the vector given to it below.
    let (info, names) = unsafe { (&*info, &mut *names.cast::<Vec<CString>>()) };
    if !info.dlpi_name.is_null() {
        // SAFETY: a NUL-terminated string of the loader.
        let name = unsafe { CStr::from_ptr(info.dlpi_name) };
        if !name.is_empty() {
            names.push(name.to_owned());
        }
    }
    0
}

/// The address at which the object that contains `symbol` is loaded.
fn base_of(symbol: *const c_void) -> usize {
    // SAFETY: plain data, filled by `dladdr`.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: any address may be asked for.
    match unsafe { libc::dladdr(symbol, &mut info) } {
        0 => 0,
        _ => info.dli_fbase as usize,
    }
}

fn find_owner() -> Owner {
    let mut names: Vec<CString> = Vec::new();
    // SAFETY: the callback matches the vector passed to it; nothing is loaded while it runs.
    unsafe { libc::dl_iterate_phdr(Some(collect), (&raw mut names).cast()) };
    let me = base_of(super::tms_abi_version as *const c_void);
    for name in names {
        // SAFETY: only looks at what is loaded.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_LAZY) };
        if handle.is_null() {
            continue;
        }
        // SAFETY: a valid handle and terminated names.
        let (mark, too) = unsafe {
            (
                libc::dlsym(handle, MARK.as_ptr()),
                libc::dlsym(handle, MARK_TOO.as_ptr()),
            )
        };
        if mark.is_null() || too.is_null() {
            // SAFETY: gives back the reference just taken.
            unsafe { libc::dlclose(handle) };
            continue;
        }
        if base_of(mark) == me {
            // SAFETY: as above.
            unsafe { libc::dlclose(handle) };
            return Owner::Me;
        }
        // SAFETY: every copy exports this function with this type.
        let abi = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> u32>(mark) }();
        if abi != super::TMS_ABI_VERSION {
            tracing::error!(
                "another copy of the library ({}) was loaded first and has ABI {abi}, this one has {}",
                name.to_string_lossy(),
                super::TMS_ABI_VERSION
            );
            return Owner::Mismatch(abi);
        }
        return Owner::Other(handle as usize);
    }
    // Linked into a program that exports nothing.
    Owner::Me
}

/// The function `name` of the copy that owns the state, `None` if that is this copy.
pub(super) fn owners(name: *const c_char) -> Result<Option<*mut c_void>> {
    let owner = OWNER.get().unwrap_or_else(|| {
        // Looked up outside of the cell: the loader's lock may be held by a thread that waits here.
        // Every thread finds the same.
        let found = find_owner();
        OWNER.get_or_init(|| found)
    });
    match owner {
        Owner::Me => Ok(None),
        Owner::Other(handle) => {
            // SAFETY: the handle is never closed.
            let symbol = unsafe { libc::dlsym(*handle as *mut c_void, name) };
            if symbol.is_null() {
                return Err(Error::new(
                    ErrorKind::Abi,
                    "the copy of the library loaded first lacks a function",
                ));
            }
            Ok(Some(symbol))
        }
        Owner::Mismatch(abi) => Err(Error::new(
            ErrorKind::Abi,
            format!(
                "another copy of the library was loaded first and has ABI version {abi}, this one has {}",
                super::TMS_ABI_VERSION
            ),
        )),
    }
}

/// Passes the call on if another copy owns the state. `else` is what to return when it cannot be.
macro_rules! forward {
    ($name:ident($($argument:expr),*) else $failed:expr) => {{
        const NAME: &[u8] = concat!(stringify!($name), "\0").as_bytes();
        match $crate::ffi::forward::owners(NAME.as_ptr().cast()) {
            Ok(None) => {}
            Ok(Some(symbol)) => {
                #[allow(unused_unsafe)]
                // SAFETY: the same function of a copy with the same ABI version.
                unsafe {
                    let mut own = $name as unsafe extern "C" fn($($crate::ffi::forward::any!($argument)),*) -> _;
                    std::ptr::copy_nonoverlapping(
                        (&raw const symbol).cast::<u8>(),
                        (&raw mut own).cast::<u8>(),
                        size_of_val(&own),
                    );
                    return own($($argument),*);
                }
            }
            Err(error) => {
                $crate::ffi::fence::fail(&error);
                return $failed(&error);
            }
        }
    }};
    ($name:ident($($argument:expr),*)) => {
        forward!($name($($argument),*) else |error: &$crate::error::Error| error.code())
    };
}

/// A type to be inferred, for each argument.
macro_rules! any {
    ($argument:expr) => {
        _
    };
}

pub(super) use {any, forward};
