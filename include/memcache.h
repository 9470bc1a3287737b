/*
 * memcache.h - what the object pool shares with the rest of the library: versions, status codes,
 * messages and the log.
 *
 * Functions return an int32_t: 0 (MEMCACHE_OK) for success, negative for an error; the codes are the
 * same numbers as in tms.h. memcache_last_error_message() tells what went wrong on the calling
 * thread. Strings that come out belong to the library. Every function may be called from any thread.
 */

#ifndef MEMCACHE_H
#define MEMCACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * Version of the binary interface. Libraries with different numbers do not work together.
 */
#define MEMCACHE_ABI_VERSION 1

/**
 * Success.
 */
#define MEMCACHE_OK 0

/**
 * An argument is out of its range, or two arguments contradict each other.
 */
#define MEMCACHE_ERR_INVALID_ARGUMENT -1

/**
 * A pointer that must not be NULL is NULL.
 */
#define MEMCACHE_ERR_NULL_POINTER -2

/**
 * A deadline passed.
 */
#define MEMCACHE_ERR_TIMEOUT -11

/**
 * Two copies of the library in one process do not match.
 */
#define MEMCACHE_ERR_ABI -19

/**
 * A defect of this library.
 */
#define MEMCACHE_ERR_INTERNAL -22

/**
 * Receives log records. `user` is what was registered; `level` is 1 error, 2 warn, 3 info, 4 debug;
 * both strings are valid during the call only. Runs on a thread of the library, one record at a
 * time; it may not call memcache_log_set_callback or memcache_log_flush.
 */
typedef void (*memcache_log_callback_t)(void *user,
                                        int32_t level,
                                        const char *target,
                                        const char *message);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version as text, for example "0.1.0". Static; never NULL. Any thread.
 */
const char *memcache_version(void);

/**
 * The version as a number: major × 65536 + minor × 256 + patch. Any thread.
 */
uint32_t memcache_version_number(void);

/**
 * The version of the binary interface of the loaded library. Compare with MEMCACHE_ABI_VERSION.
 * Any thread.
 */
uint32_t memcache_abi_version(void);

/**
 * A short English phrase for a status code; "unknown status" for codes that do not exist.
 * Static; never NULL. Any thread.
 */
const char *memcache_status_str(int32_t code);

/**
 * The message of the last failed call on the calling thread, "" if none. Owned by the library,
 * valid until the next failed call on this thread. Never NULL.
 */
const char *memcache_last_error_message(void);

/**
 * Sets or removes the callback for log records of the whole library; the one of tms.h is the same.
 *
 * `callback` may be NULL: then, when the function returns, no call is running. `user` is passed
 * through and may be NULL; it must stay valid until the callback is removed. `level` is the
 * highest level to deliver, 1 (error) to 4 (debug). Any thread, but not from the callback.
 *
 * Returns MEMCACHE_OK or MEMCACHE_ERR_INVALID_ARGUMENT.
 */
int32_t memcache_log_set_callback(memcache_log_callback_t callback,
                                  void *user,
                                  int32_t level);

/**
 * Waits until all records raised so far were delivered, at most `timeout_ms` milliseconds. Any
 * thread, but not from the callback.
 *
 * Returns MEMCACHE_OK or MEMCACHE_ERR_TIMEOUT.
 */
int32_t memcache_log_flush(uint32_t timeout_ms);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* MEMCACHE_H */
