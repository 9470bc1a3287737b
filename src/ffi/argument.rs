//! Checking what callers pass: pointers, strings, and structs that may grow.

use std::ffi::{CStr, c_char};

use crate::error::{Error, ErrorKind, Result};

/// A struct of the header that begins with its size.
///
/// # Safety
/// `repr(C)`, plain data, the first field is a `u32` named `struct_size`, and all zeros are valid.
pub(super) unsafe trait Sized32: Copy {}

fn null(name: &str) -> Error {
    Error::new(ErrorKind::NullPointer, format!("{name} must not be NULL"))
}

/// The object behind a handle or array pointer.
///
/// # Safety
/// `pointer` is NULL or valid for reads for `'a`.
pub(super) unsafe fn required<'a, T>(pointer: *const T, name: &str) -> Result<&'a T> {
    // SAFETY: the caller's promise.
    unsafe { pointer.as_ref() }.ok_or_else(|| null(name))
}

/// An out-parameter: checked before any work is done, written on success.
pub(super) fn out<T>(pointer: *mut T, name: &str) -> Result<Out<T>> {
    if pointer.is_null() {
        return Err(null(name));
    }
    Ok(Out { pointer })
}

/// See [`out`].
pub(super) struct Out<T> {
    pointer: *mut T,
}

impl<T> Out<T> {
    /// # Safety
    /// The caller of the C function promised a pointer that is valid for writes.
    pub unsafe fn write(self, value: T) {
        // SAFETY: the promise above.
        unsafe { self.pointer.write(value) }
    }
}

/// A string, `None` for NULL.
///
/// # Safety
/// `pointer` is NULL or a NUL-terminated string valid for `'a`.
pub(super) unsafe fn optional_str<'a>(
    pointer: *const c_char,
    name: &str,
) -> Result<Option<&'a str>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(pointer) }
        .to_str()
        .map(Some)
        .map_err(|_| Error::invalid(name, "is not UTF-8"))
}

/// A struct passed by pointer, its missing tail filled with zeros; `None` for NULL.
///
/// # Safety
/// `pointer` is NULL or valid for reads of the `struct_size` bytes it states.
pub(super) unsafe fn optional_struct<T: Sized32>(
    pointer: *const T,
    name: &str,
) -> Result<Option<T>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: every such struct begins with a `u32`.
    let stated = unsafe { pointer.cast::<u32>().read() } as usize;
    if stated < size_of::<u64>() || stated > 1 << 16 {
        return Err(Error::invalid(
            name,
            format_args!("struct_size is {stated}, it must be set to sizeof the struct"),
        ));
    }
    let known = stated.min(size_of::<T>());
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: `known` bytes are readable by the caller's promise and fit the value, whose rest is
    // zero, which `Sized32` promises to be valid.
    let value = unsafe {
        std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), value.as_mut_ptr().cast(), known);
        value.assume_init()
    };
    // SAFETY: within the stated size.
    let tail =
        unsafe { std::slice::from_raw_parts(pointer.cast::<u8>().add(known), stated - known) };
    if tail.iter().any(|&byte| byte != 0) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{name}: a newer struct with fields this library does not know"),
        ));
    }
    Ok(Some(value))
}

/// The size a caller stated for a struct it wants filled, checked.
///
/// # Safety
/// `pointer` is valid for reads of its first four bytes.
pub(super) unsafe fn stated_size<T: Sized32>(pointer: *const T, name: &str) -> Result<usize> {
    if pointer.is_null() {
        return Err(null(name));
    }
    // SAFETY: every such struct begins with a `u32`.
    let stated = unsafe { pointer.cast::<u32>().read() } as usize;
    if stated < size_of::<u64>() || stated > 1 << 16 {
        return Err(Error::invalid(
            name,
            format_args!("struct_size is {stated}, it must be set to sizeof the struct"),
        ));
    }
    Ok(stated)
}

/// Fills a caller's struct as far as it reaches, keeping its `struct_size`.
///
/// # Safety
/// `pointer` is valid for writes of `stated` bytes.
pub(super) unsafe fn fill_struct<T: Sized32>(pointer: *mut T, stated: usize, value: &T) {
    let skip = size_of::<u32>();
    let length = stated.min(size_of::<T>()) - skip;
    // SAFETY: the promise above; source and destination are different objects.
    unsafe {
        std::ptr::copy_nonoverlapping(
            std::ptr::from_ref(value).cast::<u8>().add(skip),
            pointer.cast::<u8>().add(skip),
            length,
        );
    }
}

/// Copies text into a fixed field, cut at a character if it is too long, always terminated.
pub(super) fn fill_text(field: &mut [c_char], text: &str) {
    let mut length = text.len().min(field.len().saturating_sub(1));
    while !text.is_char_boundary(length) {
        length -= 1;
    }
    for (to, from) in field.iter_mut().zip(&text.as_bytes()[..length]) {
        *to = *from as c_char;
    }
    if let Some(end) = field.get_mut(length) {
        *end = 0;
    }
}
