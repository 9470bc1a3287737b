/* What the source files share: the one lock, the objects behind handles, and the helpers that
 * work on them. Every function declared here expects the lock to be held, unless it says so.
 *
 * One mutex protects everything. It is dropped while bytes are copied, while kernels and host
 * functions run, and while a stream is late. */
#ifndef FAKECUDA_INTERNAL_H
#define FAKECUDA_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "driver.h"
#include "fakecuda.h"

enum { MAX_DEVICES = 16, MAX_CAPTURE_STREAMS = 16 };
#define GRANULARITY ((size_t)2 << 20)

/* ---- Entry and exit of a driver call: entry.c ---- */

/* What a call needs before it may run. */
enum {
    NEEDS_NOTHING = 0,
    NEEDS_INIT = 1,                   /* cuInit succeeded */
    NEEDS_HEALTH = NEEDS_INIT | 2,    /* no sticky error */
    NEEDS_CONTEXT = NEEDS_HEALTH | 4, /* a current context */
    UNSAFE_IN_CAPTURE = 8,
};

struct call_site {
    const char *name;
    struct call_site *next;
    uint64_t calls;
    bool known;
    bool excluded;
};

/* Takes the lock and returns true if the call may run. Otherwise the lock is not held, and *rc is
 * what the call returns. */
bool call_begin(struct call_site *site, int needs, int *rc);
/* Drops the lock. */
int call_end(int rc);

#define ENTER(needs)                                      \
    static struct call_site site_ = {.name = __func__};   \
    int refused_;                                         \
    if (!call_begin(&site_, (needs), &refused_)) {        \
        return refused_;                                  \
    }

void state_lock(void); /* lock not held; for control functions */
void state_unlock(void);
void state_wait(void);                      /* until something finished */
void state_wait_for(unsigned microseconds); /* the same, at most that long */
void state_wake(void);                      /* something finished, or may start */

/* ---- Settings and accounts ---- */

struct settings {
    int devices;
    int version;
    int init_code;
    unsigned late_us_default;
    unsigned late_us; /* 0 = not late */
    bool host_unreadable;
    bool held;
    bool initialised;
    uint64_t memory[MAX_DEVICES];
    uint64_t external[MAX_DEVICES];
    uint64_t used[MAX_DEVICES];
    uint64_t allocations[MAX_DEVICES];
};
extern struct settings settings;

bool device_valid(int device);
uint64_t device_free_bytes(int device);
unsigned random_below(unsigned limit);
uint64_t next_sequence(void);

/* ---- Faults and counts: fault.c ---- */

/* True on a thread that runs a host function or a kernel model. */
extern _Thread_local bool in_callback;

void fault_add_from_environment(const char *text);
/* Counts the call; true if it is to return *rc instead of running. */
bool fault_check(struct call_site *site, int *rc);
/* Sticky error injected on every context, or 0. */
int fault_poison(void);

/* ---- Handles: object.c. A handle is a number that is never used again. ---- */

enum object_kind {
    OBJECT_STREAM,
    OBJECT_EVENT,
    OBJECT_GRAPH,
    OBJECT_EXEC,
    OBJECT_MODULE,
    OBJECT_FUNCTION,
    OBJECT_PHYSICAL,
    OBJECT_KINDS,
};

struct object {
    uint64_t handle;
    enum object_kind kind;
    struct object *next;
};

void object_add(struct object *object, enum object_kind kind);
void object_remove(struct object *object);
void *object_find(enum object_kind kind, uint64_t handle);
uint64_t object_count(enum object_kind kind);
/* Calls `visit` for every object of a kind; it may remove that object. */
void object_each(enum object_kind kind, void (*visit)(void *object, void *argument), void *argument);

/* ---- Sets of disjoint address ranges: range.c ---- */

struct range {
    uintptr_t base;
    size_t size;
};

struct range_table {
    struct range **items; /* sorted by base */
    size_t count;
    size_t capacity;
};

void *range_containing(const struct range_table *table, uintptr_t address);
/* The lowest range that shares a byte with [base, base + size), or NULL. */
void *range_overlapping(const struct range_table *table, uintptr_t base, size_t size);
bool range_insert(struct range_table *table, struct range *range);
void range_remove(struct range_table *table, struct range *range);

/* ---- Contexts: context.c. There is one, the primary, for each device. ---- */

struct stream;

struct fc_context {
    int device;
    unsigned refs;
    int sticky;
    uint32_t peers;         /* devices whose plain memory this one may use */
    struct stream *streams; /* all of them, the legacy one included */
    struct stream *legacy;
};
extern struct fc_context contexts[MAX_DEVICES];

struct fc_context *context_current(void); /* NULL if none */
bool context_known(CUcontext context);

/* ---- Device memory: vmm.c, plain.c ---- */

struct physical {
    struct object object;
    uint64_t id;
    int fd;
    int device;
    size_t size;
    char *view; /* the driver's own mapping */
    unsigned handle_refs;
    unsigned mapping_refs;
    unsigned pins;
    bool charged;
    CUmemAllocationProp prop;
};

struct reservation {
    struct range range;
    bool plain; /* made by cuMemAlloc */
    uint64_t id;
};

struct mapping {
    struct range range;
    struct physical *physical;
    bool plain;
    bool gone; /* unmapped while a copy used it */
    unsigned pins;
    unsigned char access[MAX_DEVICES];
};

extern struct range_table reservations;
extern struct range_table mappings;

struct physical *physical_create(size_t size, const CUmemAllocationProp *prop, int *rc);
void physical_settle(struct physical *physical); /* frees it if nothing refers to it */
struct reservation *reservation_create(size_t size, size_t alignment, uintptr_t hint, bool plain);
void reservation_destroy(struct reservation *reservation);
struct mapping *mapping_create(uintptr_t base, struct physical *physical, bool plain);
void mapping_destroy(struct mapping *mapping);
void mapping_protect(const struct mapping *mapping);
unsigned mapping_access(const struct mapping *mapping, int device);
/* True if the address was device memory once and nothing else lives there now. */
bool address_is_stale(uintptr_t address);

/* ---- Host memory: host.c ---- */

struct registration {
    struct range range;
    unsigned flags;
    bool owned; /* allocated by the driver */
    int device;
    unsigned in_flight;
    uint64_t id;
};
extern struct range_table registrations;

/* ---- Copies: copy.c ---- */

enum side_kind { SIDE_HOST, SIDE_DEVICE, SIDE_INVALID };
enum { ANY_DEVICE = -1 };

/* One end of a copy, as classified when the copy was queued. */
struct side {
    enum side_kind kind;
    uintptr_t address;
    int device; /* whose rights count; ANY_DEVICE = no check */
    struct registration *registration;
};

/* A contiguous piece of memory the driver may touch. Open and close with the lock, touch without. */
struct span {
    char *bytes;
    size_t size;
    struct mapping *mapping;
};

/* False if no copy may touch the range as a whole. */
bool side_classify(struct side *side, uintptr_t address, size_t size, int device);
struct op;
int copy_run(struct op *op);
int fill_run(struct op *op);
bool span_open(struct span *span, const struct side *side, size_t offset, size_t wanted, unsigned access);
bool span_close(struct span *span); /* false if it was unmapped meanwhile */
void side_hold(struct side *side);
void side_release(struct side *side);
/* Moves bytes between a side and a plain buffer, dropping the lock. 0 or an error code. */
int side_read(const struct side *side, void *out, size_t size);
int side_write(const struct side *side, const void *in, size_t size);

/* ---- Streams: stream.c, worker.c ---- */

enum op_kind { OP_COPY, OP_FILL, OP_KERNEL, OP_HOST, OP_RECORD, OP_WAIT };

struct event_page;

/* One recording of an event. */
struct marker {
    unsigned refs;
    bool done;
    struct timespec when;
    struct event_page *page; /* set if the event is shared between processes */
    uint64_t generation;
};

struct kernel_call {
    char *name;
    unsigned grid[3];
    unsigned block[3];
    unsigned shared_bytes;
    unsigned param_count;
    size_t *sizes;
    void **params; /* into bytes */
    char *bytes;
    size_t byte_count;
};

struct op {
    struct op *next;
    enum op_kind kind;
    uint64_t sequence;
    bool prompt; /* never delayed */
    struct side dst, src;
    size_t size;
    void *staged; /* the source's bytes, taken when the copy was queued */
    unsigned value, width;
    struct kernel_call *kernel;
    CUhostFn function;
    void *argument;
    struct marker *marker;
};

struct capture;

struct stream {
    struct object object;
    struct fc_context *context;
    struct stream *next; /* of the context */
    bool blocking;       /* ordered against the legacy stream */
    bool is_legacy;
    bool destroyed;
    bool running;
    bool per_thread;
    pthread_t owner;  /* of a per-thread stream */
    unsigned waiters; /* threads in stream_drain */
    struct op *head, *tail;
    struct capture *capture;
    unsigned capture_index;
};

struct stream *stream_create(struct fc_context *context, bool blocking);
struct stream *stream_lookup(CUstream handle); /* resolves 0, 1 and 2 too; NULL if unknown */
struct stream *stream_legacy(struct fc_context *context);
void stream_discard(struct stream *stream); /* frees it once its work is done */
void stream_unlink_if_done(struct stream *stream);
/* Queues or captures an operation and owns it from here on. Sets *sequence if it was queued. */
int stream_submit(struct stream *stream, struct op *op, uint64_t *sequence);
void stream_drain(struct stream *stream, uint64_t up_to);
void context_drain(struct fc_context *context);

struct op *op_new(enum op_kind kind);
struct op *op_clone(const struct op *op);
void op_free(struct op *op);
void worker_needed(void);

/* ---- Events: event.c ---- */

struct marker *marker_ref(struct marker *marker);
void marker_unref(struct marker *marker);
bool marker_done(const struct marker *marker);
void marker_complete(struct marker *marker);
void events_destroy_of(struct fc_context *context);

/* ---- Capture: capture.c ---- */

struct graph {
    struct object object;
    struct op *head, *tail;
};

/* A point in a capture: how far each of its streams had come. */
struct capture_point {
    uint64_t capture; /* id, 0 = none */
    unsigned clock[MAX_CAPTURE_STREAMS];
};

/* 0, or 900 after breaking the captures that forbid unsafe calls to this thread. */
int capture_check_unsafe(void);
/* For work on a stream: 0, or 906 if it is the legacy one and a blocking stream is capturing. */
int capture_check_legacy(struct stream *stream);
int capture_append(struct stream *stream, struct op *op);
void capture_break(struct stream *stream);
bool capture_break_context(struct fc_context *context); /* true if there was one */
void capture_break_id(uint64_t id);
void capture_abandon_context(struct fc_context *context); /* ends them, without a graph */
void capture_point_of(struct stream *stream, struct capture_point *point);
/* Joins a stream to the capture of an event it waits for. 0 or an error code. */
int capture_join(struct stream *stream, const struct capture_point *point);

/* ---- Kernels: module.c ---- */

int kernel_run(struct fc_context *context, struct kernel_call *kernel);
struct kernel_call *kernel_clone(const struct kernel_call *kernel);
void kernel_free(struct kernel_call *kernel);
void modules_destroy_of(struct fc_context *context);

/* ---- Models of the kernels of the library under test: kernels.c. The lock is not held. ---- */

void copy_pieces_kernel(const struct fakecuda_launch *launch);
void fingerprint_kernel(const struct fakecuda_launch *launch);

#endif
