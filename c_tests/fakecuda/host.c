/* Registered and driver-allocated pinned host memory. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>

#include "internal.h"

#define PAGE ((uintptr_t)4096)

struct range_table registrations;

static uint64_t last_id = (uint64_t)1 << 32;

/* True if every page of the range is mapped in this process. */
static bool range_is_mapped(uintptr_t base, size_t size) {
    uintptr_t start = base & ~(PAGE - 1);
    size_t length = base + size - start;
    unsigned char *resident = malloc(length / PAGE + 2);
    bool mapped = resident && mincore((void *)start, length, resident) == 0;
    free(resident);
    return mapped;
}

static struct registration *registration_add(uintptr_t base, size_t size, unsigned flags, bool owned) {
    struct registration *registration = calloc(1, sizeof *registration);
    if (!registration) {
        return NULL;
    }
    registration->range = (struct range){base, size};
    registration->flags = flags;
    registration->owned = owned;
    registration->device = context_current()->device;
    registration->id = ++last_id;
    if (!range_insert(&registrations, &registration->range)) {
        free(registration);
        return NULL;
    }
    return registration;
}

/* Copies already queued still use the memory: wait for them, as the driver does. */
static void registration_remove(struct registration *registration) {
    range_remove(&registrations, &registration->range);
    while (registration->in_flight) {
        state_wait();
    }
    if (registration->owned) {
        munmap((void *)registration->range.base, registration->range.size);
    }
    free(registration);
}

CUresult cuMemHostRegister_v2(void *address, size_t size, unsigned flags) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    uintptr_t base = (uintptr_t)address;
    if (!address || !size || flags > 15 || base + size < base) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (range_overlapping(&registrations, base, size)) {
        return call_end(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    }
    if (range_overlapping(&reservations, base, size) || !range_is_mapped(base, size)) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    return call_end(registration_add(base, size, flags, false) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY);
}

CUresult cuMemHostUnregister(void *address) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    struct registration *registration = range_containing(&registrations, (uintptr_t)address);
    if (!registration || registration->owned || registration->range.base != (uintptr_t)address) {
        return call_end(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    }
    registration_remove(registration);
    return call_end(CUDA_SUCCESS);
}

CUresult cuMemHostGetFlags(unsigned *flags, void *address) {
    ENTER(NEEDS_CONTEXT)
    struct registration *registration = range_containing(&registrations, (uintptr_t)address);
    if (!flags || !registration) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    *flags = registration->flags;
    return call_end(CUDA_SUCCESS);
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *device, void *address, unsigned flags) {
    ENTER(NEEDS_CONTEXT)
    if (!device || flags || !range_containing(&registrations, (uintptr_t)address)) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    *device = (uintptr_t)address;
    return call_end(CUDA_SUCCESS);
}

static int allocate(void **address, size_t size, unsigned flags) {
    if (!address || !size || flags > 7) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    size = (size + PAGE - 1) & ~(PAGE - 1);
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (!registration_add((uintptr_t)memory, size, flags, true)) {
        munmap(memory, size);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *address = memory;
    return CUDA_SUCCESS;
}

CUresult cuMemAllocHost_v2(void **address, size_t size) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    return call_end(allocate(address, size, CU_MEMHOST_PORTABLE | CU_MEMHOST_DEVICEMAP));
}

CUresult cuMemHostAlloc(void **address, size_t size, unsigned flags) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    return call_end(allocate(address, size, flags));
}

CUresult cuMemFreeHost(void *address) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    struct registration *registration = range_containing(&registrations, (uintptr_t)address);
    if (!registration || !registration->owned || registration->range.base != (uintptr_t)address) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    registration_remove(registration);
    return call_end(CUDA_SUCCESS);
}

uint64_t fakecuda_registered_bytes(void) {
    state_lock();
    uint64_t bytes = 0;
    for (size_t i = 0; i < registrations.count; i++) {
        bytes += registrations.items[i]->size;
    }
    state_unlock();
    return bytes;
}
