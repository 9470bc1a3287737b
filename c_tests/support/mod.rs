//! What several test programs share: patterns, and the control functions of the software driver.
#![allow(dead_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use tms_memcache::{Region, Saver};

/// Bytes that tell position and seed apart.
pub fn pattern(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(bytes);
    out
}

/// An allocation with the pattern of `seed` in it.
pub fn filled(saver: &Saver, device: u32, bytes: usize, seed: u64, region: &Region) -> u64 {
    let address = saver.malloc(bytes as u64, Some(device), region).unwrap();
    saver.write(address, &pattern(bytes, seed)).unwrap();
    address
}

pub fn check(saver: &Saver, address: u64, bytes: usize, seed: u64) {
    let mut got = vec![0; bytes];
    saver.read(address, &mut got).unwrap();
    assert!(
        got == pattern(bytes, seed),
        "contents of {address:#x} differ"
    );
}

/// Whether CUDA tests run: against the software driver, or a real one where the test can.
pub fn cuda_selected() -> bool {
    std::env::var("TMS_TEST_CUDA").is_ok_and(|value| value == "1")
}

/// The control functions of the software driver, `None` with a real driver or none.
pub struct FakeCuda {
    handle: *mut c_void,
}

// SAFETY: a handle of the loader is valid on every thread.
unsafe impl Send for FakeCuda {}
// SAFETY: as above; the functions are thread-safe.
unsafe impl Sync for FakeCuda {}

macro_rules! controls {
    ($($name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        impl FakeCuda {
            $(pub fn $name(&self, $($argument: $type),*) $(-> $result)? {
                let symbol = self.symbol(concat!("fakecuda_", stringify!($name)));
                // SAFETY: the type is that of fakecuda.h.
                unsafe {
                    let function: unsafe extern "C" fn($($type),*) $(-> $result)? =
                        std::mem::transmute(symbol);
                    function($($argument),*)
                }
            })*
        }
    };
}

controls! {
    reset_faults();
    fail_any(nth: u64, code: c_int, repeat: c_int);
    fail_any_effect(nth: u64, code: c_int);
    count() -> u64;
    reset_count();
    live_handles(device: c_int) -> u64;
    live_bytes(device: c_int) -> u64;
    reserved_bytes() -> u64;
    mapped_bytes(device: c_int) -> u64;
    registered_bytes() -> u64;
    live_streams() -> u64;
    live_events() -> u64;
    pending_work() -> u64;
    hold_streams(on: c_int);
    set_late(on: c_int);
    set_host_unreadable(on: c_int);
    set_memory(device: c_int, bytes: u64);
    set_external_use(device: c_int, bytes: u64);
}

impl FakeCuda {
    pub fn loaded() -> Option<FakeCuda> {
        if !cuda_selected() {
            return None;
        }
        // SAFETY: loads a library by name, and looks a function up.
        unsafe {
            let handle = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
            if handle.is_null() || libc::dlsym(handle, c"fakecuda_count".as_ptr()).is_null() {
                return None;
            }
            Some(FakeCuda { handle })
        }
    }

    /// A function of the driver itself.
    ///
    /// # Safety
    /// `F` must be the type of the function.
    pub unsafe fn entry<F: Copy>(&self, name: &str) -> F {
        let symbol = self.symbol(name);
        assert_eq!(size_of::<F>(), size_of_val(&symbol));
        // SAFETY: a function pointer of the type that the caller promises.
        unsafe { std::mem::transmute_copy(&symbol) }
    }

    fn symbol(&self, name: &str) -> *mut c_void {
        let name = CString::new(name).unwrap();
        // SAFETY: a valid handle and a terminated name.
        let symbol = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        assert!(!symbol.is_null(), "{name:?}");
        symbol
    }

    pub fn fail(&self, function: &str, nth: u64, code: i32, repeat: i32) {
        let function = CString::new(function).unwrap();
        // SAFETY: the type is that of fakecuda.h.
        unsafe {
            let call: unsafe extern "C" fn(*const c_char, u64, c_int, c_int) =
                std::mem::transmute(self.symbol("fakecuda_fail"));
            call(function.as_ptr(), nth, code, repeat);
        }
    }

    pub fn call_name(&self, nth: u64) -> String {
        // SAFETY: the type is that of fakecuda.h; the result is NULL or a static string.
        unsafe {
            let call: unsafe extern "C" fn(u64) -> *const c_char =
                std::mem::transmute(self.symbol("fakecuda_call_name"));
            let name = call(nth);
            if name.is_null() {
                return "?".to_string();
            }
            CStr::from_ptr(name).to_string_lossy().into_owned()
        }
    }

    /// Whether device memory, as the device sees it, holds `expected`; without a driver call.
    pub fn holds(&self, address: u64, expected: &[u8]) -> bool {
        // In parts that stay in the processor's cache: fault tests look at everything very often.
        const PART: usize = 128 << 10;
        let mut part = vec![0; PART.min(expected.len())];
        expected.chunks(PART).enumerate().all(|(index, expected)| {
            let part = &mut part[..expected.len()];
            self.peek_into(address + (index * PART) as u64, part);
            part == expected
        })
    }

    /// Device memory as the device sees it, without a driver call.
    pub fn peek(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0u8; bytes];
        self.peek_into(address, &mut out);
        out
    }

    fn peek_into(&self, address: u64, out: &mut [u8]) {
        // SAFETY: the type is that of fakecuda.h and the buffer is as large as it says.
        unsafe {
            let call: unsafe extern "C" fn(*const c_void, *mut c_void, usize) -> c_int =
                std::mem::transmute(self.symbol("fakecuda_peek"));
            assert_eq!(
                call(address as *const c_void, out.as_mut_ptr().cast(), out.len()),
                0
            );
        }
    }
}
