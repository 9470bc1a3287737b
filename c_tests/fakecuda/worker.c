/* The threads that run the streams. A worker takes the oldest operation that may run (any of
 * them, when streams are late), runs it without the lock, and looks again. Workers start when
 * work finds none idle, up to MAX_WORKERS, and stay. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#include "internal.h"

enum { MAX_WORKERS = 16, SHARED_EVENT_POLL_US = 200 };

_Thread_local bool in_callback;

static int workers;
static int idle;

/* True if an earlier operation on the other side of the legacy barrier is unfinished. */
static bool behind_barrier(const struct stream *stream) {
    uint64_t sequence = stream->head->sequence;
    if (!stream->blocking) {
        return false;
    }
    if (!stream->is_legacy) {
        const struct stream *legacy = stream->context->legacy;
        return legacy && legacy->head && legacy->head->sequence < sequence;
    }
    for (const struct stream *other = stream->context->streams; other; other = other->next) {
        if (other->blocking && !other->is_legacy && other->head && other->head->sequence < sequence) {
            return true;
        }
    }
    return false;
}

static bool awaits_event(const struct stream *stream) {
    return stream->head->kind == OP_WAIT && !stream->context->sticky && !marker_done(stream->head->marker);
}

static bool may_run(const struct stream *stream) {
    return stream->head && !stream->running && !settings.held && !awaits_event(stream) && !behind_barrier(stream);
}

static struct stream *pick(void) {
    struct stream *best = NULL;
    unsigned candidates = 0;
    for (int device = 0; device < MAX_DEVICES; device++) {
        for (struct stream *stream = contexts[device].streams; stream; stream = stream->next) {
            if (!may_run(stream)) {
                continue;
            }
            candidates++;
            bool better = settings.late_us ? random_below(candidates) == 0 : !best || stream->head->sequence < best->head->sequence;
            if (better) {
                best = stream;
            }
        }
    }
    return best;
}

/* An event of another process tells nobody here when it is complete. */
static bool awaits_shared_event(void) {
    for (int device = 0; device < MAX_DEVICES; device++) {
        for (const struct stream *stream = contexts[device].streams; stream; stream = stream->next) {
            if (stream->head && stream->head->kind == OP_WAIT && stream->head->marker->page) {
                return true;
            }
        }
    }
    return false;
}

static void delay(const struct op *op) {
    unsigned microseconds = op->prompt ? 0 : random_below(settings.late_us + 1);
    if (microseconds) {
        state_unlock();
        usleep(microseconds);
        state_lock();
    }
    while (settings.held) {
        state_wait();
    }
}

static int execute(struct fc_context *context, struct op *op) {
    switch (op->kind) {
    case OP_COPY:
        return copy_run(op);
    case OP_FILL:
        return fill_run(op);
    case OP_KERNEL:
        return kernel_run(context, op->kernel);
    case OP_HOST:
        state_unlock();
        in_callback = true;
        op->function(op->argument);
        in_callback = false;
        state_lock();
        return CUDA_SUCCESS;
    default:
        return CUDA_SUCCESS;
    }
}

/* On a broken context nothing runs any more, but events are still completed, so that nobody waits
 * for ever. */
static void run_head(struct stream *stream) {
    struct op *op = stream->head;
    struct fc_context *context = stream->context;
    stream->running = true;
    delay(op);
    int rc = context->sticky ? CUDA_SUCCESS : execute(context, op);
    if (rc && !context->sticky) {
        context->sticky = rc;
    }
    if (op->kind == OP_RECORD) {
        marker_complete(op->marker);
    }
    stream->head = op->next;
    if (!stream->head) {
        stream->tail = NULL;
    }
    stream->running = false;
    op_free(op);
    stream_unlink_if_done(stream);
    state_wake();
}

static void *work(void *unused) {
    (void)unused;
    state_lock();
    for (;;) {
        struct stream *stream = pick();
        if (stream) {
            stream->running = true;
            worker_needed(); /* for the next one, if this takes long */
            run_head(stream);
            continue;
        }
        idle++;
        if (awaits_shared_event()) {
            state_wait_for(SHARED_EVENT_POLL_US);
        } else {
            state_wait();
        }
        idle--;
    }
    return NULL;
}

static void start_worker(void) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    if (pthread_create(&thread, &attributes, work, NULL) == 0) {
        pthread_setname_np(thread, "fakecuda");
        workers++;
    } else {
        fprintf(stderr, "fakecuda: cannot start a worker thread\n");
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void worker_needed(void) {
    state_wake();
    if (idle == 0 && workers < MAX_WORKERS && (pick() || awaits_shared_event())) {
        start_worker();
    }
}
