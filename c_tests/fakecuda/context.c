/* Primary contexts and each thread's stack of current contexts. */
#include "internal.h"

enum { MAX_DEPTH = 64 };

struct fc_context contexts[MAX_DEVICES];

static _Thread_local struct fc_context *stack[MAX_DEPTH];
static _Thread_local int depth;

struct fc_context *context_current(void) {
    return depth ? stack[depth - 1] : NULL;
}

bool context_known(CUcontext context) {
    return context >= contexts && context < contexts + MAX_DEVICES && context->refs > 0;
}

static bool context_push(struct fc_context *context) {
    if (depth == MAX_DEPTH) {
        return false;
    }
    stack[depth++] = context;
    return true;
}

static void free_plain_memory(int device) {
    for (size_t i = 0; i < reservations.count;) {
        struct reservation *reservation = (struct reservation *)reservations.items[i];
        struct mapping *mapping = range_containing(&mappings, reservation->range.base);
        if (reservation->plain && mapping && mapping->physical->device == device) {
            mapping_destroy(mapping);
            reservation_destroy(reservation);
        } else {
            i++;
        }
    }
}

/* The last reference is gone: what belongs to the context goes too. Memory of the virtual memory
 * management calls belongs to the device, and stays. */
static void context_reset(struct fc_context *context) {
    capture_abandon_context(context);
    context_drain(context);
    while (context->streams) {
        struct stream *first = context->streams;
        stream_discard(first);
        if (context->streams == first) {
            state_wait(); /* another thread still waits for it */
        }
    }
    context->legacy = NULL;
    events_destroy_of(context);
    modules_destroy_of(context);
    free_plain_memory(context->device);
    context->peers = 0;
    context->sticky = fault_poison();
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER(NEEDS_INIT)
    if (!context) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!device_valid(device)) {
        return call_end(CUDA_ERROR_INVALID_DEVICE);
    }
    contexts[device].refs++;
    *context = &contexts[device];
    return call_end(CUDA_SUCCESS);
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER(NEEDS_INIT)
    if (!device_valid(device)) {
        return call_end(CUDA_ERROR_INVALID_DEVICE);
    }
    if (contexts[device].refs == 0) {
        return call_end(CUDA_ERROR_INVALID_CONTEXT);
    }
    if (contexts[device].refs == 1) {
        context_reset(&contexts[device]);
    }
    contexts[device].refs--;
    return call_end(CUDA_SUCCESS);
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    ENTER(NEEDS_INIT)
    if (!flags || !active) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!device_valid(device)) {
        return call_end(CUDA_ERROR_INVALID_DEVICE);
    }
    *flags = 0;
    *active = contexts[device].refs > 0;
    return call_end(CUDA_SUCCESS);
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    ENTER(NEEDS_INIT)
    if (!context_known(context)) {
        return call_end(CUDA_ERROR_INVALID_CONTEXT);
    }
    return call_end(context_push(context) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    ENTER(NEEDS_INIT)
    if (depth == 0) {
        return call_end(CUDA_ERROR_INVALID_CONTEXT);
    }
    depth--;
    if (context) {
        *context = stack[depth];
    }
    return call_end(CUDA_SUCCESS);
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    ENTER(NEEDS_INIT)
    if (!context) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    *context = context_current();
    return call_end(CUDA_SUCCESS);
}

CUresult cuCtxSetCurrent(CUcontext context) {
    ENTER(NEEDS_INIT)
    if (context && !context_known(context)) {
        return call_end(CUDA_ERROR_INVALID_CONTEXT);
    }
    if (depth) {
        depth--;
    }
    if (context) {
        context_push(context);
    }
    return call_end(CUDA_SUCCESS);
}

CUresult cuCtxGetDevice(CUdevice *device) {
    ENTER(NEEDS_INIT)
    if (!device) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    struct fc_context *context = context_current();
    if (!context) {
        return call_end(CUDA_ERROR_INVALID_CONTEXT);
    }
    *device = context->device;
    return call_end(CUDA_SUCCESS);
}

CUresult cuCtxSynchronize(void) {
    ENTER(NEEDS_CONTEXT)
    struct fc_context *context = context_current();
    if (capture_break_context(context)) {
        return call_end(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    int unsafe = capture_check_unsafe();
    if (unsafe) {
        return call_end(unsafe);
    }
    context_drain(context);
    return call_end(context->sticky);
}

CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned flags) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    struct fc_context *context = context_current();
    if (flags) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!context_known(peer)) {
        return call_end(CUDA_ERROR_INVALID_CONTEXT);
    }
    if (peer == context) {
        return call_end(CUDA_ERROR_INVALID_DEVICE);
    }
    if (context->peers & (1u << peer->device)) {
        return call_end(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
    }
    context->peers |= 1u << peer->device;
    return call_end(CUDA_SUCCESS);
}

uint64_t fakecuda_primary_refs(int device) {
    state_lock();
    uint64_t refs = device_valid(device) ? contexts[device].refs : 0;
    state_unlock();
    return refs;
}
