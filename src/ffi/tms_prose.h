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
