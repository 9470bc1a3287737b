/* Stream capture and graphs. A graph is the captured operations in the order they were made; that
 * order satisfies every dependency, so a launch queues them on one stream. Which streams were
 * joined back is followed with one clock per stream of the capture. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

struct capture {
    struct capture *next;
    uint64_t id;
    int mode;
    pthread_t thread;
    bool invalid;
    struct graph *graph;
    unsigned members;
    struct stream *streams[MAX_CAPTURE_STREAMS]; /* the first began the capture */
    unsigned clocks[MAX_CAPTURE_STREAMS][MAX_CAPTURE_STREAMS];
};

static struct capture *captures;
static uint64_t last_id;
static _Thread_local int thread_mode = CU_CAPTURE_MODE_GLOBAL;

/* ---- Graphs ---- */

static struct graph *graph_new(void) {
    return calloc(1, sizeof(struct graph));
}

static void graph_append(struct graph *graph, struct op *op) {
    op->next = NULL;
    if (graph->tail) {
        graph->tail->next = op;
    } else {
        graph->head = op;
    }
    graph->tail = op;
}

static void graph_free(struct graph *graph) {
    while (graph->head) {
        struct op *next = graph->head->next;
        op_free(graph->head);
        graph->head = next;
    }
    free(graph);
}

/* An operation of a graph keeps no hold on host memory; a launch looks it up. */
static struct op *op_for_graph(struct op *op) {
    side_release(&op->dst);
    side_release(&op->src);
    return op;
}

/* ---- Rules ---- */

static bool forbids_unsafe(const struct capture *capture) {
    if (thread_mode == CU_CAPTURE_MODE_RELAXED || capture->mode == CU_CAPTURE_MODE_RELAXED) {
        return false;
    }
    if (pthread_equal(capture->thread, pthread_self())) {
        return true;
    }
    return thread_mode == CU_CAPTURE_MODE_GLOBAL && capture->mode == CU_CAPTURE_MODE_GLOBAL;
}

int capture_check_unsafe(void) {
    int rc = CUDA_SUCCESS;
    for (struct capture *capture = captures; capture; capture = capture->next) {
        if (forbids_unsafe(capture)) {
            capture->invalid = true;
            rc = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
    }
    return rc;
}

static struct capture *blocking_capture(const struct fc_context *context) {
    for (struct stream *stream = context->streams; stream; stream = stream->next) {
        if (stream->capture && stream->blocking) {
            return stream->capture;
        }
    }
    return NULL;
}

int capture_check_legacy(struct stream *stream) {
    struct capture *capture = stream->is_legacy ? blocking_capture(stream->context) : NULL;
    if (!capture) {
        return CUDA_SUCCESS;
    }
    capture->invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
}

void capture_break(struct stream *stream) {
    stream->capture->invalid = true;
}

bool capture_break_context(struct fc_context *context) {
    bool any = false;
    for (struct stream *stream = context->streams; stream; stream = stream->next) {
        if (stream->capture) {
            stream->capture->invalid = true;
            any = true;
        }
    }
    return any;
}

static struct capture *capture_of_id(uint64_t id) {
    struct capture *capture = captures;
    while (capture && capture->id != id) {
        capture = capture->next;
    }
    return capture;
}

void capture_break_id(uint64_t id) {
    struct capture *capture = capture_of_id(id);
    if (capture) {
        capture->invalid = true;
    }
}

/* ---- Recording ---- */

int capture_append(struct stream *stream, struct op *op) {
    struct capture *capture = stream->capture;
    if (capture->invalid) {
        op_free(op);
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    unsigned index = stream->capture_index;
    capture->clocks[index][index]++;
    graph_append(capture->graph, op_for_graph(op));
    return CUDA_SUCCESS;
}

void capture_point_of(struct stream *stream, struct capture_point *point) {
    struct capture *capture = stream->capture;
    point->capture = capture->invalid ? 0 : capture->id;
    memcpy(point->clock, capture->clocks[stream->capture_index], sizeof point->clock);
}

static int add_member(struct capture *capture, struct stream *stream) {
    if (capture->members == MAX_CAPTURE_STREAMS) {
        capture->invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    stream->capture = capture;
    stream->capture_index = capture->members;
    capture->streams[capture->members++] = stream;
    return CUDA_SUCCESS;
}

int capture_join(struct stream *stream, const struct capture_point *point) {
    struct capture *capture = point->capture ? capture_of_id(point->capture) : NULL;
    struct capture *own = stream->capture;
    if (own && own->invalid) {
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    if (!capture) { /* an event from outside, or from a capture that ended */
        if (own) {
            own->invalid = true;
        }
        return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (capture->invalid) {
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    if (own && own != capture) {
        own->invalid = capture->invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    }
    if (stream->is_legacy) {
        capture->invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    int rc = own ? CUDA_SUCCESS : add_member(capture, stream);
    for (unsigned i = 0; rc == 0 && i < MAX_CAPTURE_STREAMS; i++) {
        unsigned *clock = &capture->clocks[stream->capture_index][i];
        *clock = point->clock[i] > *clock ? point->clock[i] : *clock;
    }
    return rc;
}

static bool all_joined(const struct capture *capture) {
    for (unsigned i = 1; i < capture->members; i++) {
        if (capture->clocks[i][i] > capture->clocks[0][i]) {
            return false;
        }
    }
    return true;
}

/* Takes the capture apart. The graph is the caller's. */
static struct graph *capture_end(struct capture *capture) {
    struct capture **link = &captures;
    while (*link != capture) {
        link = &(*link)->next;
    }
    *link = capture->next;
    for (unsigned i = 0; i < capture->members; i++) {
        capture->streams[i]->capture = NULL;
    }
    struct graph *graph = capture->graph;
    free(capture);
    return graph;
}

void capture_abandon_context(struct fc_context *context) {
    for (struct stream *stream = context->streams; stream; stream = stream->next) {
        if (stream->capture) {
            graph_free(capture_end(stream->capture));
        }
    }
}

/* ---- Entry points ---- */

CUresult cuStreamBeginCapture_v2(CUstream handle, int mode) {
    ENTER(NEEDS_CONTEXT)
    struct stream *stream = stream_lookup(handle);
    if (!stream) {
        return call_end(CUDA_ERROR_INVALID_HANDLE);
    }
    if (mode < CU_CAPTURE_MODE_GLOBAL || mode > CU_CAPTURE_MODE_RELAXED) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (stream->is_legacy) {
        return call_end(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    if (stream->capture) {
        return call_end(CUDA_ERROR_ILLEGAL_STATE);
    }
    struct capture *capture = calloc(1, sizeof *capture);
    struct graph *graph = graph_new();
    if (!capture || !graph) {
        free(capture);
        free(graph);
        return call_end(CUDA_ERROR_OUT_OF_MEMORY);
    }
    capture->id = ++last_id;
    capture->mode = mode;
    capture->thread = pthread_self();
    capture->graph = graph;
    add_member(capture, stream);
    capture->next = captures;
    captures = capture;
    return call_end(CUDA_SUCCESS);
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph *out) {
    ENTER(NEEDS_CONTEXT)
    struct stream *stream = stream_lookup(handle);
    if (!stream || !out) {
        return call_end(stream ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE);
    }
    struct capture *capture = stream->capture;
    if (!capture) {
        return call_end(CUDA_ERROR_ILLEGAL_STATE);
    }
    if (capture->mode != CU_CAPTURE_MODE_RELAXED && !pthread_equal(capture->thread, pthread_self())) {
        return call_end(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    }
    if (capture->streams[0] != stream) {
        capture->invalid = true;
        return call_end(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    }
    int rc = capture->invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : all_joined(capture) ? 0 : CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    struct graph *graph = capture_end(capture);
    *out = NULL;
    if (rc) {
        graph_free(graph);
        return call_end(rc);
    }
    object_add(&graph->object, OBJECT_GRAPH);
    *out = (CUgraph)(uintptr_t)graph->object.handle;
    return call_end(CUDA_SUCCESS);
}

static int capture_status(const struct stream *stream) {
    if (!stream->capture) {
        return CU_CAPTURE_STATUS_NONE;
    }
    return stream->capture->invalid ? CU_CAPTURE_STATUS_INVALIDATED : CU_CAPTURE_STATUS_ACTIVE;
}

/* Asking about the legacy stream beside a capture is an error, but breaks nothing. */
static int status_check(struct stream *stream, const int *status) {
    if (!stream) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (!status) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    return stream->is_legacy && blocking_capture(stream->context) ? CUDA_ERROR_STREAM_CAPTURE_IMPLICIT : CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream handle, int *status) {
    ENTER(NEEDS_CONTEXT)
    struct stream *stream = stream_lookup(handle);
    int rc = status_check(stream, status);
    if (rc == 0) {
        *status = capture_status(stream);
    }
    return call_end(rc);
}

CUresult cuStreamGetCaptureInfo_v2(CUstream handle, int *status, uint64_t *id, CUgraph *graph, const void **dependencies, size_t *count) {
    ENTER(NEEDS_CONTEXT)
    struct stream *stream = stream_lookup(handle);
    int rc = status_check(stream, status);
    if (rc) {
        return call_end(rc);
    }
    *status = capture_status(stream);
    if (id) {
        *id = stream->capture ? stream->capture->id : 0;
    }
    if (graph) {
        *graph = NULL;
    }
    if (dependencies) {
        *dependencies = NULL;
    }
    if (count) {
        *count = 0;
    }
    return call_end(CUDA_SUCCESS);
}

CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
    ENTER(NEEDS_INIT)
    if (!mode || *mode < CU_CAPTURE_MODE_GLOBAL || *mode > CU_CAPTURE_MODE_RELAXED) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    int before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return call_end(CUDA_SUCCESS);
}

/* A copy of an operation that is to stay in a graph. */
static bool graph_copy(struct graph *to, const struct graph *from) {
    for (const struct op *op = from->head; op; op = op->next) {
        struct op *clone = op_clone(op);
        if (!clone) {
            return false;
        }
        graph_append(to, op_for_graph(clone));
    }
    return true;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *out, CUgraph handle, unsigned long long flags) {
    ENTER(NEEDS_CONTEXT)
    (void)flags;
    struct graph *graph = object_find(OBJECT_GRAPH, (uintptr_t)handle);
    if (!out || !graph) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    struct graph *exec = graph_new();
    if (!exec || !graph_copy(exec, graph)) {
        if (exec) {
            graph_free(exec);
        }
        return call_end(CUDA_ERROR_OUT_OF_MEMORY);
    }
    object_add(&exec->object, OBJECT_EXEC);
    *out = (CUgraphExec)(uintptr_t)exec->object.handle;
    return call_end(CUDA_SUCCESS);
}

CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
    ENTER(NEEDS_CONTEXT)
    struct graph *exec = object_find(OBJECT_EXEC, (uintptr_t)handle);
    struct stream *stream = stream_lookup(stream_handle);
    if (!exec || !stream) {
        return call_end(CUDA_ERROR_INVALID_HANDLE);
    }
    for (const struct op *op = exec->head; op; op = op->next) {
        struct op *clone = op_clone(op);
        int rc = clone ? stream_submit(stream, clone, NULL) : CUDA_ERROR_OUT_OF_MEMORY;
        if (rc) {
            return call_end(rc);
        }
    }
    return call_end(CUDA_SUCCESS);
}

static int destroy(enum object_kind kind, uintptr_t handle) {
    struct graph *graph = object_find(kind, handle);
    if (!graph) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    object_remove(&graph->object);
    graph_free(graph);
    return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph handle) {
    ENTER(NEEDS_CONTEXT)
    return call_end(destroy(OBJECT_GRAPH, (uintptr_t)handle));
}

CUresult cuGraphExecDestroy(CUgraphExec handle) {
    ENTER(NEEDS_CONTEXT)
    return call_end(destroy(OBJECT_EXEC, (uintptr_t)handle));
}
