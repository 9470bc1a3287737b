/* cuMemAlloc and cuMemFree, free memory, and queries about pointers. */
#include <string.h>

#include "internal.h"

enum {
    ATTRIBUTE_CONTEXT = 1,
    ATTRIBUTE_MEMORY_TYPE = 2,
    ATTRIBUTE_DEVICE_POINTER = 3,
    ATTRIBUTE_HOST_POINTER = 4,
    ATTRIBUTE_SYNC_MEMOPS = 6,
    ATTRIBUTE_BUFFER_ID = 7,
    ATTRIBUTE_IS_MANAGED = 8,
    ATTRIBUTE_DEVICE_ORDINAL = 9,
    ATTRIBUTE_IS_LEGACY_IPC_CAPABLE = 10,
    ATTRIBUTE_RANGE_START = 11,
    ATTRIBUTE_RANGE_SIZE = 12,
    ATTRIBUTE_MAPPED = 13,
    ATTRIBUTE_ALLOWED_HANDLE_TYPES = 14,
    ATTRIBUTE_IS_RDMA_CAPABLE = 15,
    ATTRIBUTE_ACCESS_FLAGS = 16,
    ATTRIBUTE_MEMPOOL = 17,
    ATTRIBUTE_MAPPING_SIZE = 18,
    ATTRIBUTE_MAPPING_BASE = 19,
    ATTRIBUTE_MEMORY_BLOCK = 20,
};

CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    ENTER(NEEDS_CONTEXT)
    if (!available || !total) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    int device = context_current()->device;
    *available = device_free_bytes(device);
    *total = settings.memory[device];
    return call_end(CUDA_SUCCESS);
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    if (!address || !size) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (size > (size_t)1 << 46) {
        return call_end(CUDA_ERROR_OUT_OF_MEMORY);
    }
    size = (size + GRANULARITY - 1) & ~(GRANULARITY - 1);
    int device = context_current()->device;
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED, .location = {CU_MEM_LOCATION_TYPE_DEVICE, device}};
    int rc;
    struct physical *physical = physical_create(size, &prop, &rc);
    if (!physical) {
        return call_end(rc);
    }
    struct reservation *reservation = reservation_create(size, GRANULARITY, 0, true);
    struct mapping *mapping = reservation ? mapping_create(reservation->range.base, physical, true) : NULL;
    if (!mapping) {
        if (reservation) {
            reservation_destroy(reservation);
        }
        physical_settle(physical);
        return call_end(CUDA_ERROR_OUT_OF_MEMORY);
    }
    mapping->access[device] = CU_MEM_ACCESS_READWRITE;
    mapping_protect(mapping);
    *address = mapping->range.base;
    return call_end(CUDA_SUCCESS);
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER(NEEDS_CONTEXT | UNSAFE_IN_CAPTURE)
    struct reservation *reservation = range_containing(&reservations, (uintptr_t)address);
    if (!reservation || !reservation->plain || reservation->range.base != address) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    uint64_t id = reservation->id;
    struct mapping *mapping = range_containing(&mappings, (uintptr_t)address);
    context_drain(&contexts[mapping->physical->device]);
    /* The lock was dropped: another thread may have freed it. */
    reservation = range_containing(&reservations, (uintptr_t)address);
    if (!reservation || reservation->id != id) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    mapping_destroy(range_containing(&mappings, (uintptr_t)address));
    reservation_destroy(reservation);
    return call_end(CUDA_SUCCESS);
}

/* What is known of an address. At most one of reservation and registration is set. */
struct pointer {
    uintptr_t address;
    struct reservation *reservation;
    struct mapping *mapping;
    struct registration *registration;
};

static struct pointer pointer_of(CUdeviceptr address) {
    struct pointer pointer = {.address = (uintptr_t)address};
    pointer.reservation = range_containing(&reservations, pointer.address);
    pointer.mapping = range_containing(&mappings, pointer.address);
    pointer.registration = pointer.reservation ? NULL : range_containing(&registrations, pointer.address);
    return pointer;
}

static void put_pointer(void *data, uintptr_t value) {
    memcpy(data, &value, sizeof value);
}

static void put_u64(void *data, uint64_t value) {
    memcpy(data, &value, sizeof value);
}

static void put_u32(void *data, uint32_t value) {
    memcpy(data, &value, sizeof value);
}

/* Whole-range facts, known for a reserved range even where nothing is mapped. */
static int range_attribute(const struct pointer *pointer, int attribute, void *data) {
    const struct range *range = pointer->reservation ? &pointer->reservation->range : &pointer->registration->range;
    switch (attribute) {
    case ATTRIBUTE_RANGE_START:
        put_pointer(data, range->base);
        return CUDA_SUCCESS;
    case ATTRIBUTE_RANGE_SIZE:
        put_u64(data, range->size);
        return CUDA_SUCCESS;
    case ATTRIBUTE_MAPPED:
        put_u32(data, pointer->mapping != NULL || pointer->registration != NULL);
        return CUDA_SUCCESS;
    default:
        return CUDA_ERROR_INVALID_VALUE;
    }
}

static int device_attribute(const struct pointer *pointer, int attribute, void *data) {
    const struct mapping *mapping = pointer->mapping;
    const struct physical *physical = mapping->physical;
    struct fc_context *current = context_current();
    switch (attribute) {
    case ATTRIBUTE_CONTEXT:
        put_pointer(data, mapping->plain ? (uintptr_t)&contexts[physical->device] : 0);
        return CUDA_SUCCESS;
    case ATTRIBUTE_MEMORY_TYPE:
        put_u32(data, CU_MEMORYTYPE_DEVICE);
        return CUDA_SUCCESS;
    case ATTRIBUTE_DEVICE_POINTER:
        put_pointer(data, pointer->address);
        return CUDA_SUCCESS;
    case ATTRIBUTE_BUFFER_ID:
    case ATTRIBUTE_MEMORY_BLOCK:
        put_u64(data, physical->id);
        return CUDA_SUCCESS;
    case ATTRIBUTE_DEVICE_ORDINAL:
        put_u32(data, (uint32_t)physical->device);
        return CUDA_SUCCESS;
    case ATTRIBUTE_IS_LEGACY_IPC_CAPABLE:
        put_u32(data, mapping->plain);
        return CUDA_SUCCESS;
    case ATTRIBUTE_ALLOWED_HANDLE_TYPES:
        put_u64(data, (uint64_t)physical->prop.requestedHandleTypes);
        return CUDA_SUCCESS;
    case ATTRIBUTE_IS_RDMA_CAPABLE:
        put_u32(data, mapping->plain || physical->prop.allocFlags.gpuDirectRDMACapable);
        return CUDA_SUCCESS;
    case ATTRIBUTE_ACCESS_FLAGS:
        put_u32(data, mapping_access(mapping, current ? current->device : physical->device));
        return CUDA_SUCCESS;
    case ATTRIBUTE_MAPPING_SIZE:
        put_u64(data, mapping->range.size);
        return CUDA_SUCCESS;
    case ATTRIBUTE_MAPPING_BASE:
        put_pointer(data, mapping->range.base);
        return CUDA_SUCCESS;
    default:
        return CUDA_ERROR_INVALID_VALUE;
    }
}

static int host_attribute(const struct pointer *pointer, int attribute, void *data) {
    const struct registration *registration = pointer->registration;
    switch (attribute) {
    case ATTRIBUTE_CONTEXT:
        put_pointer(data, (uintptr_t)&contexts[registration->device]);
        return CUDA_SUCCESS;
    case ATTRIBUTE_MEMORY_TYPE:
        put_u32(data, CU_MEMORYTYPE_HOST);
        return CUDA_SUCCESS;
    case ATTRIBUTE_DEVICE_POINTER:
    case ATTRIBUTE_HOST_POINTER:
        put_pointer(data, pointer->address);
        return CUDA_SUCCESS;
    case ATTRIBUTE_BUFFER_ID:
        put_u64(data, registration->id);
        return CUDA_SUCCESS;
    case ATTRIBUTE_DEVICE_ORDINAL:
        put_u32(data, (uint32_t)registration->device);
        return CUDA_SUCCESS;
    case ATTRIBUTE_IS_LEGACY_IPC_CAPABLE:
    case ATTRIBUTE_IS_RDMA_CAPABLE:
        put_u32(data, 0);
        return CUDA_SUCCESS;
    case ATTRIBUTE_ALLOWED_HANDLE_TYPES:
        put_u64(data, 0);
        return CUDA_SUCCESS;
    default:
        return CUDA_ERROR_INVALID_VALUE;
    }
}

static int pointer_attribute(const struct pointer *pointer, int attribute, void *data) {
    if (!data || (!pointer->reservation && !pointer->registration)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (range_attribute(pointer, attribute, data) == 0) {
        return CUDA_SUCCESS;
    }
    if (attribute == ATTRIBUTE_IS_MANAGED || attribute == ATTRIBUTE_SYNC_MEMOPS) {
        put_u32(data, 0);
        return CUDA_SUCCESS;
    }
    if (attribute == ATTRIBUTE_MEMPOOL) {
        put_pointer(data, 0);
        return CUDA_SUCCESS;
    }
    if (pointer->mapping) {
        return device_attribute(pointer, attribute, data);
    }
    return pointer->registration ? host_attribute(pointer, attribute, data) : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr address) {
    ENTER(NEEDS_HEALTH)
    struct pointer pointer = pointer_of(address);
    return call_end(pointer_attribute(&pointer, attribute, data));
}

static bool attribute_is_wide(int attribute) {
    switch (attribute) {
    case ATTRIBUTE_MEMORY_TYPE:
    case ATTRIBUTE_SYNC_MEMOPS:
    case ATTRIBUTE_IS_MANAGED:
    case ATTRIBUTE_DEVICE_ORDINAL:
    case ATTRIBUTE_IS_LEGACY_IPC_CAPABLE:
    case ATTRIBUTE_MAPPED:
    case ATTRIBUTE_IS_RDMA_CAPABLE:
    case ATTRIBUTE_ACCESS_FLAGS:
        return false;
    default:
        return true;
    }
}

/* Unlike the single query, this one answers for every pointer: what does not apply reads as zero,
 * or as -2 for the ordinal. */
CUresult cuPointerGetAttributes(unsigned count, int *attributes, void **data, CUdeviceptr address) {
    ENTER(NEEDS_HEALTH)
    if (count && (!attributes || !data)) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    struct pointer pointer = pointer_of(address);
    for (unsigned i = 0; i < count; i++) {
        if (!data[i] || attributes[i] < ATTRIBUTE_CONTEXT || attributes[i] > 22) {
            return call_end(CUDA_ERROR_INVALID_VALUE);
        }
        if (pointer_attribute(&pointer, attributes[i], data[i]) != 0) {
            if (attribute_is_wide(attributes[i])) {
                put_u64(data[i], 0);
            } else {
                put_u32(data[i], attributes[i] == ATTRIBUTE_DEVICE_ORDINAL ? (uint32_t)-2 : 0);
            }
        }
    }
    return call_end(CUDA_SUCCESS);
}
