/* Events. Each recording has a marker of its own, so that a wait keeps meaning the recording that
 * was the last when it was queued. Events between processes keep two counters in a shared page
 * instead. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

enum { PAGE_BYTES = 4096, SHARED_POLL_US = 200 };

struct event_page {
    _Atomic uint64_t recorded;
    _Atomic uint64_t completed;
};

struct event {
    struct object object;
    struct fc_context *context;
    unsigned flags;
    struct marker *last;
    struct capture_point captured;
    struct event_page *page;
    int page_fd;
};

/* What an IPC handle holds: where to find the page. */
struct event_address {
    char magic[8];
    int process;
    int fd;
    uint64_t inode;
};

static const char MAGIC[8] = "fakeevt";

/* ---- Markers ---- */

struct marker *marker_ref(struct marker *marker) {
    marker->refs++;
    return marker;
}

void marker_unref(struct marker *marker) {
    if (--marker->refs == 0) {
        free(marker);
    }
}

bool marker_done(const struct marker *marker) {
    return marker->page ? atomic_load(&marker->page->completed) >= marker->generation : marker->done;
}

void marker_complete(struct marker *marker) {
    marker->done = true;
    clock_gettime(CLOCK_MONOTONIC, &marker->when);
    if (marker->page) {
        uint64_t before = atomic_load(&marker->page->completed);
        while (before < marker->generation && !atomic_compare_exchange_weak(&marker->page->completed, &before, marker->generation)) {
        }
    }
}

static struct marker *marker_new(struct event_page *page, uint64_t generation) {
    struct marker *marker = calloc(1, sizeof *marker);
    if (marker) {
        marker->refs = 1;
        marker->page = page;
        marker->generation = generation;
    }
    return marker;
}

/* The last recording, with a reference; NULL if there was none. */
static struct marker *last_recording(const struct event *event) {
    if (!event->page) {
        return event->last ? marker_ref(event->last) : NULL;
    }
    uint64_t generation = atomic_load(&event->page->recorded);
    return generation ? marker_new(event->page, generation) : NULL;
}

/* ---- Entry points ---- */

static struct event *event_lookup(CUevent handle) {
    return object_find(OBJECT_EVENT, (uintptr_t)handle);
}

static struct event *event_new(unsigned flags) {
    struct event *event = calloc(1, sizeof *event);
    if (event) {
        event->context = context_current();
        event->flags = flags;
        event->page_fd = -1;
        object_add(&event->object, OBJECT_EVENT);
    }
    return event;
}

static void event_free(struct event *event) {
    object_remove(&event->object);
    if (event->last) {
        marker_unref(event->last);
    }
    if (event->page_fd >= 0) {
        close(event->page_fd); /* the page stays: queued operations may refer to it */
    }
    free(event);
}

static void free_if_of(void *object, void *context) {
    struct event *event = object;
    if (event->context == context) {
        event_free(event);
    }
}

void events_destroy_of(struct fc_context *context) {
    object_each(OBJECT_EVENT, free_if_of, context);
}

static bool event_share(struct event *event, int fd) {
    void *page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED) {
        return false;
    }
    event->page = page;
    event->page_fd = fd;
    return true;
}

CUresult cuEventCreate(CUevent *handle, unsigned flags) {
    ENTER(NEEDS_CONTEXT)
    bool shared = flags & CU_EVENT_INTERPROCESS;
    if (!handle || flags > 7 || (shared && !(flags & CU_EVENT_DISABLE_TIMING))) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    int fd = -1;
    if (shared) {
        fd = memfd_create("fakecuda-event", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, PAGE_BYTES) != 0) {
            return call_end(CUDA_ERROR_OPERATING_SYSTEM);
        }
    }
    struct event *event = event_new(flags);
    if (!event) {
        return call_end(CUDA_ERROR_OUT_OF_MEMORY);
    }
    if (shared && !event_share(event, fd)) {
        event_free(event);
        close(fd);
        return call_end(CUDA_ERROR_OPERATING_SYSTEM);
    }
    *handle = (CUevent)(uintptr_t)event->object.handle;
    return call_end(CUDA_SUCCESS);
}

CUresult cuEventDestroy_v2(CUevent handle) {
    ENTER(NEEDS_CONTEXT)
    struct event *event = event_lookup(handle);
    if (!event) {
        return call_end(CUDA_ERROR_INVALID_HANDLE);
    }
    event_free(event);
    return call_end(CUDA_SUCCESS);
}

static int record(struct event *event, struct stream *stream) {
    if (stream->capture) {
        capture_point_of(stream, &event->captured);
        return event->captured.capture ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    struct op *op = op_new(OP_RECORD);
    struct marker *marker = op ? marker_new(event->page, event->page ? atomic_fetch_add(&event->page->recorded, 1) + 1 : 0) : NULL;
    if (!marker) {
        free(op);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    op->marker = marker_ref(marker);
    int rc = stream_submit(stream, op, NULL);
    if (rc) {
        marker_unref(marker);
        return rc;
    }
    if (event->last) {
        marker_unref(event->last);
    }
    event->last = marker;
    event->captured.capture = 0;
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent handle, CUstream stream_handle) {
    ENTER(NEEDS_CONTEXT)
    struct event *event = event_lookup(handle);
    struct stream *stream = stream_lookup(stream_handle);
    if (!event || !stream || stream->context != event->context) {
        return call_end(CUDA_ERROR_INVALID_HANDLE);
    }
    int rc = capture_check_legacy(stream);
    return call_end(rc ? rc : record(event, stream));
}

/* An event last recorded in a capture has no execution state to ask for. */
static int check_observable(const struct event *event) {
    if (event->captured.capture) {
        capture_break_id(event->captured.capture);
        return CUDA_ERROR_CAPTURED_EVENT;
    }
    return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent handle) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    struct event *event = event_lookup(handle);
    int rc = event ? check_observable(event) : CUDA_ERROR_INVALID_HANDLE;
    struct marker *marker = rc == 0 ? last_recording(event) : NULL;
    if (marker) {
        rc = marker_done(marker) ? event->context->sticky : CUDA_ERROR_NOT_READY;
        marker_unref(marker);
    }
    return call_end(rc);
}

CUresult cuEventSynchronize(CUevent handle) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    struct event *event = event_lookup(handle);
    int rc = event ? check_observable(event) : CUDA_ERROR_INVALID_HANDLE;
    struct marker *marker = rc == 0 ? last_recording(event) : NULL;
    if (marker) {
        struct fc_context *context = event->context;
        while (!marker_done(marker)) {
            if (marker->page) {
                state_wait_for(SHARED_POLL_US);
            } else {
                state_wait();
            }
        }
        marker_unref(marker);
        rc = context->sticky;
    }
    return call_end(rc);
}

CUresult cuEventElapsedTime(float *milliseconds, CUevent start_handle, CUevent end_handle) {
    ENTER(NEEDS_CONTEXT)
    struct event *start = event_lookup(start_handle), *end = event_lookup(end_handle);
    if (!milliseconds) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!start || !end || !start->last || !end->last || ((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING)) {
        return call_end(CUDA_ERROR_INVALID_HANDLE);
    }
    if (!start->last->done || !end->last->done) {
        return call_end(CUDA_ERROR_NOT_READY);
    }
    const struct timespec *from = &start->last->when, *to = &end->last->when;
    *milliseconds = (float)((double)(to->tv_sec - from->tv_sec) * 1e3 + (double)(to->tv_nsec - from->tv_nsec) / 1e6);
    return call_end(CUDA_SUCCESS);
}

CUresult cuStreamWaitEvent(CUstream stream_handle, CUevent handle, unsigned flags) {
    ENTER(NEEDS_CONTEXT)
    struct stream *stream = stream_lookup(stream_handle);
    struct event *event = event_lookup(handle);
    if (!stream || !event || flags > 1) {
        return call_end(stream && event ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE);
    }
    int rc = capture_check_legacy(stream);
    if (rc) {
        return call_end(rc);
    }
    if (event->captured.capture || stream->capture) {
        return call_end(capture_join(stream, &event->captured));
    }
    struct marker *marker = last_recording(event);
    if (!marker) {
        return call_end(CUDA_SUCCESS);
    }
    struct op *op = op_new(OP_WAIT);
    if (!op) {
        marker_unref(marker);
        return call_end(CUDA_ERROR_OUT_OF_MEMORY);
    }
    op->marker = marker;
    op->prompt = true;
    return call_end(stream_submit(stream, op, NULL));
}

/* ---- Between processes ---- */

CUresult cuIpcGetEventHandle(CUipcEventHandle *handle, CUevent event_handle) {
    ENTER(NEEDS_CONTEXT)
    struct event *event = event_lookup(event_handle);
    struct stat file;
    if (!handle || !event) {
        return call_end(event ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE);
    }
    if (!(event->flags & CU_EVENT_INTERPROCESS) || fstat(event->page_fd, &file) != 0) {
        return call_end(CUDA_ERROR_INVALID_HANDLE);
    }
    struct event_address address = {.process = getpid(), .fd = event->page_fd, .inode = file.st_ino};
    memcpy(address.magic, MAGIC, sizeof MAGIC);
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &address, sizeof address);
    return call_end(CUDA_SUCCESS);
}

static int open_page(const struct event_address *address) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", address->process, address->fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    struct stat file;
    if (fd >= 0 && (fstat(fd, &file) != 0 || file.st_ino != address->inode)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

CUresult cuIpcOpenEventHandle(CUevent *handle, CUipcEventHandle from) {
    ENTER(NEEDS_CONTEXT)
    struct event_address address;
    memcpy(&address, &from, sizeof address);
    if (!handle || memcmp(address.magic, MAGIC, sizeof MAGIC) != 0) {
        return call_end(handle ? CUDA_ERROR_INVALID_HANDLE : CUDA_ERROR_INVALID_VALUE);
    }
    if (address.process == getpid()) {
        return call_end(CUDA_ERROR_INVALID_CONTEXT); /* only another process may open it */
    }
    int fd = open_page(&address);
    if (fd < 0) {
        return call_end(CUDA_ERROR_MAP_FAILED);
    }
    struct event *event = event_new(CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS);
    if (!event || !event_share(event, fd)) {
        if (event) {
            event_free(event);
        }
        close(fd);
        return call_end(CUDA_ERROR_MAP_FAILED);
    }
    *handle = (CUevent)(uintptr_t)event->object.handle;
    return call_end(CUDA_SUCCESS);
}
