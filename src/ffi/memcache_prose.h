/*
 * memcache.h - what the object pool shares with the rest of the library: versions, status codes,
 * messages and the log.
 *
 * Functions return an int32_t: 0 (MEMCACHE_OK) for success, negative for an error; the codes are the
 * same numbers as in tms.h. memcache_last_error_message() tells what went wrong on the calling
 * thread. Strings that come out belong to the library. Every function may be called from any thread.
 */
