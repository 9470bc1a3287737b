//! What every function of the border does: keep panics in, turn errors into a status, and remember
//! the message for the thread.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, ErrorKind, Result};

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs the body of a function that returns a status.
pub(super) fn fence(body: impl FnOnce() -> Result<i32>) -> i32 {
    match fenced(body) {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

/// Runs the body of a function that returns something else.
pub(super) fn fenced<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    super::log::read_environment();
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_string())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".to_string());
        Err(Error::new(
            ErrorKind::Internal,
            format!("a defect of the library: {what}"),
        ))
    })
}

/// Remembers the message for this thread and returns the code.
pub(super) fn fail(error: &Error) -> i32 {
    let mut text = error.to_string().into_bytes();
    text.retain(|&byte| byte != 0);
    // A thread that is ending has no storage any more; then only the code is told.
    let _ = LAST_ERROR.try_with(|last| {
        if let (Ok(mut last), Ok(text)) = (last.try_borrow_mut(), CString::new(text)) {
            *last = text;
        }
    });
    error.code()
}

/// The message of the thread's last failed call, valid until its next failed call.
pub(super) fn last_error() -> *const c_char {
    LAST_ERROR
        .try_with(|last| last.try_borrow().map(|last| last.as_ptr()).ok())
        .ok()
        .flatten()
        .unwrap_or(c"".as_ptr())
}
