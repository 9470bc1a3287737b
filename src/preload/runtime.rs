//! The CUDA runtime that the process really uses: where it is, and calls into it.
//!
//! Nothing here decides who serves an allocation; that is `lib.rs`. A runtime that is linked
//! statically has no dynamic symbols and cannot be found.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_int, c_uint, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

type Malloc = unsafe extern "C" fn(*mut *mut c_void, usize) -> c_int;
type Free = unsafe extern "C" fn(*mut c_void) -> c_int;
type GetDevice = unsafe extern "C" fn(*mut c_int) -> c_int;
type GetLastError = unsafe extern "C" fn() -> c_int;
type HostGetFlags = unsafe extern "C" fn(*mut c_uint, *mut c_void) -> c_int;

/// Newest first, as PyTorch's own search does. The names are sonames: they match a library that
/// was opened by any path.
const SONAMES: [&CStr; 3] = [c"libcudart.so.13", c"libcudart.so.12", c"libcudart.so.11.0"];

/// What the file name of a runtime contains when none of [`SONAMES`] matches.
const FILE_NAME: &str = "libcudart";

static FOUND: AtomicPtr<Runtime> = AtomicPtr::new(ptr::null_mut());
static DRIVER_LOADED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static SEARCHING: Cell<bool> = const { Cell::new(false) };
}

/// Functions of the real runtime. Its library is never closed.
pub struct Runtime {
    malloc: Malloc,
    free: Free,
    get_device: Option<GetDevice>,
    get_last_error: Option<GetLastError>,
    host_get_flags: Option<HostGetFlags>,
}

/// Where symbols are looked up: a handle of `dlopen`, or `RTLD_NEXT`.
#[derive(Clone, Copy)]
struct Scope(*mut c_void);

impl Runtime {
    /// The runtime among the libraries that are loaded now. Only success is remembered, because
    /// one may be loaded later. `None` too while this very thread is searching.
    pub fn find() -> Option<&'static Runtime> {
        Self::remembered().or_else(|| Self::search(Self::among_loaded))
    }

    /// Loads a runtime from the system's search path. For when [`Self::find`] found none.
    pub fn load() -> Option<&'static Runtime> {
        Self::search(|| open_first(&SONAMES, libc::RTLD_LAZY))
    }

    fn remembered() -> Option<&'static Runtime> {
        // SAFETY: the pointer is NULL or comes from `Box::leak` in `search`.
        unsafe { FOUND.load(Ordering::Acquire).as_ref() }
    }

    fn search(source: impl Fn() -> Option<Runtime>) -> Option<&'static Runtime> {
        if SEARCHING.replace(true) {
            return None;
        }
        let found = source();
        SEARCHING.set(false);
        let fresh = Box::leak(Box::new(found?));
        // Two threads may search at once; the first answer stays, the other is a few lost bytes.
        let _ = FOUND.compare_exchange(ptr::null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire);
        Self::remembered()
    }

    fn among_loaded() -> Option<Runtime> {
        Self::from_scope(Scope(libc::RTLD_NEXT))
            .or_else(|| open_first(&SONAMES, libc::RTLD_LAZY | libc::RTLD_NOLOAD))
            .or_else(|| {
                let paths = loaded_paths();
                open_first(&paths, libc::RTLD_LAZY | libc::RTLD_NOLOAD)
            })
    }

    fn from_scope(scope: Scope) -> Option<Runtime> {
        let malloc = scope.symbol(c"cudaMalloc")?;
        let free = scope.symbol(c"cudaFree")?;
        // SAFETY: these are the functions of that name of a CUDA runtime, whose C signatures have
        // been the same since its first release; `Option<fn>` of a NULL pointer is `None`.
        unsafe {
            Some(Runtime {
                malloc: std::mem::transmute::<*mut c_void, Malloc>(malloc),
                free: std::mem::transmute::<*mut c_void, Free>(free),
                get_device: std::mem::transmute::<*mut c_void, Option<GetDevice>>(
                    scope.symbol_or_null(c"cudaGetDevice"),
                ),
                get_last_error: std::mem::transmute::<*mut c_void, Option<GetLastError>>(
                    scope.symbol_or_null(c"cudaGetLastError"),
                ),
                host_get_flags: std::mem::transmute::<*mut c_void, Option<HostGetFlags>>(
                    scope.symbol_or_null(c"cudaHostGetFlags"),
                ),
            })
        }
    }

    /// # Safety
    /// As `cudaMalloc`: `out` is NULL or valid for writing a pointer.
    pub unsafe fn malloc(&self, out: *mut *mut c_void, bytes: usize) -> c_int {
        // SAFETY: passed on as promised by the caller.
        unsafe { (self.malloc)(out, bytes) }
    }

    /// # Safety
    /// As `cudaFree`.
    pub unsafe fn free(&self, pointer: *mut c_void) -> c_int {
        // SAFETY: passed on as promised by the caller.
        unsafe { (self.free)(pointer) }
    }

    /// The calling thread's current device, `None` where the runtime has no such function.
    pub fn current_device(&self) -> Option<Result<u32, c_int>> {
        let get_device = self.get_device?;
        let mut device: c_int = 0;
        // SAFETY: the out-parameter is a live integer.
        let code = unsafe { get_device(&mut device) };
        Some(match u32::try_from(device) {
            Ok(device) if code == 0 => Ok(device),
            Ok(_) => Err(code),
            Err(_) => Err(crate::code::UNKNOWN),
        })
    }

    /// Returns and clears the thread's last error.
    pub fn take_last_error(&self) -> c_int {
        // SAFETY: the function takes nothing.
        self.get_last_error.map_or(0, |get| unsafe { get() })
    }

    /// # Safety
    /// As `cudaHostGetFlags`: `flags` is NULL or valid for writing.
    pub unsafe fn host_flags(&self, flags: *mut c_uint, pointer: *mut c_void) -> Option<c_int> {
        let host_get_flags = self.host_get_flags?;
        // SAFETY: passed on as promised by the caller.
        Some(unsafe { host_get_flags(flags, pointer) })
    }
}

impl Scope {
    /// A symbol, unless it is this library's own.
    fn symbol(self, name: &CStr) -> Option<*mut c_void> {
        let address = self.symbol_or_null(name);
        (!address.is_null()).then_some(address)
    }

    fn symbol_or_null(self, name: &CStr) -> *mut c_void {
        // SAFETY: the scope is RTLD_NEXT or a handle that is never closed; the name is terminated.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        if address.is_null() || object_of(address) == object_of(Runtime::find as *mut c_void) {
            return ptr::null_mut();
        }
        address
    }
}

/// Load address of the object that contains `address`.
fn object_of(address: *mut c_void) -> Option<usize> {
    // SAFETY: all-zero bytes are a valid `Dl_info`, which dladdr fills.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: any address may be asked for; the out-parameter is live.
    let known = unsafe { libc::dladdr(address, &mut info) };
    (known != 0).then_some(info.dli_fbase as usize)
}

/// The first of `names` that opens with `flags` and is a runtime.
fn open_first<N: AsRef<CStr>>(names: &[N], flags: c_int) -> Option<Runtime> {
    names.iter().find_map(|name| {
        // SAFETY: the name is terminated. The handle is kept, so the library stays.
        let handle = unsafe { libc::dlopen(name.as_ref().as_ptr(), flags | libc::RTLD_LOCAL) };
        if handle.is_null() {
            return None;
        }
        Runtime::from_scope(Scope(handle))
    })
}

/// Paths of loaded objects that are runtimes by their file name.
fn loaded_paths() -> Vec<CString> {
    unsafe extern "C" fn collect(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        paths: *mut c_void,
    ) -> c_int {
        // SAFETY: the loader passes a valid record and the pointer that we gave it.
        let (name, paths) = unsafe { ((*info).dlpi_name, &mut *paths.cast::<Vec<CString>>()) };
        if name.is_null() {
            return 0;
        }
        // SAFETY: object names are terminated and live during the callback.
        let name = unsafe { CStr::from_ptr(name) };
        let file = name.to_bytes().rsplit(|byte| *byte == b'/').next();
        let wanted = FILE_NAME.as_bytes();
        if file.is_some_and(|file| file.windows(wanted.len()).any(|part| part == wanted)) {
            paths.push(name.to_owned());
        }
        0
    }
    let mut paths: Vec<CString> = Vec::new();
    // SAFETY: the callback has the expected signature and gets a pointer to a live vector.
    unsafe { libc::dl_iterate_phdr(Some(collect), (&raw mut paths).cast()) };
    paths
}

/// Whether a CUDA driver library can be loaded. Says nothing about whether it works.
pub fn driver_can_be_loaded() -> bool {
    if DRIVER_LOADED.load(Ordering::Acquire) {
        return true;
    }
    let loaded = [c"libcuda.so.1", c"libcuda.so"].iter().any(|name| {
        // SAFETY: the name is terminated. The handle is kept: drivers must not be unloaded.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
        !handle.is_null()
    });
    DRIVER_LOADED.fetch_or(loaded, Ordering::AcqRel);
    loaded
}
