/*
 * tms.h - pause and resume GPU memory without losing it.
 *
 * Allocations carry a tag. A pause copies what must be kept to a backup, then releases the physical
 * memory of all allocations with a tag; their addresses stay reserved, so every pointer, tensor and
 * CUDA graph stays valid. A resume puts memory and contents back.
 *
 * tms_memcpy and its kin copy between any two places, device memory, pinned and pageable host memory,
 * at the speed of the bus: one piece, many, or rows; waiting, on a stream, or as an operation.
 *
 * Ownership
 *   Handles (tms_saver_t, tms_op_t, tms_transfer_engine_t) are made by one function and freed by
 *   one; freeing NULL does nothing. Strings, structs and arrays that go in are read before the
 *   function returns. Strings that come out belong to the library and are valid as long as their
 *   function says. Memory from malloc functions is freed by the matching free function of the same
 *   saver. Memory that a copy reads or writes belongs to the caller, and must live until the copy is
 *   done: until the function returns, until its operation has ended, or until its stream got there.
 *
 * Threads
 *   Every function may be called from any thread. A handle that is passed as const may be used by
 *   many threads at once; a function that takes it without const ends it. Regions and the message
 *   of the last error belong to the calling thread.
 *
 * Operations
 *   Functions whose names end with _async return at once; the work is done by a thread of the library.
 *   Operations of a saver run in the order they were started, those of an engine too; one does not
 *   wait for the other. Ask by tms_op_poll, wait by tms_op_wait or on the descriptor of
 *   tms_op_eventfd, read what was done by tms_op_result, and free the handle by tms_op_free: early,
 *   and the work goes on to its end. What is wrong with the pointers of a copy is told by its end.
 *
 * Copies
 *   A copy finds out what memory its pointers are. Each comes in three forms. tms_memcpy waits, and
 *   does not look at streams: what they have queued on the memory must be done before.
 *   tms_memcpy_on_stream takes its place among the work of a stream. tms_memcpy_async is an operation.
 *   _h2d, _d2h and _d2d insist on a direction; _batch takes many pieces, _2d rows. After a failure,
 *   `certain`, or copied_bytes of the result, says how many bytes from the beginning are in place;
 *   what is behind them may hold anything. Paused memory is no memory: such a copy is refused.
 *
 * Engines
 *   NULL is the engine of the process, which the default saver pauses and resumes with. One of your own
 *   has its own staging memory, threads and table of methods, and can be kept to some of the devices.
 *   Its staging memory is pinned, as the backups of a saver are; TMS_PINNED_LIMIT holds for each engine
 *   and each saver by itself.
 *
 * Errors
 *   Functions return an int32_t: 0 (TMS_OK) for success, negative for an error. Out-parameters are
 *   written only on success unless the function says otherwise. tms_last_error_message() tells what
 *   went wrong and names the argument, address or file at fault. Beside the codes that a function
 *   lists, any may return TMS_ERR_INTERNAL (a defect of the library), TMS_ERR_FORKED and
 *   TMS_ERR_SHUTDOWN (see below), TMS_ERR_ABI (another copy of the library in the process does not
 *   match) and TMS_ERR_UNSUPPORTED (a newer struct with fields that this library does not know).
 *   Nothing here ends the process, prints to stdout, or installs a signal handler; errors go to
 *   stderr as well unless TMS_LOG=off.
 *
 * Structs
 *   Structs that may grow begin with struct_size. Zero-fill them and set it to sizeof the struct, so
 *   that programs built against an older header keep working.
 *
 * Devices
 *   TMS_DEVICE=auto (default), cuda or host chooses where the default saver works. "host" needs no
 *   GPU: device memory is memory of this machine. No driver is touched before the first allocation
 *   or the first function that asks for a device or a saver.
 *
 * fork and exit
 *   A child forked after a device was opened (tms_device_count, tms_device_info, tms_saver_default,
 *   tms_saver_create, the first allocation) gets TMS_ERR_FORKED from every function that needs one;
 *   exec is fine. Once exit has begun no driver is called any more: functions return
 *   TMS_ERR_SHUTDOWN.
 *
 * What a pause does not see
 *   Contents without a backup are gone: a pause keeps no physical memory for reuse, and memory that is
 *   given out is cleared, by the driver, or by this library where an allocation gets the place of one
 *   that was freed. That guarantee covers memory of this library only. Memory that is registered
 *   elsewhere (RDMA, NCCL buffers of captured graphs, peer mappings made outside of a region with peer
 *   access) keeps its old pages there and goes stale. Work of other CUDA contexts and other processes
 *   on the memory must be finished by the caller.
 */

#ifndef TMS_H
#define TMS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * Major version. A change breaks programs.
 */
#define TMS_VERSION_MAJOR 0

/**
 * Minor version. Additions.
 */
#define TMS_VERSION_MINOR 1

/**
 * Patch version. Corrections.
 */
#define TMS_VERSION_PATCH 0

/**
 * Version of the binary interface. Libraries with different numbers do not work together.
 */
#define TMS_ABI_VERSION 1

/**
 * Success.
 */
#define TMS_OK 0

/**
 * An argument is out of its range, or two arguments contradict each other.
 */
#define TMS_ERR_INVALID_ARGUMENT -1

/**
 * A pointer that must not be NULL is NULL.
 */
#define TMS_ERR_NULL_POINTER -2

/**
 * The address, file or folder is not known.
 */
#define TMS_ERR_NOT_FOUND -3

/**
 * The device cannot give the physical memory. Nothing changed; the call can be repeated.
 */
#define TMS_ERR_OUT_OF_DEVICE_MEMORY -4

/**
 * The host cannot give the memory, or a limit set for it was reached. Nothing changed.
 */
#define TMS_ERR_OUT_OF_HOST_MEMORY -5

/**
 * This device, driver or build cannot do what was asked.
 */
#define TMS_ERR_UNSUPPORTED -6

/**
 * No driver, no device, or a driver that cannot be used.
 */
#define TMS_ERR_NO_DEVICE -7

/**
 * A driver call failed; the device may still be used.
 */
#define TMS_ERR_DEVICE -8

/**
 * The device is lost for this process. Backups in host memory stay readable.
 */
#define TMS_ERR_DEVICE_LOST -9

/**
 * The object is in use.
 */
#define TMS_ERR_BUSY -10

/**
 * A deadline passed.
 */
#define TMS_ERR_TIMEOUT -11

/**
 * Reading or writing a file failed.
 */
#define TMS_ERR_IO -12

/**
 * A disk is full.
 */
#define TMS_ERR_NO_SPACE -13

/**
 * A backup does not match its checksum or length.
 */
#define TMS_ERR_CORRUPT -14

/**
 * The memory is exported, so releasing it would free nothing and leave others with stale memory.
 */
#define TMS_ERR_EXPORTED -15

/**
 * A stream capture is active and forbids the call.
 */
#define TMS_ERR_CAPTURE -16

/**
 * The library was used before fork(); the child cannot use it.
 */
#define TMS_ERR_FORKED -17

/**
 * The process is exiting.
 */
#define TMS_ERR_SHUTDOWN -18

/**
 * Two copies of the library in one process do not match.
 */
#define TMS_ERR_ABI -19

/**
 * Part of the selection was done and part was not; the result lists which.
 */
#define TMS_ERR_PARTIAL -20

/**
 * The operation was cancelled before it changed anything. Reserved: nothing can be cancelled yet.
 */
#define TMS_ERR_CANCELLED -21

/**
 * A defect of this library.
 */
#define TMS_ERR_INTERNAL -22

/**
 * Errors only.
 */
#define TMS_LOG_ERROR 1

/**
 * Warnings too.
 */
#define TMS_LOG_WARN 2

/**
 * What a user may want to know once.
 */
#define TMS_LOG_INFO 3

/**
 * What a developer wants to know.
 */
#define TMS_LOG_DEBUG 4

/**
 * The host device: memory of this machine, for machines without a GPU.
 */
#define TMS_DEVICE_HOST 0

/**
 * A CUDA device.
 */
#define TMS_DEVICE_CUDA 1

/**
 * Flag of tms_device_info_t: memory can be exported to other processes.
 */
#define TMS_DEVICE_CAN_EXPORT 1

/**
 * Flag of tms_device_info_t: memory is created for GPUDirect RDMA.
 */
#define TMS_DEVICE_RDMA 2

/**
 * Memory of the region can be exported to other processes (tms_saver_export).
 */
#define TMS_REGION_EXPORTABLE 1

/**
 * All peer devices get access to memory of the region. Pausing it waits for them too.
 */
#define TMS_REGION_PEER_ACCESS 2

/**
 * Backups in host memory ("pinned", "mmap") are kept after a resume, at the same address in every
 * cycle. Nothing for "file".
 */
#define TMS_REGION_RETAIN 4

/**
 * tms_region_push: no region, until the matching pop.
 */
#define TMS_REGION_DISABLED 8

/**
 * Exported allocations stay active instead of making the call fail.
 */
#define TMS_PAUSE_SKIP_EXPORTED 1

/**
 * Everything is copied. Without this flag, and unless TMS_UNCHANGED_CHECK=0, memory of a region that
 * retains its backup in pinned memory is compared with that backup first, by a 128-bit fingerprint of
 * each 2 MiB, and only what differs is copied. The key of the fingerprints is random and secret to
 * the process; a block that changed is taken for unchanged with a probability of at most 2^-63,
 * whatever its contents. A backup whose address tms_saver_backup_pointer gave out is always copied,
 * and so is everything on devices that cannot compute fingerprints.
 */
#define TMS_PAUSE_COPY_ALL 2

/**
 * Waiting without a deadline.
 */
#define TMS_WAIT_FOREVER UINT64_MAX

/**
 * The allocation has physical memory and can be used.
 */
#define TMS_STATE_ACTIVE 0

/**
 * A pause works on it.
 */
#define TMS_STATE_PAUSING 1

/**
 * It has addresses but no memory.
 */
#define TMS_STATE_PAUSED 2

/**
 * A resume works on it.
 */
#define TMS_STATE_RESUMING 3

/**
 * Flag of tms_allocation_info_t: there is a complete backup.
 */
#define TMS_ALLOCATION_BACKED 1

/**
 * Flag of tms_allocation_info_t: a descriptor was handed out.
 */
#define TMS_ALLOCATION_EXPORTED 2

/**
 * Ordinary host memory, or an address that nothing is known of.
 */
#define TMS_MEMORY_PAGEABLE 0

/**
 * Host memory that the driver allocated or that is registered with it.
 */
#define TMS_MEMORY_PINNED 1

/**
 * Memory that the driver moves between host and device.
 */
#define TMS_MEMORY_MANAGED 2

/**
 * Memory of a device.
 */
#define TMS_MEMORY_DEVICE 3

/**
 * A running or ended operation. Belongs to the caller, who frees it with tms_op_free.
 */
typedef struct tms_op_t tms_op_t;

/**
 * Owns allocations. Made by tms_saver_create, or the default one of the process.
 */
typedef struct tms_saver_t tms_saver_t;

/**
 * Copies bytes. Made by tms_transfer_engine_create; NULL stands for the engine of the process, which
 * the default saver uses too.
 */
typedef struct tms_transfer_engine_t tms_transfer_engine_t;

/**
 * Receives log records. `user` is what was registered; `level` is one of the TMS_LOG constants;
 * `target` names the part of the library; both strings are valid during the call only. Runs on a
 * thread of the library, one record at a time, with no lock of the library held; it may call any
 * function of the library except tms_log_set_callback and tms_log_flush.
 */
typedef void (*tms_log_callback_t)(void *user,
                                   int32_t level,
                                   const char *target,
                                   const char *message);

/**
 * A device. Set struct_size before the call.
 */
typedef struct {
    /**
     * sizeof this struct.
     */
    uint32_t struct_size;
    /**
     * TMS_DEVICE_HOST or TMS_DEVICE_CUDA.
     */
    int32_t kind;
    /**
     * Position among the visible devices, from 0.
     */
    uint32_t ordinal;
    /**
     * 13000 for CUDA 13.0; 0 on the host device.
     */
    uint32_t driver_version;
    /**
     * Memory is taken in multiples of this, bytes.
     */
    uint64_t granularity;
    /**
     * Memory of the device, bytes.
     */
    uint64_t total_bytes;
    /**
     * Memory that is free now, bytes, all processes counted.
     */
    uint64_t free_bytes;
    /**
     * TMS_DEVICE_CAN_EXPORT, TMS_DEVICE_RDMA.
     */
    uint32_t flags;
    /**
     * Devices that can be given access to this one's memory.
     */
    uint32_t peer_count;
    /**
     * Name of the device, cut if longer.
     */
    char name[128];
    /**
     * Driver functions that are missing, and "kernels" where those of this library cannot run,
     * separated by commas; the features that need them are off.
     */
    char missing[256];
} tms_device_info_t;

/**
 * What a region says about allocations made in it. Zero-fill it, then set struct_size.
 */
typedef struct {
    /**
     * sizeof this struct.
     */
    uint32_t struct_size;
    /**
     * TMS_REGION_EXPORTABLE, TMS_REGION_PEER_ACCESS, TMS_REGION_RETAIN, TMS_REGION_DISABLED.
     */
    uint32_t flags;
    /**
     * By this name allocations are paused and resumed: 1 to 255 bytes of UTF-8. NULL: "default".
     */
    const char *tag;
    /**
     * What keeps the contents while paused: "pinned", "mmap", "file", or "none". NULL: "none".
     */
    const char *backup;
    /**
     * Folder of "file" backups. NULL: what tms_set_disk_backup_dir or TMS_DISK_BACKUP_DIR says,
     * else the system's temporary folder. Each backup takes its size on disk until the allocation is
     * freed; files of killed processes are removed by the next process that uses the folder.
     */
    const char *directory;
} tms_region_options_t;

/**
 * One allocation that could not be brought where it should be.
 */
typedef struct {
    /**
     * Its address.
     */
    void *address;
    /**
     * Its size, bytes.
     */
    uint64_t bytes;
    /**
     * Why, a TMS_ERR code.
     */
    int32_t status;
    /**
     * 0.
     */
    uint32_t reserved;
} tms_failure_t;

/**
 * What an operation did. Zero-fill it, then set struct_size, and failures if the list is wanted.
 * Filled whether the operation succeeds or not; not written if an argument is refused.
 */
typedef struct {
    /**
     * sizeof this struct.
     */
    uint32_t struct_size;
    /**
     * 0.
     */
    uint32_t reserved;
    /**
     * Allocations that changed state.
     */
    uint64_t done_count;
    /**
     * Their bytes.
     */
    uint64_t done_bytes;
    /**
     * Bytes copied to or from backups. Of a copy: how many bytes, from its beginning, are certain to
     * be in place; its other counts are 0.
     */
    uint64_t copied_bytes;
    /**
     * Allocations of the selection that were already in the wanted state.
     */
    uint64_t unchanged_count;
    /**
     * Allocations that failed.
     */
    uint64_t failed_count;
    /**
     * Released bytes that did not become free on the device: held by another reference, or taken
     * by another process meanwhile. Differences up to 32 MiB count as 0.
     */
    uint64_t shortfall_bytes;
    /**
     * The caller's array for the failed allocations, or NULL.
     */
    tms_failure_t *failures;
    /**
     * Entries that fit the array; only the first are written if there are more.
     */
    size_t failures_capacity;
    /**
     * Bytes that a retained backup had already, which a pause did not copy again (see
     * TMS_PAUSE_COPY_ALL). Not part of copied_bytes.
     */
    uint64_t unchanged_bytes;
} tms_result_t;

/**
 * How a saver is made. Zero-fill it, then set struct_size.
 */
typedef struct {
    /**
     * sizeof this struct.
     */
    uint32_t struct_size;
    /**
     * Must be 0.
     */
    uint32_t flags;
    /**
     * "auto", "cuda" or "host"; NULL: what TMS_DEVICE says.
     */
    const char *device;
} tms_saver_options_t;

/**
 * What to pause and what to keep. Zero-fill it, then set struct_size.
 */
typedef struct {
    /**
     * sizeof this struct.
     */
    uint32_t struct_size;
    /**
     * TMS_PAUSE_SKIP_EXPORTED, TMS_PAUSE_COPY_ALL.
     */
    uint32_t flags;
    /**
     * Tags to pause; with tag_count 0 all allocations are selected and this may be NULL.
     */
    const char *const *tags;
    /**
     * Number of tags.
     */
    size_t tag_count;
    /**
     * NULL: as each region says. "none": drop the contents, also of regions with a backup. Else
     * the name of the backup to use for all.
     */
    const char *backup;
} tms_pause_options_t;

/**
 * What to resume. Zero-fill it, then set struct_size.
 */
typedef struct {
    /**
     * sizeof this struct.
     */
    uint32_t struct_size;
    /**
     * Must be 0.
     */
    uint32_t flags;
    /**
     * Tags to resume; with tag_count 0 all allocations are selected and this may be NULL.
     */
    const char *const *tags;
    /**
     * Number of tags.
     */
    size_t tag_count;
    /**
     * How long to wait for device memory that somebody else is about to release, milliseconds.
     */
    uint32_t wait_ms;
} tms_resume_options_t;

/**
 * Bytes and counts of one tag on one device.
 */
typedef struct {
    /**
     * sizeof this struct; of the first entry, it holds for all.
     */
    uint32_t struct_size;
    /**
     * Ordinal of the device.
     */
    int32_t device;
    /**
     * Allocations with physical memory.
     */
    uint64_t active_count;
    /**
     * Their bytes.
     */
    uint64_t active_bytes;
    /**
     * Allocations without physical memory.
     */
    uint64_t paused_count;
    /**
     * Their bytes.
     */
    uint64_t paused_bytes;
    /**
     * Bytes of complete backups.
     */
    uint64_t backed_bytes;
    /**
     * The tag, NUL-terminated.
     */
    char tag[256];
    /**
     * Bytes of device memory that freed allocations left within a handle that others still use: for
     * later allocations of the same region options, or given back by the next pause, or with the
     * last allocation of the handle. A handle has at most 1 GiB; allocations made since the last
     * resume, larger ones and exportable ones hold nothing back.
     */
    uint64_t held_bytes;
} tms_stats_t;

/**
 * One allocation. Set struct_size before the call.
 */
typedef struct {
    /**
     * sizeof this struct.
     */
    uint32_t struct_size;
    /**
     * Ordinal of its device.
     */
    int32_t device;
    /**
     * A TMS_STATE constant.
     */
    int32_t state;
    /**
     * TMS_ALLOCATION_BACKED, TMS_ALLOCATION_EXPORTED.
     */
    uint32_t flags;
    /**
     * Its first byte.
     */
    void *base;
    /**
     * Its size, a multiple of the device's granularity, bytes.
     */
    uint64_t bytes;
    /**
     * The size that was asked for, bytes.
     */
    uint64_t requested_bytes;
    /**
     * Its tag, NUL-terminated.
     */
    char tag[256];
} tms_allocation_info_t;

/**
 * Pinned host memory of a saver, bytes unless said otherwise. Set struct_size before the call.
 */
typedef struct {
    /**
     * sizeof this struct.
     */
    uint32_t struct_size;
    /**
     * Chunks, a number; each is one registration with the driver.
     */
    uint32_t chunk_count;
    /**
     * Registered with the driver, or on the way there.
     */
    uint64_t pinned_bytes;
    /**
     * Part of it that holds backups or staging.
     */
    uint64_t used_bytes;
    /**
     * Part of it that nobody uses: it is there for the next pause.
     */
    uint64_t idle_bytes;
    /**
     * Part of it that is registered in place and belongs to others, such as segments of a store.
     */
    uint64_t adopted_bytes;
    /**
     * The most that was pinned at any time.
     */
    uint64_t high_water_bytes;
    /**
     * What may be pinned at most (TMS_PINNED_LIMIT); UINT64_MAX: as much as the host has.
     */
    uint64_t limit_bytes;
    /**
     * What stays pinned while nobody uses it: TMS_PINNED_KEEP, or what a prewarm asked for if that
     * is more.
     */
    uint64_t keep_bytes;
    /**
     * Part of pinned_bytes that is on huge pages.
     */
    uint64_t huge_page_bytes;
    /**
     * The rest of pinned_bytes: on small pages (4 KiB), or not populated yet.
     */
    uint64_t small_page_bytes;
} tms_pinned_stats_t;

/**
 * How an engine is made. Zero-fill it, then set struct_size.
 */
typedef struct {
    /**
     * sizeof this struct.
     */
    uint32_t struct_size;
    /**
     * Must be 0.
     */
    uint32_t flags;
    /**
     * "auto", "cuda" or "host"; NULL: the devices of the default saver.
     */
    const char *device;
    /**
     * Threads that copy to and from pageable memory, at most. 0: as many as are of use; more than
     * there are cores, or than 16, are never started.
     */
    uint32_t threads;
    /**
     * Number of devices.
     */
    uint32_t device_count;
    /**
     * Ordinals of the devices that copies may use; with device_count 0 all, and this may be NULL.
     */
    const int32_t *devices;
    /**
     * Pinned memory that bytes pass through on their way to and from pageable memory, bytes, up to
     * 1 TiB; rounded up to whole slots of 4 MiB, at least two. 0: two slots for each thread. It is
     * taken when first needed.
     */
    uint64_t staging_bytes;
} tms_transfer_options_t;

/**
 * What memory a pointer is. Set struct_size before the call.
 */
typedef struct {
    /**
     * sizeof this struct.
     */
    uint32_t struct_size;
    /**
     * A TMS_MEMORY constant.
     */
    int32_t kind;
    /**
     * Ordinal of the device, −1 unless kind is TMS_MEMORY_DEVICE.
     */
    int32_t device;
    /**
     * 0.
     */
    uint32_t reserved;
    /**
     * First byte of the memory around the pointer; for pageable memory the pointer itself.
     */
    void *start;
    /**
     * Bytes from start; 0 if not known, which is so for pageable memory.
     */
    uint64_t bytes;
} tms_pointer_info_t;

/**
 * One piece of a batch.
 */
typedef struct {
    /**
     * Where the bytes go.
     */
    void *dst;
    /**
     * Where they come from.
     */
    const void *src;
    /**
     * How many; 0 is fine.
     */
    size_t bytes;
} tms_copy_t;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version as text, for example "0.1.0". Static; never NULL. Any thread.
 */
const char *tms_version(void);

/**
 * The version as a number: major × 65536 + minor × 256 + patch. Any thread.
 */
uint32_t tms_version_number(void);

/**
 * The version of the binary interface of the loaded library. Compare with TMS_ABI_VERSION.
 * Any thread.
 */
uint32_t tms_abi_version(void);

/**
 * A short English phrase for a status code; "unknown status" for codes that do not exist.
 * Static; never NULL. Needs no state. Any thread.
 */
const char *tms_status_str(int32_t code);

/**
 * The message of the last failed call on the calling thread, with the argument, address or file
 * at fault; "" if no call failed. Successful calls do not change it. Owned by the library, valid
 * until the next failed call on this thread. Never NULL.
 */
const char *tms_last_error_message(void);

/**
 * Sets or removes the callback for log records.
 *
 * `callback` may be NULL: then records are no longer delivered. When the function returns, no call of
 * the callback before is running. `user` is passed through and may be NULL; it must stay valid until
 * the callback is removed. `level` is the highest level to deliver, TMS_LOG_ERROR to TMS_LOG_DEBUG.
 * One callback a process. Any thread, but not from the callback.
 *
 * What TMS_LOG shows on stderr is shown all the same. How many records were dropped is told by a
 * record.
 *
 * Returns TMS_OK, TMS_ERR_INVALID_ARGUMENT or TMS_ERR_FORKED.
 */
int32_t tms_log_set_callback(tms_log_callback_t callback,
                             void *user,
                             int32_t level);

/**
 * Waits until all records raised so far were delivered, at most `timeout_ms` milliseconds. Any
 * thread, but not from the callback.
 *
 * Returns TMS_OK, or TMS_ERR_TIMEOUT.
 */
int32_t tms_log_flush(uint32_t timeout_ms);

/**
 * Number of devices of the default saver's platform.
 *
 * `count` receives it; not NULL. Opens the platform on the first call. Any thread.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER, or why no device can be used (TMS_ERR_NO_DEVICE,
 * TMS_ERR_DEVICE, TMS_ERR_INVALID_ARGUMENT for a bad TMS_DEVICE).
 */
int32_t tms_device_count(uint32_t *count);

/**
 * Describes a device of the default saver's platform and makes it ready.
 *
 * `device` is an ordinal, or −1 for the thread's current device. `info` is filled; not NULL, its
 * struct_size must be set. Any thread.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT (no such device), or why no
 * device can be used.
 */
int32_t tms_device_info(int32_t device,
                        tms_device_info_t *info);

/**
 * Enters a region on the calling thread: until the matching tms_region_pop, its allocations (by
 * tms_saver_malloc without options, tms_torch_malloc and the cudaMalloc hook) follow `options`.
 * Regions nest.
 *
 * `options`: not NULL; nothing in it is kept.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER, or TMS_ERR_INVALID_ARGUMENT naming the field.
 */
int32_t tms_region_push(const tms_region_options_t *options);

/**
 * Leaves the region that the calling thread entered last, and restores exactly what was before.
 *
 * Returns TMS_OK, or TMS_ERR_INVALID_ARGUMENT if there is none.
 */
int32_t tms_region_pop(void);

/**
 * Whether the operation has ended. Touches no device and takes no lock that one is waited for with.
 *
 * `op`, `done`: not NULL; `done` receives 1 or 0. Any thread.
 *
 * Returns TMS_OK or TMS_ERR_NULL_POINTER.
 */
int32_t tms_op_poll(const tms_op_t *op,
                    int32_t *done);

/**
 * Waits for the end of the operation, at most `timeout_ms` milliseconds (TMS_WAIT_FOREVER: without
 * a deadline).
 *
 * `op`: not NULL. Any thread, several at once.
 *
 * Returns the status of the operation, with its message; TMS_ERR_TIMEOUT if it still runs (no
 * operation ends with that code); TMS_ERR_NULL_POINTER; TMS_ERR_FORKED in a forked child.
 */
int32_t tms_op_wait(const tms_op_t *op,
                    uint64_t timeout_ms);

/**
 * How far the operation is, in bytes copied.
 *
 * `op`, `done_bytes`, `total_bytes`: not NULL. The total is 0 until the selection is known, and
 * stays 0 if nothing has to be copied. Any thread.
 *
 * Returns TMS_OK or TMS_ERR_NULL_POINTER.
 */
int32_t tms_op_progress(const tms_op_t *op, uint64_t *done_bytes, uint64_t *total_bytes);

/**
 * What the operation did, once it has ended.
 *
 * `op`, `result`: not NULL. Any thread.
 *
 * Returns the status of the operation, TMS_ERR_TIMEOUT if it still runs (result is not written),
 * TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT.
 */
int32_t tms_op_result(const tms_op_t *op,
                      tms_result_t *result);

/**
 * A descriptor that becomes readable when the operation ends, and stays so: for poll, epoll or an
 * event loop.
 *
 * `op`, `fd`: not NULL. The descriptor belongs to the operation and is valid until
 * tms_op_free: do not close or read it. Any thread.
 *
 * Returns TMS_OK or TMS_ERR_NULL_POINTER.
 */
int32_t tms_op_eventfd(const tms_op_t *op,
                       int32_t *fd);

/**
 * Frees the handle. A running operation goes on to its end.
 *
 * `op` may be NULL. Returns TMS_OK.
 */
int32_t tms_op_free(tms_op_t *op);

/**
 * Makes a saver with allocations of its own.
 *
 * `options` may be NULL. `saver` receives the handle, to be freed with tms_saver_free; not NULL.
 * Any thread.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT, or why no device can be used
 * (TMS_ERR_NO_DEVICE, TMS_ERR_DEVICE).
 */
int32_t tms_saver_create(const tms_saver_options_t *options,
                         tms_saver_t **saver);

/**
 * The saver of the process, the one behind the compatible names and the hooks.
 *
 * `saver` receives a handle that belongs to the library and is never freed; not NULL. Any thread.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER, or why no device can be used.
 */
int32_t tms_saver_default(const tms_saver_t **saver);

/**
 * Frees a saver and every allocation of it. No other call may use the handle any more.
 *
 * `saver` may be NULL. The default saver cannot be freed.
 *
 * Returns TMS_OK; TMS_ERR_BUSY while an operation of the saver runs (nothing was freed);
 * TMS_ERR_INVALID_ARGUMENT for the default saver; TMS_ERR_FORKED.
 */
int32_t tms_saver_free(tms_saver_t *saver);

/**
 * Allocates device memory that can be paused.
 *
 * `saver`: not NULL. `bytes`: more than 0; rounded up to the device's granularity (2 MiB on
 * NVIDIA GPUs). `device`: an ordinal, or −1 for the thread's current device. `options`: how to
 * treat the allocation (not TMS_REGION_DISABLED); NULL: as the thread's region says, or its defaults
 * outside of one.
 * `pointer` receives the device address; not NULL; freed with tms_saver_free_memory. New memory
 * is zeroed. Any thread.
 *
 * Returns TMS_OK; TMS_ERR_OUT_OF_DEVICE_MEMORY if the memory is not there, or if less would stay free
 * than tms_saver_set_memory_margin asked for; TMS_ERR_OUT_OF_HOST_MEMORY if there are no addresses
 * left; TMS_ERR_NULL_POINTER; TMS_ERR_INVALID_ARGUMENT; TMS_ERR_UNSUPPORTED (export on a device that
 * cannot); TMS_ERR_DEVICE.
 */
int32_t tms_saver_malloc(const tms_saver_t *saver,
                         size_t bytes,
                         int32_t device,
                         const tms_region_options_t *options,
                         void **pointer);

/**
 * Frees an allocation of this saver.
 *
 * `pointer` is the address that malloc gave, or NULL. Active memory is freed when all work queued
 * on its device is done; paused memory at once; memory that an operation works on when that
 * operation ends. Any thread.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER (saver), TMS_ERR_NOT_FOUND (not an allocation of this
 * saver), TMS_ERR_FORKED, TMS_ERR_SHUTDOWN.
 */
int32_t tms_saver_free_memory(const tms_saver_t *saver,
                              void *pointer);

/**
 * Pauses a selection: secures every backup, then releases the physical memory. Addresses stay.
 *
 * All work queued on the affected devices is waited for first. If a backup fails, nothing was
 * released and all stays active. Pausing what is paused does nothing and is counted. Contents of
 * allocations without a backup do not survive. A tag that no allocation has selects nothing and is no
 * error (a warning in the log): look at done_count and unchanged_count. Pausing during a stream
 * capture is the caller's error, refused where it can be seen. Work of other contexts and processes
 * on the memory is the caller's duty.
 *
 * `saver`: not NULL. `options`: NULL selects everything. `result`: may be NULL. Any thread; one
 * pause or resume of a saver runs at a time, malloc and free do not wait for it.
 *
 * Returns TMS_OK; TMS_ERR_PARTIAL (some could not be released and stay active, see result); or an
 * error after which everything is as before: TMS_ERR_OUT_OF_HOST_MEMORY, TMS_ERR_IO,
 * TMS_ERR_NO_SPACE, TMS_ERR_NOT_FOUND (a folder), TMS_ERR_EXPORTED, TMS_ERR_CAPTURE,
 * TMS_ERR_DEVICE, TMS_ERR_DEVICE_LOST, TMS_ERR_INVALID_ARGUMENT, TMS_ERR_NULL_POINTER,
 * TMS_ERR_FORKED, TMS_ERR_SHUTDOWN.
 */
int32_t tms_saver_pause(const tms_saver_t *saver,
                        const tms_pause_options_t *options,
                        tms_result_t *result);

/**
 * Resumes a selection: creates and maps all memory, then loads the contents. When it returns they
 * are complete for every stream.
 *
 * If device memory is short it waits up to options.wait_ms, then everything stays paused and the
 * call can be repeated. An allocation whose backup cannot be loaded stays paused, with its backup.
 * Resuming what is active does nothing and is counted.
 *
 * Parameters and threads as for tms_saver_pause.
 *
 * Returns TMS_OK; TMS_ERR_PARTIAL; TMS_ERR_OUT_OF_DEVICE_MEMORY (all stays paused); the error of
 * the first allocation if none could be resumed (TMS_ERR_CORRUPT, TMS_ERR_IO, TMS_ERR_DEVICE,
 * TMS_ERR_DEVICE_LOST); TMS_ERR_INVALID_ARGUMENT; TMS_ERR_NULL_POINTER; TMS_ERR_FORKED;
 * TMS_ERR_SHUTDOWN.
 */
int32_t tms_saver_resume(const tms_saver_t *saver,
                         const tms_resume_options_t *options,
                         tms_result_t *result);

/**
 * tms_saver_pause on a thread of the library.
 *
 * `op` receives the operation, to be freed with tms_op_free; not NULL. Nothing in `options` is
 * kept. Operations of a saver run in the order they were started.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT, TMS_ERR_FORKED,
 * TMS_ERR_SHUTDOWN, TMS_ERR_IO (no thread or descriptor).
 */
int32_t tms_saver_pause_async(const tms_saver_t *saver,
                              const tms_pause_options_t *options,
                              tms_op_t **op);

/**
 * tms_saver_resume on a thread of the library. While it waits for memory, other operations run.
 *
 * Parameters and errors as for tms_saver_pause_async.
 */
int32_t tms_saver_resume_async(const tms_saver_t *saver,
                               const tms_resume_options_t *options,
                               tms_op_t **op);

/**
 * Bytes and counts, one entry for each tag and device that has allocations, sorted.
 *
 * `entries`: array of `capacity` entries, the first with struct_size set; NULL if capacity is 0.
 * `count` receives how many entries there are, also when fewer fit; not NULL. Any thread.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT.
 */
int32_t tms_saver_stats(const tms_saver_t *saver,
                        tms_stats_t *entries,
                        size_t capacity,
                        size_t *count);

/**
 * Describes the allocation that contains an address.
 *
 * `pointer`: any address inside an allocation of this saver. `info` is filled; not NULL, its
 * struct_size must be set. Any thread.
 *
 * Returns TMS_OK, TMS_ERR_NOT_FOUND, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT.
 */
int32_t tms_saver_query(const tms_saver_t *saver,
                        const void *pointer,
                        tms_allocation_info_t *info);

/**
 * Host memory with the backup of a range: of a paused allocation, and of an active one whose
 * region retains backups. What is written there is what a resume restores; an edit while the
 * allocation is active is overwritten by the next pause.
 *
 * `pointer`, `bytes`: a range inside one allocation. `backup` receives the address; not NULL. The
 * memory belongs to the library and is valid until the allocation is resumed without retention or
 * freed. Any thread.
 *
 * Returns TMS_OK; TMS_ERR_NOT_FOUND if there is no such backup in host memory;
 * TMS_ERR_NULL_POINTER.
 */
int32_t tms_saver_backup_pointer(const tms_saver_t *saver,
                                 const void *pointer,
                                 size_t bytes,
                                 void **backup);

/**
 * Sets how much memory of a device malloc leaves free.
 *
 * `device`: an ordinal, or −1 for all devices. `bytes`: 0 removes the margin. Any thread.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT.
 */
int32_t tms_saver_set_memory_margin(const tms_saver_t *saver, int32_t device, uint64_t bytes);

/**
 * A file descriptor of the physical memory of an active allocation of an exportable region, which
 * another process can import. From then on the allocation cannot be paused: the other side would
 * keep the old memory.
 *
 * `fd` receives the descriptor, which the caller closes; not NULL. `bytes` receives the size of
 * the memory; may be NULL. Any thread.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_NOT_FOUND, TMS_ERR_UNSUPPORTED (not exportable),
 * TMS_ERR_BUSY (not active), TMS_ERR_DEVICE.
 */
int32_t tms_saver_export(const tms_saver_t *saver,
                         const void *pointer,
                         int32_t *fd,
                         uint64_t *bytes);

/**
 * Resumes the given allocations, and no others, on a thread of the library, so that the first can be
 * used while the rest arrives.
 *
 * Everything is created and mapped before the first allocation is ready; then the contents arrive in
 * the order given. tms_op_stream_wait and tms_op_ready tell of each allocation; an allocation that is
 * ready can be used, queried, and freed like an active one (its memory goes when the operation ends).
 * A failure later on leaves what is ready active and the rest paused: the operation ends with
 * TMS_ERR_PARTIAL and lists them. While device memory is short it waits up to options.wait_ms, and
 * other operations run; then everything stays paused.
 *
 * `saver`: not NULL. `pointers`: array of `count` addresses, each anywhere in an allocation of this
 * saver, in the order of need; NULL if count is 0; not kept. The same allocation may be named twice
 * and may be active already. `options`: NULL for defaults; naming tags is refused. `op` receives the
 * operation, to be freed with tms_op_free; not NULL. Any thread. Operations of a saver run in the
 * order they were started.
 *
 * Returns TMS_OK; TMS_ERR_NOT_FOUND for a pointer in no allocation, named by its index;
 * TMS_ERR_NULL_POINTER; TMS_ERR_INVALID_ARGUMENT; TMS_ERR_FORKED; TMS_ERR_SHUTDOWN; TMS_ERR_IO (no
 * thread or descriptor). The operation ends as tms_saver_resume does.
 */
int32_t tms_saver_resume_ordered_async(const tms_saver_t *saver,
                                       void *const *pointers,
                                       size_t count,
                                       const tms_resume_options_t *options,
                                       tms_op_t **op);

/**
 * Makes a stream of the caller wait for the contents of one allocation of an ordered resume: work
 * queued on the stream afterwards sees them.
 *
 * Returns at once if the contents are complete or on their way to the device. Where they are not on
 * their way yet, the calling thread waits until they are: until all memory is mapped, and for
 * contents from other backups than "pinned" until they have arrived. Never call it while holding
 * something that frees the device memory which the resume waits for. On the host device, which has
 * no streams of the caller, the calling thread waits until the contents are complete.
 *
 * If copying fails after the call has returned, the operation ends with an error that lists the
 * allocation. After the operation has ended nothing is waited for.
 *
 * `op`: of tms_saver_resume_ordered_async; not NULL. `pointer`: anywhere in one of its allocations.
 * `stream`: a CUstream of any device, not being captured; NULL: the legacy default stream. Any
 * thread, several at once.
 *
 * Returns TMS_OK; the error of the allocation if it stays paused; TMS_ERR_NOT_FOUND if the operation
 * does not resume such an allocation, or it was freed before; TMS_ERR_NULL_POINTER (op);
 * TMS_ERR_INVALID_ARGUMENT (another kind of operation); TMS_ERR_CAPTURE; TMS_ERR_DEVICE;
 * TMS_ERR_FORKED; TMS_ERR_SHUTDOWN.
 */
int32_t tms_op_stream_wait(const tms_op_t *op,
                           const void *pointer,
                           void *stream);

/**
 * Whether the contents of one allocation of an ordered resume are complete, for every stream. Touches
 * no device and waits for nothing.
 *
 * `op`: of tms_saver_resume_ordered_async; not NULL. `pointer`: anywhere in one of its allocations.
 * `ready`: receives 1 or 0; not NULL. Any thread.
 *
 * Returns TMS_OK; the error of the allocation if it stays paused; TMS_ERR_NOT_FOUND,
 * TMS_ERR_NULL_POINTER and TMS_ERR_INVALID_ARGUMENT as tms_op_stream_wait; TMS_ERR_FORKED.
 */
int32_t tms_op_ready(const tms_op_t *op,
                     const void *pointer,
                     int32_t *ready);

/**
 * Populates and pins host memory ahead of need, so that the next pause with pinned backups finds
 * it: pinning takes longer than copying. For instance while a model is loading.
 *
 * When it returns, at least `bytes` are pinned beyond what is used now; memory that is idle
 * already counts. It is shared by all devices of the saver; `device` says near which of them it
 * is taken. From then on that much stays pinned while nobody uses it, also across pauses and
 * resumes and if it is more than TMS_PINNED_KEEP, until tms_saver_trim to less, or until the host
 * runs short of memory. Freeing an allocation with a retained backup gives back the chunk that the
 * backup was in, if nothing else is in it, prewarmed or not.
 *
 * Memory comes in chunks of 1 GiB, or of the largest allocation that exists on the device at the
 * time of the call: a larger backup does not fit into them and takes new memory. If the call fails,
 * nothing of it is kept.
 *
 * `saver`: not NULL. `device`: an ordinal, or −1 for the thread's current device. `bytes`: more
 * than 0. Any thread; a pause may run meanwhile and uses what is ready.
 *
 * Returns TMS_OK; TMS_ERR_OUT_OF_HOST_MEMORY (TMS_PINNED_LIMIT, or the host or a control group has
 * not enough left); TMS_ERR_NULL_POINTER; TMS_ERR_INVALID_ARGUMENT; TMS_ERR_DEVICE;
 * TMS_ERR_FORKED; TMS_ERR_SHUTDOWN.
 */
int32_t tms_saver_prewarm(const tms_saver_t *saver,
                          int32_t device,
                          uint64_t bytes);

/**
 * tms_saver_prewarm on a thread of the library.
 *
 * `op` receives the operation, to be freed with tms_op_free; not NULL. Its progress counts the
 * bytes that are pinned. Operations of a saver run in the order they were started: a pause started
 * after it waits for it.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT, TMS_ERR_FORKED,
 * TMS_ERR_SHUTDOWN, TMS_ERR_IO (no thread or descriptor).
 */
int32_t tms_saver_prewarm_async(const tms_saver_t *saver,
                                int32_t device,
                                uint64_t bytes,
                                tms_op_t **op);

/**
 * Unpins host memory that nobody uses, prewarmed memory too, until at most `keep_bytes` of it are
 * left. Memory goes in whole chunks. The contents of backups are not touched.
 *
 * `saver`: not NULL. `keep_bytes`: 0 gives back all that is idle; what a prewarm keeps from then
 * on is no more than this. `released` receives the bytes that were given back; may be NULL. Any
 * thread.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_FORKED, TMS_ERR_SHUTDOWN.
 */
int32_t tms_saver_trim(const tms_saver_t *saver,
                       uint64_t keep_bytes,
                       uint64_t *released);

/**
 * Figures of the saver's pinned host memory.
 *
 * `saver`: not NULL. `stats` is filled; not NULL, its struct_size must be set. Any thread. Asks
 * the system about the pages of the process, which takes milliseconds where there are thousands of
 * mappings.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT.
 */
int32_t tms_saver_pinned_stats(const tms_saver_t *saver,
                               tms_pinned_stats_t *stats);

/**
 * Makes an engine with threads, staging memory and a transfer table of its own.
 *
 * `options` may be NULL. `engine` receives the handle, to be freed with tms_transfer_engine_free;
 * not NULL. Nothing is allocated on a device, and no thread started, before the first copy. Any
 * thread.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT naming the field, or why no device
 * can be used (TMS_ERR_NO_DEVICE, TMS_ERR_DEVICE).
 */
int32_t tms_transfer_engine_create(const tms_transfer_options_t *options,
                                   tms_transfer_engine_t **engine);

/**
 * Frees an engine: waits for copies on streams that use its memory, then gives that memory back. No
 * other call may use the handle any more.
 *
 * `engine` may be NULL.
 *
 * Returns TMS_OK; TMS_ERR_BUSY while an operation of the engine runs (nothing was freed);
 * TMS_ERR_FORKED; TMS_ERR_SHUTDOWN.
 */
int32_t tms_transfer_engine_free(tms_transfer_engine_t *engine);

/**
 * What kind of memory a pointer is. One question to the driver; nothing is read at the address.
 *
 * `engine`: NULL for the engine of the process. `pointer`: any address, NULL too. `info` is filled;
 * not NULL, its struct_size must be set. Any thread.
 *
 * Returns TMS_OK; TMS_ERR_INVALID_ARGUMENT for addresses that are reserved for device memory and
 * have none, such as those of a paused allocation; TMS_ERR_NULL_POINTER; TMS_ERR_DEVICE; or why no
 * device can be used.
 */
int32_t tms_pointer_query(const tms_transfer_engine_t *engine,
                          const void *pointer,
                          tms_pointer_info_t *info);

/**
 * By which method a device copies pieces of which size, and how fast each was when measured.
 *
 * Scattered copies choose for each piece among a kernel that reads a list of pieces ("kernel"), one
 * call of the driver for many ("batch") and one call for each ("plain"). The choice is measured on
 * the device when the first batch needs it, which takes some milliseconds and 16 MiB of device
 * memory for that time, and kept while the engine lives; this function measures if that was not done
 * yet. A single piece is always copied plainly, and so is everything in a stream capture.
 *
 * `engine`: NULL for the engine of the process. `device`: an ordinal. `text`: receives lines like
 * `h2d:4096=kernel plain:1.428 batch:3.911 kernel:48.640`, NUL-terminated: direction (h2d, d2h,
 * d2d), the largest piece of the class in bytes (or max), the method chosen, and what was measured in
 * 10⁹ bytes a second. NULL if capacity is 0. `capacity`: bytes of text; if the whole does not fit,
 * nothing is written to it. `needed` receives the bytes of the whole with its end; may be NULL. Any
 * thread.
 *
 * Returns TMS_OK; TMS_ERR_INVALID_ARGUMENT (no such device, a capacity that is not 0 and too small,
 * or a wrong TMS_TRANSFER_TABLE); TMS_ERR_NULL_POINTER; why it could not be measured
 * (TMS_ERR_OUT_OF_DEVICE_MEMORY, TMS_ERR_OUT_OF_HOST_MEMORY, TMS_ERR_DEVICE).
 */
int32_t tms_transfer_table_get(const tms_transfer_engine_t *engine,
                               int32_t device,
                               char *text,
                               size_t capacity,
                               size_t *needed);

/**
 * Chooses methods instead of what was or will be measured. The environment variable
 * TMS_TRANSFER_TABLE does the same for all devices of all engines, with the same text.
 *
 * `engine`: NULL for the engine of the process. `device`: an ordinal. `text`: entries like
 * `h2d:4096=kernel`, separated by commas or line ends; what follows an entry after a space is
 * skipped, so that the text of tms_transfer_table_get can be given back. Sizes are 4096, 16384,
 * 65536, 262144, 1048576 and max. What is not named stays as it is. A method that the device does not
 * have is replaced by the next one that it has: kernel, batch, plain. Not NULL. Any thread.
 *
 * Returns TMS_OK; TMS_ERR_INVALID_ARGUMENT quoting the entry (nothing was changed);
 * TMS_ERR_NULL_POINTER; or why no device can be used.
 */
int32_t tms_transfer_table_set(const tms_transfer_engine_t *engine,
                               int32_t device,
                               const char *text);

/**
 * Copies bytes between any two places and waits: device memory, pinned, managed and pageable host
 * memory. The direction follows from the pointers.
 *
 * `engine`: NULL for the engine of the process. `dst`, `src`: any alignment. They may lie anywhere in
 * their allocations, but must not leave them; neighbouring mappings of one device count as one, and
 * where pageable memory ends only its owner knows: neither is noticed. The two ranges must not
 * overlap. `bytes`: 0 is fine and touches nothing, with any pointers. `certain` receives, on success
 * and on failure, how many bytes from the beginning are certain to be in place; may be NULL.
 *
 * Work that streams have queued on the memory is not waited for: synchronise first, or use the form
 * with a stream. Memory of one device is copied to another directly where they can reach each other,
 * else through the host. Pageable memory passes through pinned staging memory, by several threads.
 * Any thread; several at once.
 *
 * Returns TMS_OK; TMS_ERR_NULL_POINTER naming dst or src; TMS_ERR_INVALID_ARGUMENT naming dst or src
 * (it leaves its memory, and by how many bytes; there is no memory, because it was freed or is
 * paused, though freed memory that is still held, see held_bytes of tms_stats_t, is not noticed; the
 * ranges overlap; memory of a device that the engine was not made for); TMS_ERR_OUT_OF_HOST_MEMORY
 * (no staging memory); TMS_ERR_DEVICE, TMS_ERR_DEVICE_LOST; or why no device can be used.
 */
int32_t tms_memcpy(const tms_transfer_engine_t *engine,
                   void *dst,
                   const void *src,
                   size_t bytes,
                   uint64_t *certain);

/**
 * tms_memcpy in the order of a stream: after the work queued there before, and before the work
 * queued there later.
 *
 * `engine`, `dst`, `src`, `bytes` as for tms_memcpy. `stream`: a CUstream (or cudaStream_t) of the
 * thread's current device, or of the device of the memory if that is another one; NULL for the legacy
 * default stream. Any thread.
 *
 * Device, pinned and managed memory is copied when the stream gets there: it must stay valid, and the
 * bytes are not certain, until then. Where a side is pageable, the call reads the source, or brings
 * the bytes to their destination, before it returns; for the latter, and for copies between places on
 * the host, it waits for the stream. While the stream is being captured, copies of device and pinned
 * memory become part of the graph and others are refused.
 *
 * Returns as tms_memcpy; TMS_ERR_CAPTURE for what cannot be captured. After an error, how much was
 * queued is not known.
 */
int32_t tms_memcpy_on_stream(const tms_transfer_engine_t *engine,
                             void *dst,
                             const void *src,
                             size_t bytes,
                             void *stream);

/**
 * tms_memcpy on a thread of the library.
 *
 * `engine`, `dst`, `src`, `bytes` as for tms_memcpy; the memory must stay valid until the operation
 * has ended. `op` receives the operation, to be freed with tms_op_free; not NULL. Copies of an engine
 * run in the order they were started. tms_op_progress counts bytes; tms_op_wait returns what
 * tms_memcpy would have, argument errors included; copied_bytes of tms_op_result is how many bytes
 * are certain.
 *
 * Returns TMS_OK, TMS_ERR_NULL_POINTER (op), TMS_ERR_FORKED, TMS_ERR_SHUTDOWN, TMS_ERR_IO (no thread
 * or descriptor), or why no device can be used.
 */
int32_t tms_memcpy_async(const tms_transfer_engine_t *engine,
                         void *dst,
                         const void *src,
                         size_t bytes,
                         tms_op_t **op);

/**
 * tms_memcpy from host memory to memory of a device: src must be host memory, dst memory of a
 * device; managed memory may stand for either.
 *
 * Parameters and errors as for tms_memcpy; also TMS_ERR_INVALID_ARGUMENT naming the side that is
 * memory of the other kind.
 */
int32_t tms_memcpy_h2d(const tms_transfer_engine_t *engine,
                       void *dst,
                       const void *src,
                       size_t bytes,
                       uint64_t *certain);

/**
 * tms_memcpy_h2d in the order of a stream. Parameters, rules and errors as for tms_memcpy_on_stream.
 */
int32_t tms_memcpy_h2d_on_stream(const tms_transfer_engine_t *engine,
                                 void *dst,
                                 const void *src,
                                 size_t bytes,
                                 void *stream);

/**
 * tms_memcpy_h2d on a thread of the library. Parameters and errors as for tms_memcpy_async.
 */
int32_t tms_memcpy_h2d_async(const tms_transfer_engine_t *engine,
                             void *dst,
                             const void *src,
                             size_t bytes,
                             tms_op_t **op);

/**
 * tms_memcpy from memory of a device to host memory: src must be memory of a device, dst host
 * memory; managed memory may stand for either.
 *
 * Parameters and errors as for tms_memcpy; also TMS_ERR_INVALID_ARGUMENT naming the side that is
 * memory of the other kind.
 */
int32_t tms_memcpy_d2h(const tms_transfer_engine_t *engine,
                       void *dst,
                       const void *src,
                       size_t bytes,
                       uint64_t *certain);

/**
 * tms_memcpy_d2h in the order of a stream. Parameters, rules and errors as for tms_memcpy_on_stream.
 */
int32_t tms_memcpy_d2h_on_stream(const tms_transfer_engine_t *engine,
                                 void *dst,
                                 const void *src,
                                 size_t bytes,
                                 void *stream);

/**
 * tms_memcpy_d2h on a thread of the library. Parameters and errors as for tms_memcpy_async.
 */
int32_t tms_memcpy_d2h_async(const tms_transfer_engine_t *engine,
                             void *dst,
                             const void *src,
                             size_t bytes,
                             tms_op_t **op);

/**
 * tms_memcpy from memory of a device to memory of the same or another device: both must be memory
 * of devices; managed memory may stand for either.
 *
 * Parameters and errors as for tms_memcpy; also TMS_ERR_INVALID_ARGUMENT naming the side that is
 * memory of the other kind.
 */
int32_t tms_memcpy_d2d(const tms_transfer_engine_t *engine,
                       void *dst,
                       const void *src,
                       size_t bytes,
                       uint64_t *certain);

/**
 * tms_memcpy_d2d in the order of a stream. Parameters, rules and errors as for tms_memcpy_on_stream.
 */
int32_t tms_memcpy_d2d_on_stream(const tms_transfer_engine_t *engine,
                                 void *dst,
                                 const void *src,
                                 size_t bytes,
                                 void *stream);

/**
 * tms_memcpy_d2d on a thread of the library. Parameters and errors as for tms_memcpy_async.
 */
int32_t tms_memcpy_d2d_async(const tms_transfer_engine_t *engine,
                             void *dst,
                             const void *src,
                             size_t bytes,
                             tms_op_t **op);

/**
 * Copies many pieces, of any sizes and any mix of directions, and waits.
 *
 * `engine`: NULL for the engine of the process. `copies`: `count` entries; may be NULL if count is 0.
 * Each is a copy by the rules of tms_memcpy. Pieces are copied in any order and at the same time, so
 * what a byte holds is not defined where a destination overlaps another destination or another source.
 * Neighbours are joined; pieces that a device reaches by itself are copied by the method that its
 * transfer table has for their size (tms_transfer_table_get), others are packed into staging memory.
 * `certain` receives, on success and on failure, how many bytes of the concatenation of all pieces,
 * from its beginning, are certain to be in place; may be NULL. Any thread; several at once.
 *
 * Arguments are checked in steps, the first of 512 pieces, while earlier pieces are being copied:
 * when a later piece is refused, earlier steps were copied.
 *
 * Returns as tms_memcpy, with the number of the piece in the message; TMS_ERR_NULL_POINTER also for
 * copies; TMS_ERR_INVALID_ARGUMENT also for a count that no array has, and a wrong
 * TMS_TRANSFER_TABLE.
 */
int32_t tms_memcpy_batch(const tms_transfer_engine_t *engine,
                         const tms_copy_t *copies,
                         size_t count,
                         uint64_t *certain);

/**
 * tms_memcpy_batch in the order of a stream. `copies` is not needed any more when this returns; for
 * the memory, and for `stream`, the rules of tms_memcpy_on_stream hold. Pieces of other devices than
 * the stream's are ordered by events.
 *
 * Returns as tms_memcpy_batch; TMS_ERR_CAPTURE for what cannot be captured.
 */
int32_t tms_memcpy_batch_on_stream(const tms_transfer_engine_t *engine,
                                   const tms_copy_t *copies,
                                   size_t count,
                                   void *stream);

/**
 * tms_memcpy_batch on a thread of the library. `copies` is not needed any more when this returns.
 * Other parameters and errors as for tms_memcpy_async; TMS_ERR_NULL_POINTER also for copies.
 */
int32_t tms_memcpy_batch_async(const tms_transfer_engine_t *engine,
                               const tms_copy_t *copies,
                               size_t count,
                               tms_op_t **op);

/**
 * Copies `height` rows of `width` bytes, which begin `dst_pitch` and `src_pitch` bytes apart, and
 * waits. The direction follows from the pointers.
 *
 * `engine`: NULL for the engine of the process. `dst`, `src`: the first byte of the first row, by the
 * rules of tms_memcpy for everything up to the end of the last row. No row may overlap a row of the
 * other side; columns of one matrix (the same pitch) may be copied to others of its columns. Pitches
 * must not be less than the width, unless there is only one row. A width or height of 0 is fine and
 * touches nothing. Bytes between the rows are not changed. `certain` receives, on success and on
 * failure, how many bytes of the rows, in order, are certain to be in place; may be NULL. Any thread.
 *
 * Returns as tms_memcpy; TMS_ERR_INVALID_ARGUMENT also naming dst_pitch, src_pitch or height.
 */
int32_t tms_memcpy_2d(const tms_transfer_engine_t *engine,
                      void *dst,
                      size_t dst_pitch,
                      const void *src,
                      size_t src_pitch,
                      size_t width,
                      size_t height,
                      uint64_t *certain);

/**
 * tms_memcpy_2d in the order of a stream. Rules of memory and `stream` as for tms_memcpy_on_stream,
 * other parameters and errors as for tms_memcpy_2d.
 */
int32_t tms_memcpy_2d_on_stream(const tms_transfer_engine_t *engine,
                                void *dst,
                                size_t dst_pitch,
                                const void *src,
                                size_t src_pitch,
                                size_t width,
                                size_t height,
                                void *stream);

/**
 * tms_memcpy_2d on a thread of the library. `op` and errors as for tms_memcpy_async, other parameters
 * as for tms_memcpy_2d.
 */
int32_t tms_memcpy_2d_async(const tms_transfer_engine_t *engine,
                            void *dst,
                            size_t dst_pitch,
                            const void *src,
                            size_t src_pitch,
                            size_t width,
                            size_t height,
                            tms_op_t **op);

/**
 * Sets the tag of allocations that the calling thread makes from now on.
 *
 * `tag`: 1 to 255 bytes of UTF-8; NULL or "" means "default". A bad tag is logged and ignored.
 */
void tms_set_current_tag(const char *tag);

/**
 * The calling thread's tag. Owned by the library, valid until the thread sets another tag or enters
 * or leaves a region. Never NULL.
 */
const char *tms_get_current_tag(void);

/**
 * Whether allocations of the calling thread are to be pausable, that is, whether it is in a region.
 */
void tms_set_interesting_region(bool enabled);

/**
 * Whether the calling thread is in a region.
 */
bool tms_get_interesting_region(void);

/**
 * Whether allocations of the calling thread keep their contents in host memory while paused.
 */
void tms_set_enable_cpu_backup(bool enabled);

/**
 * See tms_set_enable_cpu_backup.
 */
bool tms_get_enable_cpu_backup(void);

/**
 * Which host memory the calling thread's allocations are kept in: "pinned" or "mmap". Anything
 * else is logged and ignored.
 */
void tms_set_cpu_backup_backend(const char *name);

/**
 * The calling thread's host backend. Owned by the library, valid until the thread sets another or
 * enters or leaves a region. Never NULL.
 */
const char *tms_get_cpu_backup_backend(void);

/**
 * Whether allocations of the calling thread keep their contents in files while paused. Not
 * together with host memory: an allocation that asks for both is refused with a message.
 */
void tms_set_enable_disk_backup(bool enabled);

/**
 * See tms_set_enable_disk_backup.
 */
bool tms_get_enable_disk_backup(void);

/**
 * The folder of file backups made from now on, for the process. NULL or "": TMS_DISK_BACKUP_DIR,
 * else the system's temporary folder.
 */
void tms_set_disk_backup_dir(const char *folder);

/**
 * Sets by one name where allocations of the calling thread keep their contents while paused: "cpu"
 * or "pinned", "mmap", "nvme" or "file", or "none".
 *
 * Returns TMS_OK; TMS_ERR_NULL_POINTER; TMS_ERR_INVALID_ARGUMENT, with the known names, for
 * another name, and then nothing changed.
 */
int tms_set_storage_backend_type(const char *name);

/**
 * Where allocations of the calling thread keep their contents: "pinned", "mmap", "file" or "none".
 * Static; never NULL.
 */
const char *tms_get_storage_backend_type(void);

/**
 * Describes a Mooncake cluster as a place for backups. This build has no such backend.
 *
 * All strings may be NULL: address of this host, metadata server, master, protocol ("tcp" or
 * "rdma"), device names.
 *
 * Returns TMS_ERR_UNSUPPORTED.
 */
int tms_set_mooncake_config(const char *local_hostname,
                            const char *metadata_server,
                            const char *master_server_address,
                            const char *protocol,
                            const char *device_name);

/**
 * Whether backups in host memory stay after a resume, at the same address in every cycle, for
 * regions that do not say. For the process; decided when a resume ends.
 */
void tms_set_retain_cpu_backup(bool retain);

/**
 * See tms_set_retain_cpu_backup. Initially what TMS_RETAIN_CPU_BACKUP says.
 */
bool tms_get_retain_cpu_backup(void);

/**
 * Pauses the allocations of the default saver with a tag. See tms_saver_pause.
 *
 * `tag`: NULL or "" selects all. A process that never allocated has nothing to pause: success.
 *
 * Returns TMS_OK or the error of tms_saver_pause; a failure is logged, and aborts the process if
 * TMS_ON_ERROR=abort.
 */
int tms_pause(const char *tag);

/**
 * Resumes the allocations of the default saver with a tag. See tms_saver_resume.
 *
 * `tag`: NULL or "" selects all. Waits for device memory as long as TMS_RESUME_WAIT_MS says,
 * 60,000 ms if unset; after that everything stays paused and the call can be repeated.
 *
 * Returns TMS_OK or the error of tms_saver_resume; a failure is logged, and aborts the process if
 * TMS_ON_ERROR=abort.
 */
int tms_resume(const char *tag);

/**
 * Host memory with the backup of `size` bytes at the device address `gpu`, NULL if there is none.
 * See tms_saver_backup_pointer.
 */
uint8_t *tms_get_cpu_backup_pointer(const uint8_t *gpu,
                                    uint64_t size);

/**
 * For hooks: allocates from the default saver as the calling thread's region, or its defaults, say.
 *
 * `pointer` receives the address; not NULL. `bytes`: more than 0. `device`: an ordinal, or −1.
 *
 * Returns what tms_saver_malloc returns.
 */
int tms_hook_malloc(void **pointer,
                    size_t bytes,
                    int device);

/**
 * For hooks: frees an allocation of the default saver. While `stream` (a CUstream, NULL for the
 * legacy stream) is being captured, the release is put off.
 *
 * Returns TMS_OK; TMS_ERR_NOT_FOUND if the pointer is not ours: it belongs to the real runtime;
 * TMS_ERR_FORKED; TMS_ERR_SHUTDOWN.
 */
int tms_hook_free(void *pointer, void *stream);

/**
 * For hooks: whether a pointer lies in pinned memory of the default saver.
 */
bool tms_hook_is_pinned(const void *pointer);

/**
 * For hooks: how many bytes of every device allocations of the default saver leave free.
 *
 * Returns TMS_OK, or why no device can be used.
 */
int tms_hook_set_memory_margin(uint64_t bytes);

/**
 * The malloc of PyTorch's CUDAPluggableAllocator. Inside or outside a region, the allocation
 * follows the calling thread's settings.
 *
 * `size`: bytes, rounded up to 2 MiB on NVIDIA GPUs. `device`: ordinal. `stream`: not used.
 *
 * Returns the device address, or NULL on any failure; then PyTorch empties its cache and tries
 * again, and tms_last_error_message tells why.
 */
void *tms_torch_malloc(ptrdiff_t size, int device, void *stream);

/**
 * The free of PyTorch's CUDAPluggableAllocator. Any thread, in or outside a region, also while the
 * interpreter shuts down.
 *
 * `pointer`: from tms_torch_malloc, or NULL. `size`, `device`: not used. `stream`: if it is being
 * captured, the release is put off.
 */
void tms_torch_free(void *pointer,
                    ptrdiff_t size,
                    int device,
                    void *stream);

/**
 * Frees the default saver with every allocation of it, stops its threads and gives its devices
 * back. Savers of tms_saver_create are not touched. A later call that needs the default saver
 * makes a new one. Not needed at exit. Any thread; no other thread may use the default saver or its
 * memory meanwhile.
 *
 * Returns TMS_OK, also if there is nothing to free; TMS_ERR_BUSY while an operation runs (nothing
 * was freed); TMS_ERR_FORKED; TMS_ERR_SHUTDOWN.
 */
int32_t tms_shutdown(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* TMS_H */
