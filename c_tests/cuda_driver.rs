//! How the CUDA platform meets a driver: none, a stub, an old one, one that lacks functions, one that
//! fails; and what it leaves behind on the threads of the host.
//!
//! What every device must do is in `device_conformance.rs`. These tests need fakecuda: set
//! `FAKECUDA_DIR` to a folder that `fakecuda/build.sh` made. Each runs in a process of its own,
//! because a process keeps the driver that it found first.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::ptr;
use std::sync::{Arc, OnceLock};

use tms_memcache::device::cuda::{CudaDevice, CudaPlatform, DriverTable};
use tms_memcache::device::fingerprint::{Block, Key, Print};
use tms_memcache::device::{
    self, CreateOptions, Device, DeviceKind, Direction, Piece, Pitched, Place, Platform, Stream,
};
use tms_memcache::error::{Error, ErrorKind, Result};

const MIB: u64 = 1 << 20;
const UNKNOWN: c_int = 12_345;

/// Set in a process started by [`child`].
const CHILD: &str = "TMS_CUDA_DRIVER_CHILD";

/// Runs `body` in a process that finds its driver in `library`.
fn child(test: &str, library: Option<PathBuf>, environment: &[(&str, &str)], body: fn()) {
    if std::env::var_os(CHILD).is_some() {
        return body();
    }
    let Some(library) = library else {
        println!("{test}: skipped, FAKECUDA_DIR is not set");
        return;
    };
    let output = rerun(test, &library, environment);
    // A name that matches no test succeeds too.
    let ran = String::from_utf8_lossy(&output.stdout).contains("running 1 test");
    assert!(ran && output.status.success(), "{}", readable(&output));
}

fn rerun(test: &str, library: &Path, environment: &[(&str, &str)]) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .env("LD_LIBRARY_PATH", library)
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

fn readable(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    format!("{}\n{out}\n{err}", output.status)
}

fn whole() -> Option<PathBuf> {
    std::env::var_os("FAKECUDA_DIR").map(PathBuf::from)
}

/// fakecuda built with `arguments`.
fn variant(name: &str, arguments: &[&str]) -> Option<PathBuf> {
    whole()?;
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fakecuda-{name}"));
    if std::env::var_os(CHILD).is_none() {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("c_tests/fakecuda/build.sh");
        let status = Command::new(script).arg(&folder).args(arguments).status();
        assert!(status.unwrap().success());
    }
    Some(folder)
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

/// Opening fails with that kind and a message that contains `text`.
fn opening_fails(wanted: ErrorKind, text: &str) {
    let error = CudaPlatform::open().unwrap_err();
    assert_eq!(error.kind(), wanted, "{error}");
    assert!(error.to_string().contains(text), "{error}");
    let chosen = device::open("auto").map(|platform| platform.kind());
    match wanted {
        ErrorKind::NoDevice => assert_eq!(chosen.unwrap(), DeviceKind::Host),
        _ => assert_eq!(kind(chosen), wanted),
    }
}

/// The functions of fakecuda, and those of the driver that only a host uses.
struct Fake(*mut c_void);

type Code = c_int;

impl Fake {
    fn find() -> Fake {
        // SAFETY: a constant string.
        let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
        assert!(!library.is_null());
        Fake(library)
    }

    /// # Safety
    /// `F` is the type of the function `name`.
    unsafe fn function<F: Copy>(&self, name: &CStr) -> F {
        // SAFETY: the library is open.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        assert!(!address.is_null(), "{name:?}");
        assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
        // SAFETY: by this function's contract.
        unsafe { std::mem::transmute_copy(&address) }
    }

    fn fail(&self, function: &str, nth: u64, code: Code, repeat: c_int) {
        type F = unsafe extern "C" fn(*const c_char, u64, c_int, c_int);
        let name = CString::new(function).unwrap();
        // SAFETY: as declared in fakecuda.h.
        unsafe { self.function::<F>(c"fakecuda_fail")(name.as_ptr(), nth, code, repeat) }
    }

    fn fail_any(&self, nth: u64, code: Code, repeat: c_int) {
        type F = unsafe extern "C" fn(u64, c_int, c_int);
        // SAFETY: as declared in fakecuda.h.
        unsafe { self.function::<F>(c"fakecuda_fail_any")(nth, code, repeat) }
    }

    fn lose_device(&self, nth: u64, code: Code) {
        type F = unsafe extern "C" fn(u64, c_int);
        // SAFETY: as declared in fakecuda.h.
        unsafe { self.function::<F>(c"fakecuda_fail_any_effect")(nth, code) }
    }

    fn reset(&self) {
        type F = unsafe extern "C" fn();
        // SAFETY: as declared in fakecuda.h.
        unsafe {
            self.function::<F>(c"fakecuda_reset_faults")();
            self.function::<F>(c"fakecuda_reset_count")();
        }
    }

    fn count(&self) -> u64 {
        type F = unsafe extern "C" fn() -> u64;
        // SAFETY: as declared in fakecuda.h.
        unsafe { self.function::<F>(c"fakecuda_count")() }
    }

    fn count_of(&self, function: &CStr) -> u64 {
        type F = unsafe extern "C" fn(*const c_char) -> u64;
        // SAFETY: as declared in fakecuda.h.
        unsafe { self.function::<F>(c"fakecuda_count_of")(function.as_ptr()) }
    }

    fn primary_references(&self, device: c_int) -> u64 {
        type F = unsafe extern "C" fn(c_int) -> u64;
        // SAFETY: as declared in fakecuda.h.
        unsafe { self.function::<F>(c"fakecuda_primary_refs")(device) }
    }

    fn live_modules(&self) -> u64 {
        type F = unsafe extern "C" fn() -> u64;
        // SAFETY: as declared in fakecuda.h.
        unsafe { self.function::<F>(c"fakecuda_live_modules")() }
    }

    /// What of a thread the library must not change: its current context and capture mode.
    fn thread_state(&self) -> (usize, c_int) {
        type Get = unsafe extern "C" fn(*mut *mut c_void) -> Code;
        let mut context = ptr::null_mut();
        // SAFETY: as declared in driver.h.
        let code = unsafe { self.function::<Get>(c"cuCtxGetCurrent")(&mut context) };
        assert_eq!(code, 0);
        let mode = self.exchange_mode(0);
        self.exchange_mode(mode);
        (context.addr(), mode)
    }

    fn exchange_mode(&self, mut mode: c_int) -> c_int {
        type Exchange = unsafe extern "C" fn(*mut c_int) -> Code;
        let name = c"cuThreadExchangeStreamCaptureMode";
        // SAFETY: as declared in driver.h.
        assert_eq!(unsafe { self.function::<Exchange>(name)(&mut mode) }, 0);
        mode
    }

    /// Makes the primary context of `device` current, as the runtime does for a host.
    fn set_current(&self, device: Option<c_int>) {
        type Retain = unsafe extern "C" fn(*mut *mut c_void, c_int) -> Code;
        type Set = unsafe extern "C" fn(*mut c_void) -> Code;
        let mut context = ptr::null_mut();
        // SAFETY: as declared in driver.h.
        unsafe {
            if let Some(device) = device {
                let retain = self.function::<Retain>(c"cuDevicePrimaryCtxRetain");
                assert_eq!(retain(&mut context, device), 0);
            }
            assert_eq!(self.function::<Set>(c"cuCtxSetCurrent")(context), 0);
        }
    }

    fn stream(&self, flags: c_uint) -> *mut c_void {
        type Create = unsafe extern "C" fn(*mut *mut c_void, c_uint) -> Code;
        let mut stream = ptr::null_mut();
        // SAFETY: as declared in driver.h.
        let code = unsafe { self.function::<Create>(c"cuStreamCreate")(&mut stream, flags) };
        assert_eq!(code, 0);
        stream
    }

    fn begin_capture(&self, stream: *mut c_void) {
        type Begin = unsafe extern "C" fn(*mut c_void, c_int) -> Code;
        let (name, global) = (c"cuStreamBeginCapture_v2", 0);
        // SAFETY: as declared in driver.h.
        assert_eq!(unsafe { self.function::<Begin>(name)(stream, global) }, 0);
    }

    fn end_capture(&self, stream: *mut c_void) -> Code {
        type End = unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> Code;
        let mut graph = ptr::null_mut();
        // SAFETY: as declared in driver.h.
        unsafe { self.function::<End>(c"cuStreamEndCapture")(stream, &mut graph) }
    }
}

/// Page-aligned host memory for the life of the process.
fn pages(bytes: usize) -> *mut u8 {
    let layout = std::alloc::Layout::from_size_align(bytes, 4096).unwrap();
    // SAFETY: the size is not 0.
    let pointer = unsafe { std::alloc::alloc_zeroed(layout) };
    assert!(!pointer.is_null());
    pointer
}

/// Makes, uses and frees one of everything. The calls go on after a failure, so that a run with one
/// failing call still frees what it made; the first error is returned.
fn use_everything(device: &CudaDevice, host: *mut u8) -> Result<()> {
    let mut first: Option<Error> = None;
    let mut note = |result: Result<()>| {
        if let Err(error) = result {
            first.get_or_insert(error);
        }
    };
    let bytes = 2 * MIB;
    note(device.memory().map(drop));
    // SAFETY: `host` lives as long as the process.
    note(unsafe { device.register_host(host, bytes as usize) });
    note(device.host_flags(host).map(drop));
    match device.reserve(bytes) {
        Ok(address) => {
            let options = CreateOptions { exportable: true };
            match device.create(bytes, options) {
                Ok(physical) => {
                    note(device.map(address, bytes, physical));
                    note(device.set_access(address, bytes, &device.info().peers));
                    match device.export(physical) {
                        Ok(descriptor) => {
                            use std::os::fd::AsFd;
                            match device.import(descriptor.as_fd(), bytes) {
                                Ok(imported) => note(device.release(imported)),
                                Err(error) => note(Err(error)),
                            }
                        }
                        Err(error) => note(Err(error)),
                    }
                    note(queue_work(device, address, host));
                    note(device.synchronize());
                    note(device.unmap(address, bytes));
                    note(device.release(physical));
                }
                Err(error) => note(Err(error)),
            }
            note(device.unreserve(address, bytes));
        }
        Err(error) => note(Err(error)),
    }
    // SAFETY: all work was waited for, or failed.
    note(unsafe { device.unregister_host(host) });
    first.map_or(Ok(()), Err)
}

fn queue_work(device: &CudaDevice, address: u64, host: *mut u8) -> Result<()> {
    let stream = device.stream_create()?;
    let done = device.event_create().and_then(|event| {
        let host = host.expose_provenance() as u64;
        let copy = |to, from, direction| {
            // SAFETY: the host memory lives as long as the process, and only streams use it.
            unsafe { device.copy(to, from, 4096, direction, stream) }
        };
        let done = device
            .fill(address, 1, 4096, stream)
            .and_then(|()| copy(address, host, Direction::ToDevice))
            .and_then(|()| copy(address + 4096, address, Direction::OnDevice))
            .and_then(|()| copy(host, address, Direction::ToHost))
            .and_then(|()| queue_larger_work(device, stream, address, host))
            .and_then(|()| device.event_record(event, stream))
            .and_then(|()| device.stream_wait(stream, event))
            .and_then(|()| device.event_query(event).map(drop))
            .and_then(|()| device.event_synchronize(event))
            .and_then(|()| device.is_capturing(stream.0).map(drop))
            .and_then(|()| device.stream_synchronize(stream));
        done.and(device.event_destroy(event))
    });
    let destroyed = device.stream_destroy(stream);
    done.and(destroyed)
}

/// Everything that copies more than one range, as far as the device can. `host` is registered.
fn queue_larger_work(device: &CudaDevice, stream: Stream, address: u64, host: u64) -> Result<()> {
    let pieces = [1, 2, 0, 3].map(|at| Piece {
        destination: address + at * 8192,
        source: host + at * 4096,
        bytes: at * 100,
    });
    let block = Block {
        address,
        bytes: 4096,
    };
    let (list, blocks, prints) = (
        host + (1 << 20),
        host + (1 << 20) + 4096,
        host + (1 << 20) + 8192,
    );
    let pitched = Pitched {
        destination: address + MIB,
        destination_pitch: 512,
        source: host,
        source_pitch: 100,
        width: 100,
        height: 5,
    };
    let at = ptr::with_exposed_provenance_mut::<c_void>;
    // SAFETY: all of it lies in `host` and in mapped memory, which outlive the work; only streams
    // use it meanwhile, and they only read the lists.
    unsafe {
        at(list as usize).cast::<[Piece; 4]>().write(pieces);
        at(blocks as usize).cast::<Block>().write(block);
        if device.has_kernels() {
            device.copy_pieces(at(list as usize).cast(), 4, 8, stream)?;
            let (blocks, prints) = (at(blocks as usize).cast(), at(prints as usize).cast());
            device.fingerprint(&Key::new()?, blocks, prints, 1, stream)?;
        }
        if device.has_batch() {
            device.copy_batch(&pieces, Direction::ToDevice, stream)?;
        }
        device.copy_pitched(&pitched, Direction::ToDevice, stream)?;
        if let Some(&peer) = device.info().peers.first() {
            device.copy_to_peer(address + 4096, peer, address, 100, stream)?;
        }
    }
    Ok(())
}

#[test]
fn without_a_driver_there_is_no_device() {
    let empty = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no-driver");
    std::fs::create_dir_all(&empty).unwrap();
    let name = "without_a_driver_there_is_no_device";
    child(name, Some(empty), &[], || {
        // SAFETY: a constant string.
        if !unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) }.is_null() {
            println!("skipped: this machine has a driver");
            return;
        }
        opening_fails(ErrorKind::NoDevice, "libcuda.so.1");
        assert!(DriverTable::loaded().is_none());
    });
}

#[test]
fn a_stub_is_no_device() {
    child(
        "a_stub_is_no_device",
        variant("stub", &["--stub"]),
        &[],
        || opening_fails(ErrorKind::NoDevice, "code 34"),
    );
}

#[test]
fn a_driver_without_devices_is_no_device() {
    child(
        "a_driver_without_devices_is_no_device",
        whole(),
        &[("FAKECUDA_DEVICES", "0")],
        || opening_fails(ErrorKind::NoDevice, "CUDA_ERROR_NO_DEVICE (code 100"),
    );
}

#[test]
fn a_driver_that_is_too_old_is_no_device() {
    child(
        "a_driver_that_is_too_old_is_no_device",
        whole(),
        &[("FAKECUDA_VERSION", "11080")],
        || opening_fails(ErrorKind::NoDevice, "11.8"),
    );
}

#[test]
fn a_driver_that_fails_is_an_error() {
    child(
        "a_driver_that_fails_is_an_error",
        whole(),
        &[(
            "FAKECUDA_FAIL",
            "cuInit:1:803,cuInit:2:803,cuInit:3:700,cuInit:4:700",
        )],
        || {
            opening_fails(ErrorKind::Device, "code 803");
            opening_fails(ErrorKind::Device, "code 700");
            let fake = Fake::find();
            for function in ["cuInit", "cuDriverGetVersion", "cuDeviceGetCount"] {
                for code in [2, UNKNOWN, -7] {
                    fake.reset();
                    fake.fail(function, 1, code, -1);
                    opening_fails(ErrorKind::Device, &format!("{function}: "));
                }
            }
            fake.reset();
            CudaPlatform::open().unwrap();
        },
    );
}

#[test]
fn a_missing_required_function_is_named() {
    child(
        "a_missing_required_function_is_named",
        variant("old", &["--without", "cuMemMap,cuMemUnmap"]),
        &[],
        || opening_fails(ErrorKind::NoDevice, "lacks cuMemMap, cuMemUnmap"),
    );
}

const OPTIONAL: [&str; 9] = [
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceCanAccessPeer",
    "cuThreadExchangeStreamCaptureMode",
    "cuStreamIsCapturing",
    "cuMemExportToShareableHandle",
    "cuMemImportFromShareableHandle",
    "cuMemHostGetFlags",
    "cuMemcpyBatchAsync",
];

#[test]
fn missing_optional_functions_turn_features_off() {
    child(
        "missing_optional_functions_turn_features_off",
        variant("poor", &["--without", &OPTIONAL.join(",")]),
        &[("FAKECUDA_DEVICES", "2")],
        || {
            let platform = CudaPlatform::open().unwrap();
            assert_eq!(platform.missing_symbols(), OPTIONAL);
            let device = platform.cuda_device(0).unwrap();
            assert!(!device.info().can_export);
            assert!(device.info().peers.is_empty());
            assert!(!device.is_capturing(0).unwrap());
            let host = pages(2 * MIB as usize);
            let exportable = CreateOptions { exportable: true };
            assert_eq!(
                kind(device.create(2 * MIB, exportable)),
                ErrorKind::Unsupported
            );
            let physical = device.create(2 * MIB, CreateOptions::default()).unwrap();
            assert_eq!(kind(device.export(physical)), ErrorKind::Unsupported);
            assert_eq!(kind(device.host_flags(host)), ErrorKind::Unsupported);
            let address = device.reserve(2 * MIB).unwrap();
            device.map(address, 2 * MIB, physical).unwrap();
            device.set_access(address, 2 * MIB, &[]).unwrap();
            assert!(!device.has_batch());
            // SAFETY: nothing to copy.
            let batch = unsafe { device.copy_batch(&[], Direction::ToHost, Stream::of_host(2)) };
            assert_eq!(kind(batch), ErrorKind::Unsupported);
            // SAFETY: the memory lives as long as the process.
            unsafe { device.register_host(host, 2 * MIB as usize) }.unwrap();
            queue_work(&device, address, host).unwrap();
            device.synchronize().unwrap();
            let error = device.unreserve(address, 2 * MIB).unwrap_err();
            assert!(error.to_string().ends_with(": code 1"), "{error}");
        },
    );
}

#[test]
fn contexts_are_retained_on_demand_and_once() {
    child(
        "contexts_are_retained_on_demand_and_once",
        whole(),
        &[("FAKECUDA_DEVICES", "2")],
        || {
            let fake = Fake::find();
            let platform = CudaPlatform::open().unwrap();
            assert!(platform.missing_symbols().is_empty());
            assert_eq!(platform.device_count(), 2);
            assert!(platform.device_in_use(1).is_none());
            std::thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| platform.device(1).unwrap());
                }
            });
            assert_eq!(fake.primary_references(0), 0);
            assert_eq!(fake.primary_references(1), 1);
            let kept = platform.cuda_device(1).unwrap();
            assert!(Arc::ptr_eq(&kept, &platform.cuda_device(1).unwrap()));
            assert!(platform.device_in_use(1).is_some());
            assert!(platform.device_in_use(2).is_none());
            assert_eq!(kind(platform.device(2)), ErrorKind::InvalidArgument);
            drop(platform);
            assert_eq!(fake.primary_references(1), 1);
            drop(kept);
            assert_eq!(fake.primary_references(1), 0);
        },
    );
}

#[test]
fn opening_a_device_survives_every_failing_call() {
    child(
        "opening_a_device_survives_every_failing_call",
        whole(),
        &[("FAKECUDA_DEVICES", "3")],
        || {
            let fake = Fake::find();
            CudaPlatform::open().unwrap();
            fake.reset();
            CudaPlatform::open().unwrap().device(0).unwrap();
            let calls = fake.count();
            let before = fake.thread_state();
            for nth in 1..=calls {
                fake.reset();
                fake.fail_any(nth, UNKNOWN, 1);
                // The last calls restore, and are tried again.
                if let Err(error) = CudaPlatform::open().and_then(|all| all.device(0)) {
                    assert_eq!(error.kind(), ErrorKind::Device);
                    assert!(error.to_string().ends_with(": code 12345"), "{error}");
                }
                fake.reset();
                assert_eq!(fake.thread_state(), before, "call {nth} of {calls}");
            }
        },
    );
}

#[test]
fn kernels_that_do_not_load_are_off_and_the_rest_works() {
    child(
        "kernels_that_do_not_load_are_off_and_the_rest_works",
        whole(),
        &[("FAKECUDA_DEVICES", "2")],
        || {
            let fake = Fake::find();
            let host = pages(2 * MIB as usize);
            for (function, nth, code) in [
                ("cuModuleLoadData", 1, 222),
                ("cuModuleLoadData", 2, 218),
                ("cuModuleGetFunction", 1, 500),
                ("cuModuleGetFunction", 2, UNKNOWN),
            ] {
                fake.reset();
                fake.fail(function, nth, code, 1);
                let platform = CudaPlatform::open().unwrap();
                let device = platform.cuda_device(0).unwrap();
                assert!(!device.has_kernels(), "{function}");
                assert_eq!(fake.live_modules(), 0, "{function}");
                assert_eq!(platform.missing_symbols(), ["kernels"]);
                let (stream, at) = (Stream::of_host(2), host.cast_const());
                let key = Key::new().unwrap();
                // SAFETY: refused.
                let (copied, printed) = unsafe {
                    let prints = host.cast::<Print>();
                    (
                        device.copy_pieces(at.cast(), 1, 1, stream),
                        device.fingerprint(&key, at.cast(), prints, 1, stream),
                    )
                };
                assert_eq!(kind(copied), ErrorKind::Unsupported);
                assert_eq!(kind(printed), ErrorKind::Unsupported);
                use_everything(&device, host).unwrap();
                assert!(platform.cuda_device(1).unwrap().has_kernels());
                assert_eq!(fake.live_modules(), 2);
            }
            let platform = CudaPlatform::open().unwrap();
            assert!(platform.cuda_device(0).unwrap().has_kernels());
            assert!(platform.missing_symbols().is_empty());
            assert_eq!(fake.live_modules(), 2);
            drop(platform);
            assert_eq!(fake.live_modules(), 0);
        },
    );
}

#[test]
fn an_older_driver_reads_the_kernels() {
    child(
        "an_older_driver_reads_the_kernels",
        whole(),
        &[("FAKECUDA_VERSION", "12000")],
        || {
            let device = CudaPlatform::open().unwrap().cuda_device(0).unwrap();
            assert!(device.has_kernels());
        },
    );
}

#[test]
fn a_batch_names_the_piece_at_fault() {
    child("a_batch_names_the_piece_at_fault", whole(), &[], || {
        let fake = Fake::find();
        let device = CudaPlatform::open().unwrap().cuda_device(0).unwrap();
        let host = pages(2 * MIB as usize);
        // SAFETY: the memory lives as long as the process.
        unsafe { device.register_host(host, MIB as usize) }.unwrap();
        let address = device.reserve(2 * MIB).unwrap();
        let physical = device.create(2 * MIB, CreateOptions::default()).unwrap();
        device.map(address, 2 * MIB, physical).unwrap();
        device.set_access(address, 2 * MIB, &[]).unwrap();
        let stream = device.stream_create().unwrap();
        let source = host.expose_provenance() as u64;
        let mut pieces = [100, 0, 100, 100].map(|bytes| Piece {
            destination: address,
            source,
            bytes,
        });
        // Over the edge of the registration.
        pieces[2].source = source + MIB - 50;
        // SAFETY: the memory lives as long as the process.
        let batch = || unsafe { device.copy_batch(&pieces, Direction::ToDevice, stream) };
        let error = batch().unwrap_err().to_string();
        assert!(
            error.starts_with("pieces[2]: cuMemcpyBatchAsync(3 copies"),
            "{error}"
        );
        fake.fail("cuMemcpyBatchAsync", 1, UNKNOWN, 1);
        let error = batch().unwrap_err().to_string();
        assert!(error.starts_with("cuMemcpyBatchAsync(3 copies"), "{error}");
        device.stream_synchronize(stream).unwrap();
    });
}

#[test]
fn the_context_of_a_peer_is_retained_on_demand() {
    child(
        "the_context_of_a_peer_is_retained_on_demand",
        whole(),
        &[("FAKECUDA_DEVICES", "2")],
        || {
            let fake = Fake::find();
            let device = CudaPlatform::open().unwrap().cuda_device(0).unwrap();
            let address = device.reserve(2 * MIB).unwrap();
            let physical = device.create(2 * MIB, CreateOptions::default()).unwrap();
            device.map(address, 2 * MIB, physical).unwrap();
            device.set_access(address, 2 * MIB, &[1]).unwrap();
            let stream = device.stream_create().unwrap();
            let copy = |peer| {
                // SAFETY: device memory on both sides.
                unsafe { device.copy_to_peer(address + MIB, peer, address, 100, stream) }
            };
            assert_eq!(kind(copy(2)), ErrorKind::Unsupported);
            assert_eq!(fake.primary_references(1), 0);
            fake.fail("cuDevicePrimaryCtxRetain", 1, 2, 1);
            assert_eq!(kind(copy(1)), ErrorKind::OutOfDeviceMemory);
            assert_eq!(fake.primary_references(1), 0);
            for _ in 0..3 {
                copy(1).unwrap();
                assert_eq!(fake.primary_references(1), 1);
            }
            fake.fail("cuMemcpyPeerAsync", 1, UNKNOWN, 1);
            let error = copy(1).unwrap_err().to_string();
            assert!(error.starts_with("cuMemcpyPeerAsync(100 bytes"), "{error}");
            device.stream_synchronize(stream).unwrap();
            drop(device);
            assert_eq!(fake.primary_references(0), 0);
            assert_eq!(fake.primary_references(1), 0);
        },
    );
}

#[test]
fn classifying_an_address_is_one_call() {
    child("classifying_an_address_is_one_call", whole(), &[], || {
        let fake = Fake::find();
        let platform = CudaPlatform::open().unwrap();
        let host = pages(MIB as usize);
        let address = host.expose_provenance() as u64;
        let place = || platform.classify(address + 5).map(|range| range.place);
        fake.reset();
        assert_eq!(place().unwrap(), Place::Pageable);
        assert_eq!(fake.count(), 1);
        let device = platform.cuda_device(0).unwrap();
        // SAFETY: the memory lives as long as the process.
        unsafe { device.register_host(host, MIB as usize) }.unwrap();
        fake.reset();
        let range = platform.classify(address + 5).unwrap();
        assert_eq!(fake.count(), 1);
        assert_eq!(
            (range.place, range.start, range.bytes),
            (Place::Pinned, address, MIB)
        );
        assert_ne!(range.id, 0);

        // A driver that wants a context gets one.
        let before = fake.thread_state();
        fake.fail("cuPointerGetAttributes", 1, 201, 1);
        assert_eq!(place().unwrap(), Place::Pinned);
        fake.fail("cuPointerGetAttributes", 1, 201, 2);
        let error = place().unwrap_err().to_string();
        assert!(error.starts_with("cuPointerGetAttributes(0x"), "{error}");
        fake.fail("cuPointerGetAttributes", 1, UNKNOWN, 1);
        assert_eq!(kind(place()), ErrorKind::Device);
        assert_eq!(fake.thread_state(), before);
        assert_eq!(place().unwrap(), Place::Pinned);
    });
}

#[test]
fn every_larger_copy_says_what_failed() {
    child("every_larger_copy_says_what_failed", whole(), &[], || {
        let fake = Fake::find();
        let device = CudaPlatform::open().unwrap().cuda_device(0).unwrap();
        let host = pages(2 * MIB as usize);
        for (function, nth, text) in [
            (
                "cuLaunchKernel",
                1,
                "cuLaunchKernel(\"tms_copy_pieces\", 1 blocks",
            ),
            (
                "cuLaunchKernel",
                2,
                "cuLaunchKernel(\"tms_fingerprint\", 1 blocks",
            ),
            ("cuMemcpyBatchAsync", 1, "cuMemcpyBatchAsync(3 copies"),
            ("cuMemcpy2DAsync_v2", 1, "cuMemcpy2DAsync(ToDevice, Pitched"),
        ] {
            fake.reset();
            fake.fail(function, nth, 700, 1);
            let error = use_everything(&device, host).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DeviceLost);
            assert!(error.to_string().starts_with(text), "{error}");
        }
        fake.reset();
        use_everything(&device, host).unwrap();
    });
}

#[test]
fn the_thread_is_as_before_whatever_fails() {
    child(
        "the_thread_is_as_before_whatever_fails",
        whole(),
        &[("FAKECUDA_DEVICES", "2")],
        || {
            let fake = Fake::find();
            let platform = CudaPlatform::open().unwrap();
            let device = platform.cuda_device(0).unwrap();
            let host = pages(2 * MIB as usize);
            for current in [None, Some(0), Some(1)] {
                fake.set_current(current);
                assert_eq!(platform.current_device(), current.unwrap_or(0) as u32);
                for mode in [0, 1, 2] {
                    fake.exchange_mode(mode);
                    let before = fake.thread_state();
                    fake.reset();
                    use_everything(&device, host).unwrap();
                    let calls = fake.count();
                    assert_eq!(fake.thread_state(), before);
                    // Which call fails matters little to the mode.
                    let step = if mode == 0 { 1 } else { 7 };
                    for nth in (1..=calls).step_by(step) {
                        fake.reset();
                        fake.fail_any(nth, UNKNOWN, 1);
                        let result = use_everything(&device, host);
                        fake.reset();
                        let at = format!("{current:?}, mode {mode}, call {nth}: {result:?}");
                        assert_eq!(fake.thread_state(), before, "{at}");
                        if let Err(error) = result {
                            assert_eq!(error.kind(), ErrorKind::Device, "{at}");
                        }
                        // A failed registration or release is not repeated by the test.
                        // SAFETY: no work is queued.
                        let _ = unsafe { device.unregister_host(host) };
                    }
                }
                fake.exchange_mode(0);
            }
        },
    );
}

#[test]
fn a_driver_that_only_fails_gives_statuses() {
    child(
        "a_driver_that_only_fails_gives_statuses",
        whole(),
        &[],
        || {
            let fake = Fake::find();
            let platform = CudaPlatform::open().unwrap();
            let device = platform.cuda_device(0).unwrap();
            let host = pages(2 * MIB as usize);
            // The first use of a peer retains its context.
            use_everything(&device, host).unwrap();
            fake.reset();
            use_everything(&device, host).unwrap();
            let calls = fake.count();
            for nth in (1..=calls).step_by(3) {
                for code in [UNKNOWN, c_int::MIN, 2, 700, 908] {
                    fake.reset();
                    fake.fail_any(nth, code, -1);
                    // A thread that cannot be restored is not used again.
                    let result = std::thread::scope(|scope| {
                        let host = host.expose_provenance();
                        let device = &device;
                        let work =
                            move || use_everything(device, ptr::with_exposed_provenance_mut(host));
                        scope.spawn(work).join().unwrap()
                    });
                    fake.reset();
                    if nth < calls {
                        assert!(result.is_err(), "call {nth}, code {code}");
                    }
                    // SAFETY: no work is queued.
                    let _ = unsafe { device.unregister_host(host) };
                }
            }
        },
    );
}

#[test]
fn a_failed_pop_is_repeated_once() {
    child(
        "a_failed_pop_is_repeated_once",
        whole(),
        &[("FAKECUDA_DEVICES", "2")],
        || {
            let fake = Fake::find();
            let platform = CudaPlatform::open().unwrap();
            let device = platform.cuda_device(0).unwrap();
            fake.set_current(Some(1));
            let before = fake.thread_state();
            fake.reset();
            device.memory().unwrap();
            assert_eq!(fake.count_of(c"cuCtxPopCurrent_v2"), 1);
            fake.reset();
            fake.fail("cuCtxPopCurrent_v2", 1, 700, 1);
            device.memory().unwrap();
            assert_eq!(fake.count_of(c"cuCtxPopCurrent_v2"), 2);
            fake.reset();
            assert_eq!(fake.thread_state(), before);
        },
    );
}

#[test]
fn calls_inside_a_context_cost_no_switch() {
    child(
        "calls_inside_a_context_cost_no_switch",
        whole(),
        &[("FAKECUDA_DEVICES", "2")],
        || {
            let fake = Fake::find();
            let platform = CudaPlatform::open().unwrap();
            let (one, two) = (
                platform.cuda_device(0).unwrap(),
                platform.cuda_device(1).unwrap(),
            );
            let before = fake.thread_state();
            fake.reset();
            one.in_context(|| {
                let start = fake.count();
                for _ in 0..10 {
                    one.memory()?;
                }
                assert_eq!(fake.count() - start, 10);
                two.in_context(|| {
                    assert_eq!(platform.current_device(), 1);
                    one.in_context(|| {
                        assert_eq!(platform.current_device(), 0);
                        Ok(())
                    })?;
                    assert_eq!(platform.current_device(), 1);
                    Ok(())
                })?;
                assert_eq!(platform.current_device(), 0);
                Ok(())
            })
            .unwrap();
            assert_eq!(fake.thread_state(), before);

            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                one.in_context(|| -> Result<()> { panic!("in the host's code") })
            }));
            assert!(caught.is_err());
            assert_eq!(fake.thread_state(), before);
        },
    );
}

/// Asks the device when its thread ends.
struct AtThreadEnd(Arc<CudaDevice>, std::sync::mpsc::Sender<Result<u64>>);

impl Drop for AtThreadEnd {
    fn drop(&mut self) {
        let _ = self.1.send(self.0.memory().map(|memory| memory.total));
    }
}

#[test]
fn a_thread_that_ends_may_still_call() {
    child("a_thread_that_ends_may_still_call", whole(), &[], || {
        thread_local! {
            static LAST: std::cell::OnceCell<AtThreadEnd> = const { std::cell::OnceCell::new() };
        }
        let device = CudaPlatform::open().unwrap().cuda_device(0).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || LAST.with(|last| drop(last.set(AtThreadEnd(device, sender)))))
            .join()
            .unwrap();
        assert!(receiver.recv().unwrap().unwrap() > 0);
    });
}

#[test]
fn nothing_breaks_a_capture_of_the_host() {
    child(
        "nothing_breaks_a_capture_of_the_host",
        whole(),
        &[("FAKECUDA_DEVICES", "2")],
        || {
            let fake = Fake::find();
            let platform = CudaPlatform::open().unwrap();
            let device = platform.cuda_device(0).unwrap();
            let host = pages(2 * MIB as usize);
            fake.set_current(Some(0));
            let (blocking, other) = (fake.stream(0), fake.stream(1));

            fake.begin_capture(blocking);
            assert!(device.is_capturing(0).unwrap());
            assert!(
                device
                    .is_capturing(blocking.expose_provenance() as u64)
                    .unwrap()
            );
            assert!(
                !device
                    .is_capturing(other.expose_provenance() as u64)
                    .unwrap()
            );
            assert_eq!(kind(device.synchronize()), ErrorKind::Capture);
            // All but the synchronisation of the device, and the first use of another device.
            assert_eq!(kind(use_everything(&device, host)), ErrorKind::Capture);
            platform.device(1).unwrap().memory().unwrap();
            assert_eq!(fake.end_capture(blocking), 0);

            fake.begin_capture(other);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    device.memory().unwrap();
                    let event = device.event_create().unwrap();
                    assert!(device.event_query(event).unwrap());
                    device.event_destroy(event).unwrap();
                });
            });
            assert_eq!(fake.end_capture(other), 0);

            fake.begin_capture(other);
            assert_eq!(kind(device.synchronize()), ErrorKind::Capture);
        },
    );
}

#[test]
fn a_sticky_error_loses_the_device() {
    child("a_sticky_error_loses_the_device", whole(), &[], || {
        let fake = Fake::find();
        let device = CudaPlatform::open().unwrap().cuda_device(0).unwrap();
        let before = fake.thread_state();
        let nth = {
            fake.reset();
            device.memory().unwrap();
            let calls = 1..=fake.count();
            let name = |nth: u64| {
                type F = unsafe extern "C" fn(u64) -> *const c_char;
                // SAFETY: as declared in fakecuda.h; the call was made.
                unsafe { CStr::from_ptr(fake.function::<F>(c"fakecuda_call_name")(nth)) }
            };
            calls
                .into_iter()
                .find(|nth| name(*nth) == c"cuMemGetInfo_v2")
        };
        fake.reset();
        fake.lose_device(nth.unwrap(), 700);
        let error = device.memory().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DeviceLost);
        let text = "cuMemGetInfo: CUDA_ERROR_ILLEGAL_ADDRESS (code 700";
        assert!(error.to_string().starts_with(text), "{error}");
        assert_eq!(kind(device.stream_create()), ErrorKind::DeviceLost);
        assert_eq!(kind(device.synchronize()), ErrorKind::DeviceLost);
        fake.reset();
        assert_eq!(fake.thread_state(), before);
    });
}

#[test]
fn failures_say_what_was_asked() {
    child("failures_say_what_was_asked", whole(), &[], || {
        let fake = Fake::find();
        let device = CudaPlatform::open().unwrap().cuda_device(0).unwrap();
        let host = pages(2 * MIB as usize);
        fake.fail("cuMemCreate", 1, 2, -1);
        let error = device
            .create(4 * MIB, CreateOptions::default())
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfDeviceMemory);
        let text = error.to_string();
        assert!(text.starts_with("cuMemCreate(4194304 bytes"), "{text}");
        assert!(
            text.contains("CUDA_ERROR_OUT_OF_MEMORY (code 2: "),
            "{text}"
        );
        fake.fail("cuMemHostRegister_v2", 1, 2, -1);
        // SAFETY: the memory lives as long as the process.
        let registered = unsafe { device.register_host(host, 2 * MIB as usize) };
        assert_eq!(kind(registered), ErrorKind::OutOfHostMemory);
        assert_eq!(
            kind(device.set_access(2 * MIB, 2 * MIB, &[7])),
            ErrorKind::InvalidArgument
        );
    });
}

#[test]
fn memory_for_rdma_is_given_up_only_if_that_helps() {
    child(
        "memory_for_rdma_is_given_up_only_if_that_helps",
        whole(),
        &[],
        || {
            let fake = Fake::find();
            let device = CudaPlatform::open().unwrap().cuda_device(0).unwrap();
            let create = || device.create(2 * MIB, CreateOptions::default());
            assert!(device.info().rdma);
            for (code, times) in [(2, 1), (UNKNOWN, 1), (801, 2), (1, 2)] {
                fake.reset();
                fake.fail("cuMemCreate", 1, code, times);
                create().unwrap_err();
                assert_eq!(fake.count_of(c"cuMemCreate"), times as u64);
                assert!(device.info().rdma, "{code}");
            }
            fake.reset();
            fake.fail("cuMemCreate", 1, 801, 1);
            create().unwrap();
            assert_eq!(fake.count_of(c"cuMemCreate"), 2);
            assert!(!device.info().rdma);
            fake.reset();
            create().unwrap();
            assert_eq!(fake.count_of(c"cuMemCreate"), 1);
        },
    );
}

#[test]
fn registered_memory_is_for_every_context_and_mapped() {
    child(
        "registered_memory_is_for_every_context_and_mapped",
        whole(),
        &[],
        || {
            let device = CudaPlatform::open().unwrap().cuda_device(0).unwrap();
            let host = pages(2 * MIB as usize);
            device.host_flags(host).unwrap_err();
            // SAFETY: the memory lives as long as the process.
            unsafe { device.register_host(host, 2 * MIB as usize) }.unwrap();
            assert_eq!(device.host_flags(host.wrapping_add(5000)).unwrap(), 1 | 2);
            // SAFETY: no work is queued.
            unsafe { device.unregister_host(host) }.unwrap();
            device.host_flags(host).unwrap_err();
        },
    );
}

#[test]
fn exported_descriptors_close_on_exec() {
    child("exported_descriptors_close_on_exec", whole(), &[], || {
        let device = CudaPlatform::open().unwrap().cuda_device(0).unwrap();
        let options = CreateOptions { exportable: true };
        let physical = device.create(2 * MIB, options).unwrap();
        let descriptor = device.export(physical).unwrap();
        // SAFETY: an open descriptor.
        let flags = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    });
}

#[test]
fn a_forked_child_gets_a_status() {
    child("a_forked_child_gets_a_status", whole(), &[], || {
        let fake = Fake::find();
        let platform = CudaPlatform::open().unwrap();
        let device = platform.cuda_device(0).unwrap();
        device.memory().unwrap();
        fake.reset();
        // SAFETY: the child makes calls that return at once, and leaves by `_exit`.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let calls = fake.count();
            let forked = |kind: Option<ErrorKind>| kind == Some(ErrorKind::Forked);
            let all = forked(device.memory().err().map(|error| error.kind()))
                && forked(device.stream_create().err().map(|error| error.kind()))
                && forked(platform.device(0).err().map(|error| error.kind()))
                && forked(CudaPlatform::open().err().map(|error| error.kind()))
                && platform.current_device() == 0;
            drop((device, platform));
            let none = fake.count() == calls;
            // SAFETY: ends the child without destructors.
            unsafe { libc::_exit(if all && none { 0 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: waits for our own child.
        unsafe { libc::waitpid(pid, &mut status, 0) };
        assert_eq!(status, 0);
        device.memory().unwrap();
    });
}

static KEPT: OnceLock<Arc<CudaDevice>> = OnceLock::new();

/// Registered before ours, so it runs after.
extern "C" fn late_in_exit() {
    let late = KEPT
        .get()
        .map(|device| device.memory().map_err(|error| error.kind()));
    let code = match late {
        Some(Err(ErrorKind::Shutdown)) => 0,
        _ => 3,
    };
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) };
}

#[test]
fn nothing_is_called_once_exit_began() {
    child("nothing_is_called_once_exit_began", whole(), &[], || {
        // SAFETY: a function that lives as long as the process.
        unsafe { libc::atexit(late_in_exit) };
        let device = CudaPlatform::open().unwrap().cuda_device(0).unwrap();
        device.memory().unwrap();
        assert!(KEPT.set(device).is_ok());
        std::process::exit(5);
    });
}
