/* Streams: queues of operations, and waiting for them. What runs the queues is in worker.c. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* ---- Operations ---- */

struct op *op_new(enum op_kind kind) {
    struct op *op = calloc(1, sizeof *op);
    if (op) {
        op->kind = kind;
    }
    return op;
}

/* A copy of an operation of a graph: its addresses are looked up anew. One that no longer can be
 * touched fails when it runs. */
struct op *op_clone(const struct op *op) {
    struct op *clone = malloc(sizeof *clone);
    if (!clone) {
        return NULL;
    }
    *clone = *op;
    clone->next = NULL;
    clone->kernel = op->kernel ? kernel_clone(op->kernel) : NULL;
    if (op->kernel && !clone->kernel) {
        free(clone);
        return NULL;
    }
    struct side *sides[] = {&clone->dst, &clone->src};
    for (int i = 0; i < 2; i++) {
        if (sides[i]->address && !side_classify(sides[i], sides[i]->address, clone->size, sides[i]->device)) {
            sides[i]->kind = SIDE_INVALID;
            sides[i]->registration = NULL;
        }
        side_hold(sides[i]);
    }
    return clone;
}

void op_free(struct op *op) {
    side_release(&op->dst);
    side_release(&op->src);
    if (op->kernel) {
        kernel_free(op->kernel);
    }
    if (op->marker) {
        marker_unref(op->marker);
    }
    free(op->staged);
    free(op);
}

/* ---- Streams ---- */

struct stream *stream_create(struct fc_context *context, bool blocking) {
    struct stream *stream = calloc(1, sizeof *stream);
    if (stream) {
        stream->context = context;
        stream->blocking = blocking;
        stream->next = context->streams;
        context->streams = stream;
        object_add(&stream->object, OBJECT_STREAM);
    }
    return stream;
}

struct stream *stream_legacy(struct fc_context *context) {
    if (!context->legacy) {
        context->legacy = stream_create(context, true);
        if (context->legacy) {
            context->legacy->is_legacy = true;
        }
    }
    return context->legacy;
}

static struct stream *stream_per_thread(struct fc_context *context) {
    struct stream *stream = context->streams;
    while (stream && !(stream->per_thread && pthread_equal(stream->owner, pthread_self()))) {
        stream = stream->next;
    }
    if (!stream) {
        stream = stream_create(context, true);
        if (stream) {
            stream->per_thread = true;
            stream->owner = pthread_self();
        }
    }
    return stream;
}

struct stream *stream_lookup(CUstream handle) {
    struct fc_context *context = context_current();
    if (handle == NULL || handle == CU_STREAM_LEGACY) {
        return context ? stream_legacy(context) : NULL;
    }
    if (handle == CU_STREAM_PER_THREAD) {
        return context ? stream_per_thread(context) : NULL;
    }
    struct stream *stream = object_find(OBJECT_STREAM, (uintptr_t)handle);
    return stream && !stream->is_legacy && !stream->per_thread ? stream : NULL;
}

void stream_unlink_if_done(struct stream *stream) {
    if (!stream->destroyed || stream->head || stream->waiters) {
        return;
    }
    struct stream **link = &stream->context->streams;
    while (*link != stream) {
        link = &(*link)->next;
    }
    *link = stream->next;
    free(stream);
    state_wake();
}

void stream_discard(struct stream *stream) {
    if (!stream->destroyed) {
        stream->destroyed = true;
        object_remove(&stream->object);
    }
    stream_unlink_if_done(stream);
}

int stream_submit(struct stream *stream, struct op *op, uint64_t *sequence) {
    int rc = capture_check_legacy(stream);
    if (rc) {
        op_free(op);
        return rc;
    }
    if (stream->capture) {
        return capture_append(stream, op);
    }
    op->sequence = next_sequence();
    if (sequence) {
        *sequence = op->sequence;
    }
    if (stream->tail) {
        stream->tail->next = op;
    } else {
        stream->head = op;
    }
    stream->tail = op;
    worker_needed();
    return CUDA_SUCCESS;
}

/* ---- Waiting ---- */

/* The running operation stays at the head until it is complete. */
static bool queue_done(const struct stream *stream, uint64_t up_to) {
    return !stream->head || stream->head->sequence > up_to;
}

/* Work of the legacy stream comes after that of all blocking streams. */
static bool stream_done(const struct stream *stream, uint64_t up_to) {
    if (!stream->is_legacy) {
        return queue_done(stream, up_to);
    }
    for (const struct stream *other = stream->context->streams; other; other = other->next) {
        if (other->blocking && !queue_done(other, up_to)) {
            return false;
        }
    }
    return true;
}

void stream_drain(struct stream *stream, uint64_t up_to) {
    stream->waiters++;
    while (!stream_done(stream, up_to)) {
        state_wait();
    }
    stream->waiters--;
    stream_unlink_if_done(stream);
}

static bool context_done(const struct fc_context *context, uint64_t up_to) {
    for (const struct stream *stream = context->streams; stream; stream = stream->next) {
        if (!queue_done(stream, up_to)) {
            return false;
        }
    }
    return true;
}

void context_drain(struct fc_context *context) {
    uint64_t up_to = next_sequence();
    while (!context_done(context, up_to)) {
        state_wait();
    }
}

/* ---- Entry points ---- */

static int create(CUstream *handle, unsigned flags) {
    if (!handle || flags > CU_STREAM_NON_BLOCKING) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    struct stream *stream = stream_create(context_current(), flags == CU_STREAM_DEFAULT);
    if (!stream) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *handle = (CUstream)(uintptr_t)stream->object.handle;
    return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    ENTER(NEEDS_CONTEXT)
    return call_end(create(stream, flags));
}

CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
    ENTER(NEEDS_CONTEXT)
    (void)priority; /* any value: the driver clamps it */
    return call_end(create(stream, flags));
}

CUresult cuStreamDestroy_v2(CUstream handle) {
    ENTER(NEEDS_CONTEXT)
    struct stream *stream = stream_lookup(handle);
    if (!stream || stream->is_legacy || stream->per_thread) {
        return call_end(CUDA_ERROR_INVALID_HANDLE);
    }
    if (stream->capture) {
        capture_break(stream);
        return call_end(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    stream_discard(stream);
    return call_end(CUDA_SUCCESS);
}

/* A capturing stream, or the legacy one beside a capture, can be neither waited for nor asked. */
static int check_observable(struct stream *stream) {
    if (stream->capture) {
        capture_break(stream);
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    int rc = capture_check_unsafe();
    return rc ? rc : capture_check_legacy(stream);
}

CUresult cuStreamSynchronize(CUstream handle) {
    ENTER(NEEDS_CONTEXT)
    struct stream *stream = stream_lookup(handle);
    int rc = stream ? check_observable(stream) : CUDA_ERROR_INVALID_HANDLE;
    if (rc == 0) {
        struct fc_context *context = stream->context;
        stream_drain(stream, next_sequence());
        rc = context->sticky;
    }
    return call_end(rc);
}

CUresult cuStreamQuery(CUstream handle) {
    ENTER(NEEDS_CONTEXT)
    struct stream *stream = stream_lookup(handle);
    int rc = stream ? check_observable(stream) : CUDA_ERROR_INVALID_HANDLE;
    if (rc == 0) {
        rc = stream_done(stream, next_sequence()) ? stream->context->sticky : CUDA_ERROR_NOT_READY;
    }
    return call_end(rc);
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext *context) {
    ENTER(NEEDS_CONTEXT)
    struct stream *stream = stream_lookup(handle);
    if (!stream || !context) {
        return call_end(stream ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE);
    }
    *context = stream->context;
    return call_end(CUDA_SUCCESS);
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void *argument) {
    ENTER(NEEDS_CONTEXT)
    struct stream *stream = stream_lookup(handle);
    if (!stream || !function) {
        return call_end(stream ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE);
    }
    struct op *op = op_new(OP_HOST);
    if (!op) {
        return call_end(CUDA_ERROR_OUT_OF_MEMORY);
    }
    op->function = function;
    op->argument = argument;
    return call_end(stream_submit(stream, op, NULL));
}
