/* Copies and fills. An address is classified when the copy is queued (device, registered host,
 * pageable host) and resolved when it runs, so that memory unmapped in between is noticed. Bytes
 * of the device always move through the driver's own view of them. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* ---- Classification ---- */

bool side_classify(struct side *side, uintptr_t address, size_t size, int device) {
    *side = (struct side){.kind = SIDE_DEVICE, .address = address, .device = device};
    if (range_containing(&reservations, address)) {
        return true; /* whether all of it is mapped shows when the copy runs */
    }
    if (range_overlapping(&reservations, address, size)) {
        return false;
    }
    struct registration *registration = range_overlapping(&registrations, address, size);
    if (registration) {
        uintptr_t offset = address - registration->range.base;
        if (address < registration->range.base || size > registration->range.size - offset) {
            return false;
        }
        side->kind = SIDE_HOST;
        side->registration = registration;
        return true;
    }
    if (!address_is_stale(address)) {
        side->kind = SIDE_HOST;
    }
    return true;
}

void side_hold(struct side *side) {
    if (side->registration) {
        side->registration->in_flight++;
    }
}

void side_release(struct side *side) {
    if (side->registration) {
        side->registration->in_flight--;
        side->registration = NULL;
        state_wake();
    }
}

static bool is_pageable(const struct side *side) {
    return side->kind == SIDE_HOST && !side->registration;
}

/* ---- Access ---- */

bool span_open(struct span *span, const struct side *side, size_t offset, size_t wanted, unsigned access) {
    uintptr_t address = side->address + offset;
    *span = (struct span){.bytes = (char *)address, .size = wanted};
    if (side->kind == SIDE_HOST) {
        return true;
    }
    struct mapping *mapping = side->kind == SIDE_DEVICE ? range_containing(&mappings, address) : NULL;
    if (!mapping) {
        return false;
    }
    if (side->device != ANY_DEVICE && (mapping_access(mapping, side->device) & access) != access) {
        return false;
    }
    size_t within = address - mapping->range.base;
    size_t left = mapping->range.size - within;
    span->bytes = mapping->physical->view + within;
    span->size = wanted < left ? wanted : left;
    span->mapping = mapping;
    mapping->pins++;
    mapping->physical->pins++;
    return true;
}

bool span_close(struct span *span) {
    struct mapping *mapping = span->mapping;
    if (!mapping) {
        return true;
    }
    struct physical *physical = mapping->physical;
    bool intact = !mapping->gone;
    mapping->pins--;
    physical->pins--;
    if (mapping->gone && mapping->pins == 0) {
        free(mapping);
    }
    physical_settle(physical);
    return intact;
}

static int move(const struct side *dst, const struct side *src, size_t size) {
    for (size_t done = 0; done < size;) {
        struct span to, from;
        if (!span_open(&to, dst, done, size - done, CU_MEM_ACCESS_READWRITE)) {
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        }
        if (!span_open(&from, src, done, size - done, CU_MEM_ACCESS_READ)) {
            span_close(&to);
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        }
        size_t piece = to.size < from.size ? to.size : from.size;
        state_unlock();
        memmove(to.bytes, from.bytes, piece);
        state_lock();
        bool to_intact = span_close(&to);
        bool from_intact = span_close(&from);
        if (!to_intact || !from_intact) {
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        }
        done += piece;
    }
    return CUDA_SUCCESS;
}

int side_read(const struct side *side, void *out, size_t size) {
    struct side buffer = {.kind = SIDE_HOST, .address = (uintptr_t)out};
    return move(&buffer, side, size);
}

int side_write(const struct side *side, const void *in, size_t size) {
    struct side buffer = {.kind = SIDE_HOST, .address = (uintptr_t)in};
    return move(side, &buffer, size);
}

int copy_run(struct op *op) {
    return op->staged ? side_write(&op->dst, op->staged, op->size) : move(&op->dst, &op->src, op->size);
}

int fill_run(struct op *op) {
    for (size_t done = 0; done < op->size;) {
        struct span to;
        if (!span_open(&to, &op->dst, done, op->size - done, CU_MEM_ACCESS_READWRITE)) {
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        }
        state_unlock();
        if (op->width == 1) {
            memset(to.bytes, (int)op->value, to.size);
        } else {
            for (size_t i = 0; i < to.size; i += sizeof op->value) {
                memcpy(to.bytes + i, &op->value, sizeof op->value);
            }
        }
        state_lock();
        if (!span_close(&to)) {
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        }
        done += to.size;
    }
    return CUDA_SUCCESS;
}

/* ---- Queueing ---- */

/* Which memory an entry point promises for one end. */
enum expectation { EXPECT_ANY, EXPECT_DEVICE, EXPECT_HOST };

static bool side_meets(const struct side *side, enum expectation expectation) {
    switch (expectation) {
    case EXPECT_DEVICE:
        return !is_pageable(side); /* registered host memory has a device address too */
    case EXPECT_HOST:
        return side->kind == SIDE_HOST;
    default:
        return true;
    }
}

struct copy {
    uintptr_t dst, src;
    size_t size;
    enum expectation dst_is, src_is;
    int dst_device, src_device; /* whose rights count; ANY_DEVICE = the stream's */
    bool synchronous;
    bool snapshot; /* take the source's bytes now, even from registered memory */
    bool prompt;
};

/* A copy operation that holds its registrations, or NULL with an error code. */
static struct op *copy_prepare(const struct copy *copy, const struct stream *stream, int *rc) {
    int device = stream->context->device;
    struct op *op = op_new(OP_COPY);
    if (!op) {
        *rc = CUDA_ERROR_OUT_OF_MEMORY;
        return NULL;
    }
    op->size = copy->size;
    op->prompt = copy->prompt;
    bool fits = side_classify(&op->dst, copy->dst, copy->size, copy->dst_device == ANY_DEVICE ? device : copy->dst_device) &&
                side_classify(&op->src, copy->src, copy->size, copy->src_device == ANY_DEVICE ? device : copy->src_device);
    bool meets = fits && side_meets(&op->dst, copy->dst_is) && side_meets(&op->src, copy->src_is);
    if (!meets) {
        op->dst.registration = op->src.registration = NULL;
        op_free(op);
        *rc = CUDA_ERROR_INVALID_VALUE;
        return NULL;
    }
    side_hold(&op->dst);
    side_hold(&op->src);
    return op;
}

static int copy_stage(struct op *op) {
    op->staged = malloc(op->size);
    if (!op->staged) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    return side_read(&op->src, op->staged, op->size);
}

/* From pageable memory a copy is staged and from registered memory it is read late; into pageable
 * memory it ends before the call returns. */
static int copy_queue(const struct copy *copy, CUstream handle) {
    struct stream *stream = stream_lookup(handle);
    if (!stream) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (copy->size == 0) {
        return CUDA_SUCCESS;
    }
    if (!copy->dst || !copy->src) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    int rc = 0;
    struct op *op = copy_prepare(copy, stream, &rc);
    if (!op) {
        return rc;
    }
    bool waits = copy->synchronous || is_pageable(&op->dst);
    bool stages = !copy->synchronous && !stream->capture && (is_pageable(&op->src) || (copy->snapshot && op->src.kind == SIDE_HOST));
    if (stages) {
        rc = copy_stage(op);
        stream = stream_lookup(handle); /* the lock was dropped */
        if (rc || !stream) {
            op_free(op);
            return rc ? rc : CUDA_ERROR_INVALID_HANDLE;
        }
    }
    uint64_t sequence = 0;
    rc = stream_submit(stream, op, &sequence);
    if (rc == 0 && waits && sequence) {
        struct fc_context *context = stream->context;
        stream_drain(stream, sequence);
        rc = context->sticky;
    }
    return rc;
}

static struct copy copy_of(CUdeviceptr dst, enum expectation dst_is, CUdeviceptr src, enum expectation src_is, size_t size) {
    return (struct copy){.dst = (uintptr_t)dst,
                         .src = (uintptr_t)src,
                         .size = size,
                         .dst_is = dst_is,
                         .src_is = src_is,
                         .dst_device = ANY_DEVICE,
                         .src_device = ANY_DEVICE};
}

static int copy_now(struct copy copy) {
    copy.synchronous = true;
    return call_end(copy_queue(&copy, CU_STREAM_LEGACY));
}

static int copy_later(struct copy copy, CUstream stream) {
    return call_end(copy_queue(&copy, stream));
}

/* ---- Entry points ---- */

CUresult cuMemcpy(CUdeviceptr dst, CUdeviceptr src, size_t size) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    return copy_now(copy_of(dst, EXPECT_ANY, src, EXPECT_ANY, size));
}

CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t size, CUstream stream) {
    ENTER(NEEDS_CONTEXT)
    return copy_later(copy_of(dst, EXPECT_ANY, src, EXPECT_ANY, size), stream);
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr dst, const void *src, size_t size) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    return copy_now(copy_of(dst, EXPECT_DEVICE, (uintptr_t)src, EXPECT_HOST, size));
}

CUresult cuMemcpyDtoH_v2(void *dst, CUdeviceptr src, size_t size) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    return copy_now(copy_of((uintptr_t)dst, EXPECT_HOST, src, EXPECT_DEVICE, size));
}

CUresult cuMemcpyDtoD_v2(CUdeviceptr dst, CUdeviceptr src, size_t size) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    return copy_now(copy_of(dst, EXPECT_DEVICE, src, EXPECT_DEVICE, size));
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr dst, const void *src, size_t size, CUstream stream) {
    ENTER(NEEDS_CONTEXT)
    return copy_later(copy_of(dst, EXPECT_DEVICE, (uintptr_t)src, EXPECT_HOST, size), stream);
}

CUresult cuMemcpyDtoHAsync_v2(void *dst, CUdeviceptr src, size_t size, CUstream stream) {
    ENTER(NEEDS_CONTEXT)
    return copy_later(copy_of((uintptr_t)dst, EXPECT_HOST, src, EXPECT_DEVICE, size), stream);
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr dst, CUdeviceptr src, size_t size, CUstream stream) {
    ENTER(NEEDS_CONTEXT)
    return copy_later(copy_of(dst, EXPECT_DEVICE, src, EXPECT_DEVICE, size), stream);
}

CUresult cuMemcpyPeerAsync(CUdeviceptr dst, CUcontext dst_context, CUdeviceptr src, CUcontext src_context, size_t size, CUstream stream) {
    ENTER(NEEDS_CONTEXT)
    if (!context_known(dst_context) || !context_known(src_context)) {
        return call_end(CUDA_ERROR_INVALID_CONTEXT);
    }
    struct copy copy = copy_of(dst, EXPECT_DEVICE, src, EXPECT_DEVICE, size);
    copy.dst_device = dst_context->device;
    copy.src_device = src_context->device;
    return copy_later(copy, stream);
}

static bool batch_attributes_valid(const CUmemcpyAttributes *attributes, const size_t *starts, size_t count, size_t copies) {
    if (!attributes || !starts || count == 0 || count > copies || starts[0] != 0) {
        return false;
    }
    for (size_t i = 0; i < count; i++) {
        int order = attributes[i].srcAccessOrder;
        bool in_order = i == 0 || (starts[i] > starts[i - 1] && starts[i] < copies);
        if (!in_order || order < CU_SRC_ORDER_STREAM || order > CU_SRC_ORDER_ANY) {
            return false;
        }
    }
    return true;
}

/* Copies of a batch have no order among each other: late streams run them backwards. A source
 * whose access order is "any" is read now or later, at random. */
CUresult cuMemcpyBatchAsync(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, CUmemcpyAttributes *attributes,
                            size_t *attribute_starts, size_t attribute_count, size_t *failed, CUstream handle) {
    ENTER(NEEDS_CONTEXT)
    struct stream *stream = stream_lookup(handle);
    if (failed) {
        *failed = SIZE_MAX;
    }
    if (!stream) {
        return call_end(CUDA_ERROR_INVALID_HANDLE);
    }
    if (stream->is_legacy || !dsts || !srcs || !sizes || count == 0 ||
        !batch_attributes_valid(attributes, attribute_starts, attribute_count, count)) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (stream->capture) {
        capture_break(stream);
        return call_end(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    bool backwards = settings.late_us != 0;
    size_t group = backwards ? attribute_count - 1 : 0;
    for (size_t n = 0; n < count; n++) {
        size_t i = backwards ? count - 1 - n : n;
        while (backwards ? i < attribute_starts[group] : group + 1 < attribute_count && i >= attribute_starts[group + 1]) {
            group += backwards ? (size_t)-1 : 1;
        }
        int order = attributes[group].srcAccessOrder;
        struct copy copy = copy_of(dsts[i], EXPECT_ANY, srcs[i], EXPECT_ANY, sizes[i]);
        copy.snapshot = order == CU_SRC_ORDER_DURING_API_CALL || (order == CU_SRC_ORDER_ANY && random_below(2));
        copy.prompt = n > 0;
        int rc = copy_queue(&copy, handle);
        if (rc) {
            if (failed) {
                *failed = i;
            }
            return call_end(rc);
        }
    }
    return call_end(CUDA_SUCCESS);
}

/* Where the first row of one side of a pitched copy begins, and which memory it must be. */
static bool pitched_side(int type, uintptr_t host, CUdeviceptr device, size_t x, size_t y, size_t pitch, uintptr_t *address,
                         enum expectation *is) {
    switch (type) {
    case CU_MEMORYTYPE_HOST:
        *address = host;
        *is = EXPECT_HOST;
        break;
    case CU_MEMORYTYPE_DEVICE:
        *address = (uintptr_t)device;
        *is = EXPECT_DEVICE;
        break;
    case CU_MEMORYTYPE_UNIFIED:
        *address = (uintptr_t)device;
        *is = EXPECT_ANY;
        break;
    default:
        return false;
    }
    *address += y * pitch + x;
    return true;
}

/* A row each, all of which are checked before the first is queued. */
static int copy_pitched(struct copy row, size_t dst_pitch, size_t src_pitch, size_t height, CUstream handle) {
    struct stream *stream = stream_lookup(handle);
    if (!stream) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    struct copy first = row;
    for (size_t y = 0; y < height; y++, row.dst += dst_pitch, row.src += src_pitch) {
        int rc = 0;
        struct op *op = copy_prepare(&row, stream, &rc);
        if (!op) {
            return rc;
        }
        op_free(op);
    }
    for (row = first; height > 0; height--, row.dst += dst_pitch, row.src += src_pitch) {
        int rc = copy_queue(&row, handle);
        if (rc) {
            return rc;
        }
        row.prompt = true;
    }
    return CUDA_SUCCESS;
}

CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D *copy, CUstream stream) {
    enum { LARGEST_PITCH = 0x7fffffff };
    ENTER(NEEDS_CONTEXT)
    uintptr_t dst, src;
    enum expectation dst_is, src_is;
    bool sides = copy &&
                 pitched_side(copy->dstMemoryType, (uintptr_t)copy->dstHost, copy->dstDevice, copy->dstXInBytes, copy->dstY,
                              copy->dstPitch, &dst, &dst_is) &&
                 pitched_side(copy->srcMemoryType, (uintptr_t)copy->srcHost, copy->srcDevice, copy->srcXInBytes, copy->srcY,
                              copy->srcPitch, &src, &src_is);
    if (!sides || copy->dstPitch > LARGEST_PITCH || copy->srcPitch > LARGEST_PITCH ||
        copy->WidthInBytes + copy->dstXInBytes > copy->dstPitch || copy->WidthInBytes + copy->srcXInBytes > copy->srcPitch) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (copy->WidthInBytes == 0 || copy->Height == 0) {
        return call_end(CUDA_SUCCESS);
    }
    struct copy row = copy_of(dst, dst_is, src, src_is, copy->WidthInBytes);
    return call_end(copy_pitched(row, copy->dstPitch, copy->srcPitch, copy->Height, stream));
}

static int fill(CUdeviceptr dst, unsigned value, unsigned width, size_t count, CUstream handle) {
    struct stream *stream = stream_lookup(handle);
    if (!stream) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (count == 0) {
        return CUDA_SUCCESS;
    }
    struct side side;
    if (dst % width || !side_classify(&side, (uintptr_t)dst, count * width, stream->context->device) || is_pageable(&side)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    struct op *op = op_new(OP_FILL);
    if (!op) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    op->dst = side;
    side_hold(&op->dst);
    op->size = count * width;
    op->value = value;
    op->width = width;
    return stream_submit(stream, op, NULL);
}

CUresult cuMemsetD8_v2(CUdeviceptr dst, unsigned char value, size_t count) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    return call_end(fill(dst, value, 1, count, CU_STREAM_LEGACY));
}

CUresult cuMemsetD8Async(CUdeviceptr dst, unsigned char value, size_t count, CUstream stream) {
    ENTER(NEEDS_CONTEXT)
    return call_end(fill(dst, value, 1, count, stream));
}

CUresult cuMemsetD32Async(CUdeviceptr dst, unsigned value, size_t count, CUstream stream) {
    ENTER(NEEDS_CONTEXT)
    return call_end(fill(dst, value, 4, count, stream));
}
