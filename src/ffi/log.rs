//! Log records: `tracing` events to a C callback, or to stderr where `TMS_LOG` asks for it.
//!
//! Records may be raised while the host holds locks of its own (an allocator's, the GIL), so the
//! callback never runs on the thread that raised one: a thread of the library delivers them.

use std::collections::VecDeque;
use std::ffi::{CString, c_char, c_void};
use std::fmt::{self, Write as _};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};

use super::fence::fence;
use super::forward::forward;
use super::status::TMS_OK;
use crate::error::{Error, ErrorKind};

/// Errors only.
pub const TMS_LOG_ERROR: i32 = 1;
/// Warnings too.
pub const TMS_LOG_WARN: i32 = 2;
/// What a user may want to know once.
pub const TMS_LOG_INFO: i32 = 3;
/// What a developer wants to know.
pub const TMS_LOG_DEBUG: i32 = 4;

/// Receives log records. `user` is what was registered; `level` is one of the TMS_LOG constants;
/// `target` names the part of the library; both strings are valid during the call only. Runs on a
/// thread of the library, one record at a time, with no lock of the library held; it may call any
/// function of the library except tms_log_set_callback and tms_log_flush.
#[allow(non_camel_case_types)]
pub type tms_log_callback_t = Option<
    unsafe extern "C" fn(
        user: *mut c_void,
        level: i32,
        target: *const c_char,
        message: *const c_char,
    ),
>;

/// More waiting records than this are dropped, and counted.
const MOST_WAITING: usize = 4096;

#[derive(Clone, Copy)]
struct Callback {
    function: unsafe extern "C" fn(*mut c_void, i32, *const c_char, *const c_char),
    user: usize,
}

struct Line {
    level: i32,
    target: CString,
    message: CString,
}

struct Waiting {
    lines: VecDeque<Line>,
    dropped: u64,
    callback: Option<Callback>,
    delivering: bool,
    running: bool,
}

/// Protects the queue and the callback; never held while the callback runs.
static WAITING: Mutex<Waiting> = Mutex::new(Waiting {
    lines: VecDeque::new(),
    dropped: 0,
    callback: None,
    delivering: false,
    running: false,
});
static CHANGED: Condvar = Condvar::new();

/// Highest level wanted by the callback and by stderr; 0 is silence.
static CALLBACK_LEVEL: AtomicU32 = AtomicU32::new(0);
static STDERR_LEVEL: AtomicU32 = AtomicU32::new(0);
static INSTALL: Once = Once::new();
static READ_ENVIRONMENT: Once = Once::new();

fn waiting() -> MutexGuard<'static, Waiting> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn number(level: &Level) -> u32 {
    match *level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        _ => 4,
    }
}

fn name(level: u32) -> &'static str {
    match level {
        1 => "error",
        2 => "warn",
        3 => "info",
        _ => "debug",
    }
}

/// The end of every record of this library; other crates' records are not ours to show.
struct Collector;

impl Subscriber for Collector {
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let level = number(metadata.level());
        metadata.is_event()
            && metadata.target().starts_with("tms_memcache")
            && (level <= CALLBACK_LEVEL.load(Ordering::Relaxed)
                || level <= STDERR_LEVEL.load(Ordering::Relaxed))
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        struct Text(String);
        impl Visit for Text {
            fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
                // Writing to a string does not fail.
                let _ = if field.name() == "message" {
                    write!(self.0, "{value:?}")
                } else {
                    write!(self.0, " {}={value:?}", field.name())
                };
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        deliver(
            number(event.metadata().level()),
            event.metadata().target(),
            text.0,
        );
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn deliver(level: u32, target: &str, message: String) {
    if level <= STDERR_LEVEL.load(Ordering::Relaxed) {
        let line = format!("tms {} {target}: {message}\n", name(level));
        // SAFETY: one write of a valid buffer; a log line that cannot be written is lost.
        unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
    }
    if level > CALLBACK_LEVEL.load(Ordering::Relaxed) || crate::process::forked() {
        return;
    }
    let (Ok(target), Ok(message)) = (CString::new(target), CString::new(message)) else {
        return;
    };
    let mut waiting = waiting();
    if waiting.callback.is_none() {
        return;
    }
    if waiting.lines.len() >= MOST_WAITING {
        waiting.dropped += 1;
        return;
    }
    waiting.lines.push_back(Line {
        level: level as i32,
        target,
        message,
    });
    if !waiting.running {
        let spawned = std::thread::Builder::new()
            .name("tms-log".to_string())
            .spawn(serve);
        waiting.running = spawned.is_ok();
    }
    drop(waiting);
    CHANGED.notify_all();
}

/// Delivers until the callback is removed.
fn serve() {
    let mut state = waiting();
    loop {
        let Some(callback) = state.callback else {
            state.lines.clear();
            state.running = false;
            CHANGED.notify_all();
            return;
        };
        let next = match state.lines.pop_front() {
            Some(line) => Some(line),
            None if state.dropped > 0 => {
                let dropped = std::mem::take(&mut state.dropped);
                CString::new(format!("{dropped} log records were dropped"))
                    .ok()
                    .map(|message| Line {
                        level: TMS_LOG_WARN,
                        target: c"tms_memcache::ffi::log".to_owned(),
                        message,
                    })
            }
            None => None,
        };
        let Some(line) = next else {
            CHANGED.notify_all();
            state = CHANGED.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        state.delivering = true;
        drop(state);
        // SAFETY: the host registered the function for this use; the strings outlive the call.
        unsafe {
            (callback.function)(
                callback.user as *mut c_void,
                line.level,
                line.target.as_ptr(),
                line.message.as_ptr(),
            );
        }
        state = waiting();
        state.delivering = false;
    }
}

fn install() {
    INSTALL.call_once(|| {
        // Fails where the host's own program already collects; then its collector sees our records.
        let _ = tracing::subscriber::set_global_default(Collector);
    });
}

/// Shows records on stderr as `TMS_LOG` says: errors where it is not set, because a failure that
/// nobody sees looks like success. Called at the border, before the first work of any kind.
pub(super) fn read_environment() {
    READ_ENVIRONMENT.call_once(|| {
        let wanted = std::env::var("TMS_LOG").unwrap_or_default();
        let level = match wanted.trim().to_ascii_lowercase().as_str() {
            "off" => return,
            "" | "error" => 1,
            "warn" => 2,
            "info" => 3,
            "debug" => 4,
            other => {
                let line = format!(
                    "tms error: TMS_LOG: \"{other}\" is none of error, warn, info, debug, off; using error\n"
                );
                // SAFETY: one write of a valid buffer.
                unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
                1
            }
        };
        STDERR_LEVEL.store(level, Ordering::Relaxed);
        install();
    });
}

/// Sets or removes the callback for log records.
///
/// `callback` may be NULL: then records are no longer delivered. When the function returns, no call of
/// the callback before is running. `user` is passed through and may be NULL; it must stay valid until
/// the callback is removed. `level` is the highest level to deliver, TMS_LOG_ERROR to TMS_LOG_DEBUG.
/// One callback a process. Any thread, but not from the callback.
///
/// What TMS_LOG shows on stderr is shown all the same. How many records were dropped is told by a
/// record.
///
/// Returns TMS_OK, TMS_ERR_INVALID_ARGUMENT or TMS_ERR_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_log_set_callback(
    callback: tms_log_callback_t,
    user: *mut c_void,
    level: i32,
) -> i32 {
    forward!(tms_log_set_callback(callback, user, level));
    fence(|| {
        if crate::process::forked() {
            crate::process::check()?;
        }
        if callback.is_some() && !(TMS_LOG_ERROR..=TMS_LOG_DEBUG).contains(&level) {
            return Err(Error::invalid(
                "level",
                format_args!("is {level}, must be 1 (error) to 4 (debug)"),
            ));
        }
        let mut state = waiting();
        state.callback = callback.map(|function| Callback {
            function,
            user: user as usize,
        });
        let wanted = if callback.is_some() { level as u32 } else { 0 };
        CALLBACK_LEVEL.store(wanted, Ordering::Relaxed);
        CHANGED.notify_all();
        // The callback before this one may be running.
        while state.delivering {
            state = CHANGED
                .wait_timeout(state, Duration::from_millis(10))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        drop(state);
        if callback.is_some() {
            install();
        }
        Ok(TMS_OK)
    })
}

/// Waits until all records raised so far were delivered, at most `timeout_ms` milliseconds. Any
/// thread, but not from the callback.
///
/// Returns TMS_OK, or TMS_ERR_TIMEOUT.
#[unsafe(no_mangle)]
pub extern "C" fn tms_log_flush(timeout_ms: u32) -> i32 {
    forward!(tms_log_flush(timeout_ms));
    fence(|| {
        let deadline = Instant::now() + Duration::from_millis(u64::from(timeout_ms));
        let mut state = waiting();
        while !crate::process::forked() && (state.delivering || !state.lines.is_empty()) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Err(Error::new(
                    ErrorKind::Timeout,
                    "log records are still being delivered",
                ));
            };
            state = CHANGED
                .wait_timeout(state, left.min(Duration::from_millis(10)))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(TMS_OK)
    })
}
