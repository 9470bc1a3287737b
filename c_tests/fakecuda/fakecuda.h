/* Control functions of the software CUDA driver: what a test uses to inject faults, to stop and
 * delay streams, to look at device memory, and to count what is alive. Found in the same
 * libcuda.so.1 by dlsym. None of them is counted or failed as a driver call; all are safe on
 * every thread. Sizes are in bytes; `device` is an ordinal, and a value out of range reads as 0.
 * The driver entry points themselves are in driver.h. */
#ifndef FAKECUDA_H
#define FAKECUDA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

/* ---- Faults -------------------------------------------------------------------------------- */

/* Removes every fault, and every sticky error of every context. */
void fakecuda_reset_faults(void);

/* Lets the nth call of `function` (exported name; 1 = the next one), and the `repeat` - 1 calls
 * after it, return `code` without any effect. repeat -1 = for ever. `code` may be any value, 0
 * included (a success that did nothing). Faults add up; the oldest that applies wins. */
void fakecuda_fail(const char *function, uint64_t nth, int code, int repeat);

/* The same over all driver calls that are not excluded. */
void fakecuda_fail_any(uint64_t nth, int code, int repeat);

/* The nth driver call has no effect, returns `code`, and leaves it sticky on every context: queued
 * work is dropped, and every later call that a broken context reaches (all but device queries,
 * error names and the context stack) returns it until fakecuda_reset_faults(). */
void fakecuda_fail_any_effect(uint64_t nth, int code);

/* Names, separated by commas, that are neither counted by fakecuda_count and the trace nor failed
 * by the "any" faults. Replaces the list; NULL or "" empties it. */
void fakecuda_exclude(const char *comma_list);

/* ---- Calls made ---------------------------------------------------------------------------- */

/* Driver calls since the start or the last reset, failed ones included, excluded ones not. */
uint64_t fakecuda_count(void);
void fakecuda_reset_count(void);

/* Calls of one function since the last reset, excluded or not. */
uint64_t fakecuda_count_of(const char *function);

/* The name of the nth call (1 = first) since the last reset, or NULL. The first 1,048,576 are kept. */
const char *fakecuda_call_name(uint64_t nth);

/* ---- What is alive ------------------------------------------------------------------------- */

/* Physical allocations of a device that are not yet both released and unmapped; cuMemAlloc's too. */
uint64_t fakecuda_live_handles(int device);
/* Their bytes: what the device has charged. */
uint64_t fakecuda_live_bytes(int device);
/* Bytes of address ranges made by cuMemAddressReserve. */
uint64_t fakecuda_reserved_bytes(void);
/* Bytes mapped of a device's memory, each mapping counted; cuMemAlloc's too. */
uint64_t fakecuda_mapped_bytes(int device);
/* Bytes of registered and of driver-allocated pinned host memory. */
uint64_t fakecuda_registered_bytes(void);
uint64_t fakecuda_live_streams(void);
uint64_t fakecuda_live_events(void);
uint64_t fakecuda_live_modules(void);
/* Reference count of the primary context. */
uint64_t fakecuda_primary_refs(int device);
/* Operations queued or running on all streams. */
uint64_t fakecuda_pending_work(void);

/* ---- Device memory from the test ----------------------------------------------------------- */

/* Reads or writes mapped device memory, whatever its access rights. 0, or 1 if a byte is not mapped. */
int fakecuda_peek(const void *device_pointer, void *out, size_t size);
int fakecuda_poke(void *device_pointer, const void *in, size_t size);

/* ---- Behaviour ----------------------------------------------------------------------------- */

/* 1: no queued operation starts, on any stream; an operation already running ends. 0: go on. */
void fakecuda_hold_streams(int on);
/* 0: no delays; 1: delays up to FAKECUDA_LATE_US; larger: delays up to that many microseconds. */
void fakecuda_set_late(int on);
/* 1: device addresses fault when the host touches them. Existing mappings change too. */
void fakecuda_set_host_unreadable(int on);
/* Capacity of a device. Below what is in use, nothing is free. */
void fakecuda_set_memory(int device, uint64_t bytes);
/* Bytes of the device that "another process" uses. */
void fakecuda_set_external_use(int device, uint64_t bytes);
/* What cuDriverGetVersion reports, as 1000 * major + 10 * minor. */
void fakecuda_set_version(int version);
/* What the next cuInit returns; any code but 0 leaves the library uninitialised. */
void fakecuda_set_init(int code);

/* ---- Kernels ------------------------------------------------------------------------------- */

/* One launch, as a kernel model sees it. `params[i]` points to a copy of the i-th argument, whose
 * size is `param_sizes[i]` (both from the PTX signature). */
struct fakecuda_launch {
    const char *name;
    int device;
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    unsigned param_count;
    void *const *params;
    const size_t *param_sizes;
    void *state; /* for the functions below */
};

/* Runs once per launch, in stream order, on a driver thread. It must not call the driver. */
typedef void (*fakecuda_kernel)(const struct fakecuda_launch *launch);

/* Makes `name` launchable (or replaces its model; NULL removes it). A launch of a name without a
 * model returns 500. "fakecuda_fill" (u64 address, u32 byte value, u64 count) is there already. */
void fakecuda_register_kernel(const char *name, fakecuda_kernel kernel);

/* Device memory, or registered host memory, from inside a kernel, with the rights of the launching
 * device. 0 on success; otherwise 1, and the launch ends as an illegal address (700). */
int fakecuda_kernel_read(const struct fakecuda_launch *launch, uint64_t address, void *out, size_t size);
int fakecuda_kernel_write(const struct fakecuda_launch *launch, uint64_t address, const void *in, size_t size);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif
