/* Virtual memory management: address ranges are PROT_NONE mappings, physical memory is a memfd,
 * and mapping one into the other is mmap(MAP_FIXED). The driver itself always goes through a
 * second, private view of the memfd, so that it needs no rights on the address. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

#define MEMFD_NAME "fakecuda-device-"

enum { STALE_RANGES = 1024 };

struct range_table reservations;
struct range_table mappings;

static struct range stale[STALE_RANGES];
static unsigned stale_next;
static uint64_t last_id;

/* ---- Address ranges ---- */

static void *map_nothing(void *at, size_t size, int extra) {
    return mmap(at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | extra, -1, 0);
}

static void *reserve_at(uintptr_t hint, size_t size) {
    void *got = map_nothing((void *)hint, size, MAP_FIXED_NOREPLACE);
    if (got == MAP_FAILED) {
        return NULL;
    }
    if (got != (void *)hint) {
        munmap(got, size);
        return NULL;
    }
    return got;
}

static void *reserve_anywhere(size_t size, size_t alignment) {
    char *wide = map_nothing(NULL, size + alignment, 0);
    if (wide == MAP_FAILED) {
        return NULL;
    }
    char *base = (char *)(((uintptr_t)wide + alignment - 1) & ~(alignment - 1));
    if (base > wide) {
        munmap(wide, (size_t)(base - wide));
    }
    size_t tail = alignment - (size_t)(base - wide);
    if (tail) {
        munmap(base + size, tail);
    }
    return base;
}

static void forget_stale(uintptr_t base, size_t size) {
    for (int i = 0; i < STALE_RANGES; i++) {
        if (stale[i].size && stale[i].base < base + size && base < stale[i].base + stale[i].size) {
            stale[i].size = 0;
        }
    }
}

struct reservation *reservation_create(size_t size, size_t alignment, uintptr_t hint, bool plain) {
    struct reservation *reservation = calloc(1, sizeof *reservation);
    if (!reservation) {
        return NULL;
    }
    void *base = hint && hint % alignment == 0 ? reserve_at(hint, size) : NULL;
    if (!base) {
        base = reserve_anywhere(size, alignment);
    }
    reservation->range = (struct range){(uintptr_t)base, size};
    reservation->plain = plain;
    reservation->id = ++last_id;
    if (!base || !range_insert(&reservations, &reservation->range)) {
        if (base) {
            munmap(base, size);
        }
        free(reservation);
        return NULL;
    }
    forget_stale((uintptr_t)base, size);
    return reservation;
}

void reservation_destroy(struct reservation *reservation) {
    range_remove(&reservations, &reservation->range);
    munmap((void *)reservation->range.base, reservation->range.size);
    stale[stale_next++ % STALE_RANGES] = reservation->range;
    free(reservation);
}

bool address_is_stale(uintptr_t address) {
    uintptr_t page = address & ~(uintptr_t)4095;
    unsigned char resident;
    for (int i = 0; i < STALE_RANGES; i++) {
        if (stale[i].size && address >= stale[i].base && address - stale[i].base < stale[i].size) {
            return mincore((void *)page, 4096, &resident) != 0 && errno == ENOMEM;
        }
    }
    return false;
}

/* ---- Physical memory ---- */

static struct physical *physical_adopt(int fd, size_t size, const CUmemAllocationProp *prop, int *rc) {
    struct physical *physical = calloc(1, sizeof *physical);
    void *view = physical ? mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    if (view == MAP_FAILED) {
        free(physical);
        close(fd);
        *rc = CUDA_ERROR_OUT_OF_MEMORY;
        return NULL;
    }
    physical->id = ++last_id;
    physical->fd = fd;
    physical->device = prop->location.id;
    physical->size = size;
    physical->view = view;
    physical->prop = *prop;
    physical->charged = true;
    object_add(&physical->object, OBJECT_PHYSICAL);
    settings.used[physical->device] += size;
    settings.allocations[physical->device]++;
    *rc = CUDA_SUCCESS;
    return physical;
}

struct physical *physical_create(size_t size, const CUmemAllocationProp *prop, int *rc) {
    if (size > device_free_bytes(prop->location.id)) {
        *rc = CUDA_ERROR_OUT_OF_MEMORY;
        return NULL;
    }
    char name[32];
    snprintf(name, sizeof name, MEMFD_NAME "%d", prop->location.id);
    int fd = memfd_create(name, MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)size) != 0) {
        if (fd >= 0) {
            close(fd);
        }
        *rc = CUDA_ERROR_OUT_OF_MEMORY;
        return NULL;
    }
    return physical_adopt(fd, size, prop, rc);
}

void physical_settle(struct physical *physical) {
    if (physical->handle_refs || physical->mapping_refs) {
        return;
    }
    if (physical->charged) {
        physical->charged = false;
        settings.used[physical->device] -= physical->size;
        settings.allocations[physical->device]--;
        object_remove(&physical->object);
    }
    if (physical->pins == 0) {
        munmap(physical->view, physical->size);
        close(physical->fd);
        free(physical);
    }
}

static struct physical *physical_of(CUmemHandle handle) {
    struct physical *physical = object_find(OBJECT_PHYSICAL, handle);
    return physical && physical->handle_refs ? physical : NULL;
}

/* ---- Mappings ---- */

unsigned mapping_access(const struct mapping *mapping, int device) {
    if (mapping->plain && device != mapping->physical->device) {
        bool enabled = contexts[device].peers & (1u << mapping->physical->device);
        return enabled ? CU_MEM_ACCESS_READWRITE : CU_MEM_ACCESS_NONE;
    }
    return mapping->access[device];
}

void mapping_protect(const struct mapping *mapping) {
    unsigned any = 0;
    for (int device = 0; device < MAX_DEVICES; device++) {
        any |= mapping->access[device];
    }
    int protection = PROT_NONE;
    if (!settings.host_unreadable && (any & CU_MEM_ACCESS_READ)) {
        protection = any == CU_MEM_ACCESS_READWRITE ? PROT_READ | PROT_WRITE : PROT_READ;
    }
    mprotect((void *)mapping->range.base, mapping->range.size, protection);
}

struct mapping *mapping_create(uintptr_t base, struct physical *physical, bool plain) {
    struct mapping *mapping = calloc(1, sizeof *mapping);
    if (!mapping) {
        return NULL;
    }
    mapping->range = (struct range){base, physical->size};
    mapping->physical = physical;
    mapping->plain = plain;
    void *at = mmap((void *)base, physical->size, PROT_NONE, MAP_SHARED | MAP_FIXED, physical->fd, 0);
    if (at == MAP_FAILED || !range_insert(&mappings, &mapping->range)) {
        if (at != MAP_FAILED) {
            map_nothing((void *)base, physical->size, MAP_FIXED);
        }
        free(mapping);
        return NULL;
    }
    physical->mapping_refs++;
    return mapping;
}

void mapping_destroy(struct mapping *mapping) {
    range_remove(&mappings, &mapping->range);
    map_nothing((void *)mapping->range.base, mapping->range.size, MAP_FIXED);
    struct physical *physical = mapping->physical;
    mapping->gone = true;
    physical->mapping_refs--;
    physical_settle(physical);
    if (mapping->pins == 0) {
        free(mapping);
    }
}

/* The number of mappings that cover [base, base + size) exactly and without a gap, or 0. */
static size_t mappings_covering(uintptr_t base, size_t size) {
    size_t count = 0, covered = 0;
    while (covered < size) {
        struct mapping *mapping = range_containing(&mappings, base + covered);
        if (!mapping || mapping->plain || mapping->range.base != base + covered || mapping->range.size > size - covered) {
            return 0;
        }
        covered += mapping->range.size;
        count++;
    }
    return count;
}

/* ---- Entry points ---- */

static int prop_check(const CUmemAllocationProp *prop) {
    if (!prop || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE) {
        return prop->location.type == CU_MEM_LOCATION_TYPE_HOST_NUMA ? CUDA_ERROR_NOT_SUPPORTED : CUDA_ERROR_INVALID_VALUE;
    }
    if (!device_valid(prop->location.id)) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    if (prop->requestedHandleTypes & ~CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

static bool size_fits(size_t size) {
    return size && size % GRANULARITY == 0;
}

CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *prop, int option) {
    ENTER(NEEDS_INIT)
    int rc = prop_check(prop);
    if (!bytes || (option != 0 && option != 1)) {
        rc = CUDA_ERROR_INVALID_VALUE;
    }
    if (rc == 0) {
        *bytes = GRANULARITY;
    }
    return call_end(rc);
}

CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment, CUdeviceptr hint, unsigned long long flags) {
    ENTER(NEEDS_HEALTH)
    if (!address || flags || !size_fits(size) || (alignment & (alignment - 1))) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (size > (size_t)1 << 46 || alignment > (size_t)1 << 46) {
        return call_end(CUDA_ERROR_OUT_OF_MEMORY);
    }
    if (alignment < GRANULARITY) {
        alignment = GRANULARITY;
    }
    struct reservation *reservation = reservation_create(size, alignment, (uintptr_t)hint, false);
    if (!reservation) {
        return call_end(CUDA_ERROR_OUT_OF_MEMORY);
    }
    *address = reservation->range.base;
    return call_end(CUDA_SUCCESS);
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
    ENTER(NEEDS_HEALTH)
    struct reservation *reservation = range_containing(&reservations, (uintptr_t)address);
    if (!reservation || reservation->plain || reservation->range.base != address || reservation->range.size != size) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (range_overlapping(&mappings, (uintptr_t)address, size)) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    reservation_destroy(reservation);
    return call_end(CUDA_SUCCESS);
}

CUresult cuMemCreate(CUmemHandle *handle, size_t size, const CUmemAllocationProp *prop, unsigned long long flags) {
    ENTER(NEEDS_HEALTH)
    int rc = prop_check(prop);
    if (!handle || flags || !size_fits(size)) {
        rc = CUDA_ERROR_INVALID_VALUE;
    }
    if (rc) {
        return call_end(rc);
    }
    struct physical *physical = physical_create(size, prop, &rc);
    if (physical) {
        physical->handle_refs = 1;
        *handle = physical->object.handle;
    }
    return call_end(rc);
}

CUresult cuMemRelease(CUmemHandle handle) {
    ENTER(NEEDS_HEALTH)
    struct physical *physical = physical_of(handle);
    if (!physical) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    physical->handle_refs--;
    physical_settle(physical);
    return call_end(CUDA_SUCCESS);
}

CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset, CUmemHandle handle, unsigned long long flags) {
    ENTER(NEEDS_HEALTH)
    struct physical *physical = physical_of(handle);
    struct reservation *reservation = range_containing(&reservations, (uintptr_t)address);
    if (!physical || flags || !reservation || reservation->plain || address % GRANULARITY) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (offset) {
        return call_end(CUDA_ERROR_NOT_SUPPORTED);
    }
    if (size != physical->size || size > reservation->range.base + reservation->range.size - address) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (range_overlapping(&mappings, (uintptr_t)address, size)) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    return call_end(mapping_create((uintptr_t)address, physical, false) ? CUDA_SUCCESS : CUDA_ERROR_OPERATING_SYSTEM);
}

CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
    ENTER(NEEDS_HEALTH)
    size_t count = mappings_covering((uintptr_t)address, size);
    if (count == 0) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    while (count--) {
        mapping_destroy(range_overlapping(&mappings, (uintptr_t)address, size));
    }
    return call_end(CUDA_SUCCESS);
}

static int access_list_check(const CUmemAccessDesc *list, size_t count) {
    if (!list || count == 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    for (size_t i = 0; i < count; i++) {
        int flags = list[i].flags;
        if (list[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE ||
            (flags != CU_MEM_ACCESS_NONE && flags != CU_MEM_ACCESS_READ && flags != CU_MEM_ACCESS_READWRITE)) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        if (!device_valid(list[i].location.id)) {
            return CUDA_ERROR_INVALID_DEVICE;
        }
    }
    return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc *list, size_t count) {
    ENTER(NEEDS_HEALTH)
    int rc = access_list_check(list, count);
    if (rc == 0 && mappings_covering((uintptr_t)address, size) == 0) {
        rc = CUDA_ERROR_INVALID_VALUE;
    }
    if (rc) {
        return call_end(rc);
    }
    for (size_t done = 0; done < size;) {
        struct mapping *mapping = range_containing(&mappings, (uintptr_t)address + done);
        for (size_t i = 0; i < count; i++) {
            mapping->access[list[i].location.id] = (unsigned char)list[i].flags;
        }
        mapping_protect(mapping);
        done += mapping->range.size;
    }
    return call_end(CUDA_SUCCESS);
}

CUresult cuMemGetAccess(unsigned long long *flags, const CUmemLocation *location, CUdeviceptr address) {
    ENTER(NEEDS_HEALTH)
    struct mapping *mapping = range_containing(&mappings, (uintptr_t)address);
    if (!flags || !location || location->type != CU_MEM_LOCATION_TYPE_DEVICE || !mapping) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!device_valid(location->id)) {
        return call_end(CUDA_ERROR_INVALID_DEVICE);
    }
    *flags = mapping_access(mapping, location->id);
    return call_end(CUDA_SUCCESS);
}

CUresult cuMemRetainAllocationHandle(CUmemHandle *handle, void *address) {
    ENTER(NEEDS_HEALTH)
    struct mapping *mapping = range_containing(&mappings, (uintptr_t)address);
    if (!handle || !mapping || mapping->plain) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    mapping->physical->handle_refs++;
    *handle = mapping->physical->object.handle;
    return call_end(CUDA_SUCCESS);
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *prop, CUmemHandle handle) {
    ENTER(NEEDS_HEALTH)
    struct physical *physical = physical_of(handle);
    if (!prop || !physical) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    *prop = physical->prop;
    return call_end(CUDA_SUCCESS);
}

CUresult cuMemExportToShareableHandle(void *shareable, CUmemHandle handle, int type, unsigned long long flags) {
    ENTER(NEEDS_HEALTH)
    struct physical *physical = physical_of(handle);
    if (!shareable || !physical || flags) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
        return call_end(CUDA_ERROR_NOT_SUPPORTED);
    }
    if (!(physical->prop.requestedHandleTypes & type)) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    int fd = fcntl(physical->fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) {
        return call_end(CUDA_ERROR_OPERATING_SYSTEM);
    }
    *(int *)shareable = fd;
    return call_end(CUDA_SUCCESS);
}

/* The device whose memory a descriptor is, or -1. */
static int device_of_fd(int fd) {
    char link[64], target[128];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0) {
        return -1;
    }
    target[length] = 0;
    int device;
    return sscanf(target, "/memfd:" MEMFD_NAME "%d", &device) == 1 && device_valid(device) ? device : -1;
}

struct same_file {
    struct stat wanted;
    struct physical *found;
};

static void match_file(void *object, void *argument) {
    struct same_file *search = argument;
    struct physical *physical = object;
    struct stat have;
    if (fstat(physical->fd, &have) == 0 && have.st_ino == search->wanted.st_ino && have.st_dev == search->wanted.st_dev) {
        search->found = physical;
    }
}

CUresult cuMemImportFromShareableHandle(CUmemHandle *handle, void *shareable, int type) {
    ENTER(NEEDS_HEALTH)
    if (!handle) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
        return call_end(CUDA_ERROR_NOT_SUPPORTED);
    }
    int fd = (int)(intptr_t)shareable;
    int device = device_of_fd(fd);
    struct same_file search = {.found = NULL};
    if (device < 0 || fstat(fd, &search.wanted) != 0) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    object_each(OBJECT_PHYSICAL, match_file, &search);
    int rc = CUDA_SUCCESS;
    if (!search.found) {
        int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        if (own < 0) {
            return call_end(CUDA_ERROR_OPERATING_SYSTEM);
        }
        CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                    .requestedHandleTypes = type,
                                    .location = {CU_MEM_LOCATION_TYPE_DEVICE, device}};
        search.found = physical_adopt(own, (size_t)search.wanted.st_size, &prop, &rc);
    }
    if (search.found) {
        search.found->handle_refs++;
        *handle = search.found->object.handle;
    }
    return call_end(rc);
}
