/* Tests of the software CUDA driver itself, through dlopen.
 * usage: selftest LIBRARY GROUP [ARGUMENT...]; selftest.sh runs all groups in all modes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "driver.h"
#include "fakecuda.h"

#define MiB ((size_t)1 << 20)
#define BLOCK (2 * MiB)

static void *library;
static const char *library_path;
static const char *self_path;
static _Atomic int failures;
static _Atomic int checks;

static void *symbol(const char *name) {
    void *address = dlsym(library, name);
    if (!address) {
        fprintf(stderr, "missing symbol %s\n", name);
        exit(1);
    }
    return address;
}

#define CALL(function) ((__typeof__(&function))symbol(#function))

static void expect(long long got, long long wanted, const char *what, int line) {
    checks++;
    if (got != wanted) {
        failures++;
        fprintf(stderr, "selftest.c:%d: %s: got %lld, wanted %lld\n", line, what, got, wanted);
    }
}

#define EQ(got, wanted) expect((long long)(got), (long long)(wanted), #got, __LINE__)
#define OK(call) EQ(call, 0)

/* ---- Helpers ---- */

static CUmemAllocationProp prop_of(int device) {
    return (CUmemAllocationProp){.type = CU_MEM_ALLOCATION_TYPE_PINNED, .location = {CU_MEM_LOCATION_TYPE_DEVICE, device}};
}

static CUcontext start(int device) {
    CUcontext context = NULL;
    OK(CALL(cuInit)(0));
    OK(CALL(cuDevicePrimaryCtxRetain)(&context, device));
    OK(CALL(cuCtxSetCurrent)(context));
    return context;
}

static void allow(CUdeviceptr address, size_t size, int device, int flags) {
    CUmemAccessDesc access = {.location = {CU_MEM_LOCATION_TYPE_DEVICE, device}, .flags = flags};
    OK(CALL(cuMemSetAccess)(address, size, &access, 1));
}

static CUdeviceptr reserve(size_t size) {
    CUdeviceptr address = 0;
    OK(CALL(cuMemAddressReserve)(&address, size, 0, 0, 0));
    return address;
}

static void back(CUdeviceptr address, size_t size, int device) {
    CUmemHandle handle = 0;
    CUmemAllocationProp prop = prop_of(device);
    OK(CALL(cuMemCreate)(&handle, size, &prop, 0));
    OK(CALL(cuMemMap)(address, size, 0, handle, 0));
    OK(CALL(cuMemRelease)(handle));
    allow(address, size, device, CU_MEM_ACCESS_READWRITE);
}

static CUdeviceptr allocate(size_t size, int device) {
    CUdeviceptr address = reserve(size);
    back(address, size, device);
    return address;
}

static void release(CUdeviceptr address, size_t size) {
    OK(CALL(cuMemUnmap)(address, size));
    OK(CALL(cuMemAddressFree)(address, size));
}

static CUstream new_stream(void) {
    CUstream stream = NULL;
    OK(CALL(cuStreamCreate)(&stream, CU_STREAM_NON_BLOCKING));
    return stream;
}

static CUevent new_event(void) {
    CUevent event = NULL;
    OK(CALL(cuEventCreate)(&event, CU_EVENT_DISABLE_TIMING));
    return event;
}

static unsigned char peek_byte(CUdeviceptr address) {
    unsigned char byte = 0xEE;
    OK(CALL(fakecuda_peek)((void *)(uintptr_t)address, &byte, 1));
    return byte;
}

static char *host_buffer(size_t size) {
    char *buffer = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return buffer;
}

static sigjmp_buf fault_return;

static void on_fault(int number) {
    (void)number;
    siglongjmp(fault_return, 1);
}

/* True if the host can read the address. */
static bool readable(CUdeviceptr address) {
    struct sigaction action = {.sa_handler = on_fault}, before_segv, before_bus;
    sigaction(SIGSEGV, &action, &before_segv);
    sigaction(SIGBUS, &action, &before_bus);
    volatile bool result = false;
    if (sigsetjmp(fault_return, 1) == 0) {
        (void)*(volatile char *)(uintptr_t)address;
        result = true;
    }
    sigaction(SIGSEGV, &before_segv, NULL);
    sigaction(SIGBUS, &before_bus, NULL);
    return result;
}

static void nothing_left(int device) {
    EQ(CALL(fakecuda_live_handles)(device), 0);
    EQ(CALL(fakecuda_live_bytes)(device), 0);
    EQ(CALL(fakecuda_mapped_bytes)(device), 0);
    EQ(CALL(fakecuda_reserved_bytes)(), 0);
    EQ(CALL(fakecuda_registered_bytes)(), 0);
    EQ(CALL(fakecuda_live_streams)(), 0);
    EQ(CALL(fakecuda_live_events)(), 0);
    EQ(CALL(fakecuda_pending_work)(), 0);
}

/* ---- Groups ---- */

static void test_basics(void) {
    int number = 0;
    const char *text = NULL;
    CUcontext context = NULL, popped = NULL;
    EQ(CALL(cuDeviceGetCount)(&number), CUDA_ERROR_NOT_INITIALIZED);
    OK(CALL(cuDriverGetVersion)(&number));
    EQ(number, 13000);
    EQ(CALL(cuInit)(1), CUDA_ERROR_INVALID_VALUE);
    OK(CALL(cuInit)(0));
    OK(CALL(cuDeviceGetCount)(&number));
    EQ(number, 1);
    OK(CALL(cuDeviceGet)(&number, 0));
    EQ(CALL(cuDeviceGet)(&number, 1), CUDA_ERROR_INVALID_DEVICE);
    OK(CALL(cuDeviceGetAttribute)(&number, 102, 0));
    EQ(number, 1);
    OK(CALL(cuGetErrorName)(700, &text));
    EQ(strcmp(text, "CUDA_ERROR_ILLEGAL_ADDRESS"), 0);
    EQ(CALL(cuGetErrorString)(12345, &text), CUDA_ERROR_INVALID_VALUE);
    EQ(text == NULL, 1);
    char name[32];
    OK(CALL(cuDeviceGetName)(name, sizeof name, 0));
    OK(CALL(cuDeviceGetPCIBusId)(name, sizeof name, 0));
    EQ(strcmp(name, "0000:10:00.0"), 0);
    CUuuid uuid;
    OK(CALL(cuDeviceGetUuid_v2)(&uuid, 0));

    size_t available, total;
    EQ(CALL(cuMemGetInfo_v2)(&available, &total), CUDA_ERROR_INVALID_CONTEXT);
    EQ(CALL(cuCtxPopCurrent_v2)(&popped), CUDA_ERROR_INVALID_CONTEXT);
    OK(CALL(cuCtxGetCurrent)(&context));
    EQ(context == NULL, 1);
    OK(CALL(cuDevicePrimaryCtxRetain)(&context, 0));
    OK(CALL(cuDevicePrimaryCtxRetain)(&context, 0));
    EQ(CALL(fakecuda_primary_refs)(0), 2);
    OK(CALL(cuCtxPushCurrent_v2)(context));
    OK(CALL(cuMemGetInfo_v2)(&available, &total));
    EQ(available, total);
    OK(CALL(cuCtxPopCurrent_v2)(&popped));
    EQ(popped == context, 1);
    OK(CALL(cuDevicePrimaryCtxRelease_v2)(0));
    OK(CALL(cuCtxPushCurrent_v2)(context));
    OK(CALL(cuDevicePrimaryCtxRelease_v2)(0));
    EQ(CALL(cuMemGetInfo_v2)(&available, &total), CUDA_ERROR_CONTEXT_IS_DESTROYED);
    EQ(CALL(cuDevicePrimaryCtxRelease_v2)(0), CUDA_ERROR_INVALID_CONTEXT);
    unsigned flags;
    OK(CALL(cuDevicePrimaryCtxGetState)(0, &flags, &number));
    EQ(number, 0);

    void *function = NULL;
    int status = -1;
    OK(CALL(cuGetProcAddress_v2)("cuMemAlloc", &function, 12080, 0, &status));
    EQ(function == symbol("cuMemAlloc_v2"), 1);
    OK(CALL(cuGetProcAddress_v2)("cuMemcpyBatchAsync", &function, 12000, 0, &status));
    EQ(status, 2);
    OK(CALL(cuGetProcAddress_v2)("cuNoSuchThing", &function, 12080, 0, &status));
    EQ(status, 1);
    EQ(function == NULL, 1);
}

static void test_vmm(void) {
    start(0);
    CUmemAllocationProp prop = prop_of(0);
    CUmemHandle handle = 0, again = 0;
    size_t granularity = 0, available, total;
    OK(CALL(cuMemGetAllocationGranularity)(&granularity, &prop, 0));
    EQ(granularity, BLOCK);

    CUdeviceptr base = reserve(8 * BLOCK), bad;
    EQ(CALL(cuMemAddressReserve)(&bad, BLOCK + 1, 0, 0, 0), CUDA_ERROR_INVALID_VALUE);
    EQ(base % BLOCK, 0);
    EQ(readable(base), 0);
    EQ(CALL(cuMemCreate)(&handle, 4096, &prop, 0), CUDA_ERROR_INVALID_VALUE);
    OK(CALL(cuMemCreate)(&handle, BLOCK, &prop, 0));
    EQ(CALL(cuMemMap)(base, BLOCK, 4096, handle, 0), CUDA_ERROR_NOT_SUPPORTED);
    EQ(CALL(cuMemMap)(base, 2 * BLOCK, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
    OK(CALL(cuMemMap)(base, BLOCK, 0, handle, 0));
    EQ(CALL(cuMemMap)(base, BLOCK, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
    EQ(readable(base), 0);
    allow(base, BLOCK, 0, CU_MEM_ACCESS_READWRITE);
    EQ(readable(base), getenv("FAKECUDA_HOST_UNREADABLE") ? 0 : 1);
    EQ(peek_byte(base), 0);
    EQ(CALL(fakecuda_poke)((void *)(uintptr_t)(base + 5), "x", 1), 0);
    EQ(peek_byte(base + 5), 'x');
    CALL(fakecuda_set_host_unreadable)(1);
    EQ(readable(base), 0);
    CALL(fakecuda_set_host_unreadable)(0);
    EQ(readable(base), 1);
    CALL(fakecuda_set_host_unreadable)(getenv("FAKECUDA_HOST_UNREADABLE") != NULL);

    /* A mapping keeps released memory; a handle can be had back from it. */
    OK(CALL(cuMemRelease)(handle));
    EQ(CALL(cuMemRelease)(handle), CUDA_ERROR_INVALID_VALUE);
    EQ(CALL(fakecuda_live_handles)(0), 1);
    OK(CALL(cuMemRetainAllocationHandle)(&again, (void *)(uintptr_t)(base + 100)));
    CUmemAllocationProp back_again;
    OK(CALL(cuMemGetAllocationPropertiesFromHandle)(&back_again, again));
    EQ(back_again.location.id, 0);
    OK(CALL(cuMemUnmap)(base, BLOCK));
    EQ(CALL(fakecuda_live_handles)(0), 1);
    EQ(readable(base), 0);
    OK(CALL(cuMemMap)(base + BLOCK, BLOCK, 0, again, 0));
    EQ(peek_byte(base + BLOCK + 5), 'x');
    OK(CALL(cuMemUnmap)(base + BLOCK, BLOCK));
    OK(CALL(cuMemRelease)(again));
    EQ(CALL(fakecuda_live_handles)(0), 0);
    EQ(CALL(cuMemRelease)(again), CUDA_ERROR_INVALID_VALUE);

    /* Several mappings: access and unmap over the row, never over a part or a gap. */
    back(base, BLOCK, 0);
    back(base + BLOCK, 2 * BLOCK, 0);
    CUmemAccessDesc access = {.location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}, .flags = CU_MEM_ACCESS_READ};
    OK(CALL(cuMemSetAccess)(base, 3 * BLOCK, &access, 1));
    EQ(CALL(cuMemSetAccess)(base, 2 * BLOCK, &access, 1), CUDA_ERROR_INVALID_VALUE);
    EQ(CALL(cuMemSetAccess)(base, 4 * BLOCK, &access, 1), CUDA_ERROR_INVALID_VALUE);
    unsigned long long flags = 0;
    CUmemLocation location = {CU_MEM_LOCATION_TYPE_DEVICE, 0};
    OK(CALL(cuMemGetAccess)(&flags, &location, base + BLOCK));
    EQ(flags, CU_MEM_ACCESS_READ);
    EQ(CALL(cuMemAddressFree)(base, 8 * BLOCK), CUDA_ERROR_INVALID_VALUE);
    EQ(CALL(cuMemUnmap)(base + BLOCK, BLOCK), CUDA_ERROR_INVALID_VALUE);
    EQ(CALL(cuMemUnmap)(base, 4 * BLOCK), CUDA_ERROR_INVALID_VALUE);
    EQ(CALL(fakecuda_mapped_bytes)(0), 3 * BLOCK);
    OK(CALL(cuMemUnmap)(base, 3 * BLOCK));
    EQ(CALL(cuMemUnmap)(base, BLOCK), CUDA_ERROR_INVALID_VALUE);
    EQ(CALL(cuMemAddressFree)(base, BLOCK), CUDA_ERROR_INVALID_VALUE);

    /* Capacity, ours and another process's. */
    CALL(fakecuda_set_memory)(0, 4 * BLOCK);
    EQ(CALL(cuMemCreate)(&handle, 5 * BLOCK, &prop, 0), CUDA_ERROR_OUT_OF_MEMORY);
    OK(CALL(cuMemCreate)(&handle, 3 * BLOCK, &prop, 0));
    CALL(fakecuda_set_external_use)(0, BLOCK);
    OK(CALL(cuMemGetInfo_v2)(&available, &total));
    EQ(available, 0);
    EQ(total, 4 * BLOCK);
    EQ(CALL(cuMemCreate)(&again, BLOCK, &prop, 0), CUDA_ERROR_OUT_OF_MEMORY);
    CALL(fakecuda_set_external_use)(0, 0);
    OK(CALL(cuMemRelease)(handle));
    OK(CALL(cuMemAddressFree)(base, 8 * BLOCK));

    /* Reserving at a hint. */
    CUdeviceptr there = reserve(BLOCK);
    OK(CALL(cuMemAddressFree)(there, BLOCK));
    OK(CALL(cuMemAddressReserve)(&bad, BLOCK, 0, there, 0));
    EQ(bad, there);
    OK(CALL(cuMemAddressFree)(bad, BLOCK));

    /* Export and import within the process are the same memory. */
    CALL(fakecuda_set_memory)(0, (uint64_t)1 << 30);
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    int fd = -1;
    OK(CALL(cuMemCreate)(&handle, BLOCK, &prop, 0));
    OK(CALL(cuMemExportToShareableHandle)(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    OK(CALL(cuMemImportFromShareableHandle)(&again, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    EQ(CALL(fakecuda_live_handles)(0), 1);
    OK(CALL(cuMemRelease)(handle));
    EQ(CALL(fakecuda_live_handles)(0), 1);
    OK(CALL(cuMemRelease)(again));
    close(fd);
    EQ(CALL(cuMemImportFromShareableHandle)(&again, (void *)(intptr_t)0, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR), CUDA_ERROR_INVALID_VALUE);
    prop.requestedHandleTypes = 0;
    OK(CALL(cuMemCreate)(&handle, BLOCK, &prop, 0));
    EQ(CALL(cuMemExportToShareableHandle)(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0), CUDA_ERROR_INVALID_VALUE);
    OK(CALL(cuMemRelease)(handle));
    nothing_left(0);
}

static void test_plain(void) {
    start(0);
    CUdeviceptr address = 0, start_address = 0;
    OK(CALL(cuMemAlloc_v2)(&address, 1000));
    OK(CALL(cuMemsetD8_v2)(address, 7, 1000));
    OK(CALL(cuCtxSynchronize)());
    EQ(peek_byte(address + 999), 7);
    unsigned type = 0;
    int ordinal = -1;
    size_t size = 0;
    OK(CALL(cuPointerGetAttribute)(&type, 2, address));
    EQ(type, CU_MEMORYTYPE_DEVICE);
    OK(CALL(cuPointerGetAttribute)(&start_address, 11, address + 5));
    EQ(start_address, address);
    EQ(CALL(cuMemUnmap)(address, BLOCK), CUDA_ERROR_INVALID_VALUE);
    char local;
    EQ(CALL(cuPointerGetAttribute)(&type, 2, (uintptr_t)&local), CUDA_ERROR_INVALID_VALUE);
    int attributes[] = {2, 9, 12};
    void *data[] = {&type, &ordinal, &size};
    OK(CALL(cuPointerGetAttributes)(3, attributes, data, (uintptr_t)&local));
    EQ(type, 0);
    EQ(ordinal, -2);
    OK(CALL(cuMemFree_v2)(address));
    EQ(CALL(cuMemFree_v2)(address), CUDA_ERROR_INVALID_VALUE);

    CUdeviceptr base = reserve(2 * BLOCK);
    back(base, BLOCK, 0);
    OK(CALL(cuPointerGetAttributes)(3, attributes, data, base));
    EQ(type, CU_MEMORYTYPE_DEVICE);
    EQ(ordinal, 0);
    EQ(size, 2 * BLOCK);
    unsigned mapped = 9, ipc = 9;
    OK(CALL(cuPointerGetAttribute)(&mapped, 13, base + BLOCK));
    EQ(mapped, 0);
    OK(CALL(cuPointerGetAttribute)(&ipc, 10, base));
    EQ(ipc, 0);
    OK(CALL(cuMemUnmap)(base, BLOCK));
    OK(CALL(cuMemAddressFree)(base, 2 * BLOCK));
    nothing_left(0);
}

static void test_host_memory(void) {
    start(0);
    char *buffer = host_buffer(4 * BLOCK);
    unsigned flags = 9;
    CUdeviceptr device = 0;
    OK(CALL(cuMemHostRegister_v2)(buffer, BLOCK, CU_MEMHOST_PORTABLE));
    EQ(CALL(cuMemHostRegister_v2)(buffer + 4096, BLOCK, 0), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    OK(CALL(cuMemHostGetFlags)(&flags, buffer + BLOCK - 1));
    EQ(flags, CU_MEMHOST_PORTABLE);
    EQ(CALL(cuMemHostGetFlags)(&flags, buffer + BLOCK), CUDA_ERROR_INVALID_VALUE);
    OK(CALL(cuMemHostGetDevicePointer_v2)(&device, buffer + 7, 0));
    EQ(device, (uintptr_t)buffer + 7);

    CUdeviceptr memory = allocate(4 * BLOCK, 0);
    EQ(CALL(cuMemcpyHtoD_v2)(memory, buffer, BLOCK + 1), CUDA_ERROR_INVALID_VALUE);
    OK(CALL(cuMemHostRegister_v2)(buffer + BLOCK, BLOCK, 0));
    EQ(CALL(fakecuda_registered_bytes)(), 2 * BLOCK);
    EQ(CALL(cuMemcpyHtoD_v2)(memory, buffer + BLOCK - 1, 2), CUDA_ERROR_INVALID_VALUE);
    OK(CALL(cuMemcpyHtoD_v2)(memory, buffer + 2 * BLOCK, BLOCK));
    OK(CALL(cuMemHostUnregister)(buffer));
    EQ(CALL(cuMemHostGetFlags)(&flags, buffer), CUDA_ERROR_INVALID_VALUE);
    EQ(CALL(cuMemHostUnregister)(buffer), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    OK(CALL(cuMemHostUnregister)(buffer + BLOCK));
    munmap(buffer, 4 * BLOCK);
    EQ(CALL(cuMemHostRegister_v2)(buffer, BLOCK, 0), CUDA_ERROR_INVALID_VALUE);

    void *pinned = NULL;
    OK(CALL(cuMemAllocHost_v2)(&pinned, 1000));
    memset(pinned, 3, 1000);
    OK(CALL(cuMemcpyHtoD_v2)(memory, pinned, 1000));
    EQ(peek_byte(memory + 999), 3);
    EQ(CALL(cuMemHostUnregister)(pinned), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    OK(CALL(cuMemFreeHost)(pinned));
    EQ(CALL(cuMemFreeHost)(pinned), CUDA_ERROR_INVALID_VALUE);
    release(memory, 4 * BLOCK);
    nothing_left(0);
}

static void *unregister(void *buffer) {
    CUcontext context;
    OK(CALL(cuDevicePrimaryCtxRetain)(&context, 0));
    OK(CALL(cuCtxSetCurrent)(context));
    OK(CALL(cuMemHostUnregister)(buffer));
    OK(CALL(cuDevicePrimaryCtxRelease_v2)(0));
    return NULL;
}

static void test_copies(void) {
    start(0);
    size_t size = 6 * BLOCK;
    CUdeviceptr base = reserve(size), other = allocate(size, 0);
    back(base, BLOCK, 0);
    back(base + BLOCK, 2 * BLOCK, 0);
    back(base + 3 * BLOCK, 3 * BLOCK, 0);
    char *pinned = host_buffer(size), *pageable = host_buffer(size);
    OK(CALL(cuMemHostRegister_v2)(pinned, size, 0));
    CUstream stream = new_stream(), second = new_stream();
    for (size_t i = 0; i < size; i++) {
        pageable[i] = (char)(i * 31 + i / 4099);
    }

    /* Through every kind of memory and across mappings. */
    OK(CALL(cuMemcpyHtoDAsync_v2)(base, pageable, size, stream));
    OK(CALL(cuMemcpyDtoDAsync_v2)(other, base, size, stream));
    OK(CALL(cuMemcpyDtoHAsync_v2)(pinned, other, size, stream));
    OK(CALL(cuStreamSynchronize)(stream));
    EQ(memcmp(pinned, pageable, size), 0);
    memset(pageable, 0, size);
    OK(CALL(cuMemcpyAsync)((uintptr_t)pageable, base, size, stream)); /* pageable: complete on return */
    EQ(memcmp(pinned, pageable, size), 0);

    /* Registered memory is read when the copy runs, pageable memory before the call returns. */
    CALL(fakecuda_hold_streams)(1);
    pinned[0] = pageable[0] = 1;
    OK(CALL(cuMemcpyHtoDAsync_v2)(base, pinned, 1, stream));
    OK(CALL(cuMemcpyHtoDAsync_v2)(other, pageable, 1, stream));
    pinned[0] = pageable[0] = 2;
    EQ(CALL(cuStreamQuery)(stream), CUDA_ERROR_NOT_READY);
    EQ(CALL(fakecuda_pending_work)(), 2);
    CALL(fakecuda_hold_streams)(0);
    OK(CALL(cuStreamSynchronize)(stream));
    OK(CALL(cuStreamQuery)(stream));
    EQ(peek_byte(base), 2);
    EQ(peek_byte(other), 1);

    /* Unregistering waits for the copies that use the memory. */
    char *brief = host_buffer(BLOCK);
    OK(CALL(cuMemHostRegister_v2)(brief, BLOCK, 0));
    CALL(fakecuda_hold_streams)(1);
    OK(CALL(cuMemcpyHtoDAsync_v2)(base, brief, BLOCK, stream));
    pthread_t thread;
    pthread_create(&thread, NULL, unregister, brief);
    usleep(20000);
    EQ(CALL(fakecuda_pending_work)(), 1);
    CALL(fakecuda_hold_streams)(0);
    pthread_join(thread, NULL);
    EQ(CALL(fakecuda_pending_work)(), 0);
    munmap(brief, BLOCK);

    /* Fills, and order between streams by an event, many times over. */
    CUevent event = new_event();
    for (unsigned round = 1; round <= 50; round++) {
        OK(CALL(cuMemsetD8Async)(base, (unsigned char)round, BLOCK, stream));
        OK(CALL(cuEventRecord)(event, stream));
        OK(CALL(cuStreamWaitEvent)(second, event, 0));
        OK(CALL(cuMemcpyDtoDAsync_v2)(other, base, BLOCK, second));
        OK(CALL(cuEventRecord)(event, second));
        OK(CALL(cuStreamWaitEvent)(stream, event, 0));
        if (round % 10 == 0) {
            OK(CALL(cuEventSynchronize)(event));
            OK(CALL(cuEventQuery)(event));
            EQ(peek_byte(other + BLOCK - 1), round);
        }
    }
    OK(CALL(cuMemsetD32Async)(base + 4, 0x01020304, 2, stream));
    EQ(CALL(cuMemsetD32Async)(base + 2, 0, 2, stream), CUDA_ERROR_INVALID_VALUE);
    OK(CALL(cuCtxSynchronize)());
    EQ(peek_byte(base + 4), 4);
    EQ(peek_byte(base + 11), 1);
    EQ(peek_byte(base + 12), 50);

    /* A batch. */
    CUdeviceptr dsts[4], srcs[4];
    size_t sizes[4], starts[2] = {0, 2}, failed = 0;
    CUmemcpyAttributes kinds[2] = {{.srcAccessOrder = CU_SRC_ORDER_STREAM}, {.srcAccessOrder = CU_SRC_ORDER_DURING_API_CALL}};
    for (int i = 0; i < 4; i++) {
        dsts[i] = other + (size_t)i * 1000;
        srcs[i] = (uintptr_t)pinned + (size_t)i * 1000;
        sizes[i] = 1000;
    }
    memset(pinned, 11, 4000);
    CALL(fakecuda_hold_streams)(1);
    OK(CALL(cuMemcpyBatchAsync)(dsts, srcs, sizes, 4, kinds, starts, 2, &failed, stream));
    memset(pinned, 12, 4000);
    CALL(fakecuda_hold_streams)(0);
    OK(CALL(cuStreamSynchronize)(stream));
    EQ(peek_byte(other + 1999), 12);
    EQ(peek_byte(other + 2000), 11);
    EQ(peek_byte(other + 3999), 11);
    EQ(CALL(cuMemcpyBatchAsync)(dsts, srcs, sizes, 4, kinds, starts, 2, &failed, NULL), CUDA_ERROR_INVALID_VALUE);
    starts[1] = 4;
    EQ(CALL(cuMemcpyBatchAsync)(dsts, srcs, sizes, 4, kinds, starts, 2, &failed, stream), CUDA_ERROR_INVALID_VALUE);

    /* Time. */
    CUevent begin, end;
    float elapsed = -1;
    OK(CALL(cuEventCreate)(&begin, 0));
    OK(CALL(cuEventCreate)(&end, 0));
    EQ(CALL(cuEventElapsedTime)(&elapsed, begin, end), CUDA_ERROR_INVALID_HANDLE);
    OK(CALL(cuEventRecord)(begin, stream));
    OK(CALL(cuMemcpyDtoDAsync_v2)(other, base, size, stream));
    OK(CALL(cuEventRecord)(end, stream));
    OK(CALL(cuEventSynchronize)(end));
    OK(CALL(cuEventElapsedTime)(&elapsed, begin, end));
    EQ(elapsed >= 0, 1);
    OK(CALL(cuEventDestroy_v2)(begin));
    OK(CALL(cuEventDestroy_v2)(end));

    OK(CALL(cuEventDestroy_v2)(event));
    EQ(CALL(cuEventQuery)(event), CUDA_ERROR_INVALID_HANDLE);
    OK(CALL(cuStreamDestroy_v2)(stream));
    EQ(CALL(cuStreamSynchronize)(stream), CUDA_ERROR_INVALID_HANDLE);
    OK(CALL(cuStreamDestroy_v2)(second));
    OK(CALL(cuMemHostUnregister)(pinned));
    release(base, size);
    release(other, size);
    munmap(pinned, size);
    munmap(pageable, size);
    nothing_left(0);
}

static _Atomic int order;

static void host_step(void *argument) {
    int wanted = (int)(intptr_t)argument;
    usleep(1000);
    EQ(atomic_fetch_add(&order, 1), wanted);
    int number;
    EQ(CALL(cuDeviceGetCount)(&number), CUDA_ERROR_NOT_PERMITTED);
}

static void test_legacy_stream(void) {
    start(0);
    CUstream blocking = NULL, free_stream = new_stream();
    OK(CALL(cuStreamCreateWithPriority)(&blocking, CU_STREAM_DEFAULT, -1));
    CUcontext context = NULL, of_stream = NULL;
    OK(CALL(cuCtxGetCurrent)(&context));
    OK(CALL(cuStreamGetCtx)(blocking, &of_stream));
    EQ(context == of_stream, 1);
    order = 0;
    OK(CALL(cuLaunchHostFunc)(blocking, host_step, (void *)0));
    OK(CALL(cuLaunchHostFunc)(NULL, host_step, (void *)1));
    OK(CALL(cuLaunchHostFunc)(CU_STREAM_PER_THREAD, host_step, (void *)2));
    OK(CALL(cuLaunchHostFunc)(CU_STREAM_LEGACY, host_step, (void *)3));
    OK(CALL(cuLaunchHostFunc)(blocking, host_step, (void *)4));
    OK(CALL(cuStreamSynchronize)(NULL));
    EQ(order, 5);

    /* A destroyed stream finishes its work; the context waits for it. */
    OK(CALL(cuLaunchHostFunc)(free_stream, host_step, (void *)5));
    OK(CALL(cuStreamDestroy_v2)(free_stream));
    OK(CALL(cuCtxSynchronize)());
    EQ(order, 6);
    OK(CALL(cuStreamDestroy_v2)(blocking));
    OK(CALL(cuDevicePrimaryCtxRelease_v2)(0));
    nothing_left(0);
}

/* An illegal access breaks the context for good. */
static void expect_sticky(CUresult synchronised) {
    int number;
    size_t a, b;
    EQ(synchronised, CUDA_ERROR_ILLEGAL_ADDRESS);
    EQ(CALL(cuCtxSynchronize)(), CUDA_ERROR_ILLEGAL_ADDRESS);
    EQ(CALL(cuMemGetInfo_v2)(&a, &b), CUDA_ERROR_ILLEGAL_ADDRESS);
    OK(CALL(cuDeviceGetCount)(&number));
    CALL(fakecuda_reset_faults)();
    OK(CALL(cuCtxSynchronize)());
}

static void test_illegal(void) {
    start(0);
    CUstream stream = new_stream();
    char *pinned = host_buffer(BLOCK);
    OK(CALL(cuMemHostRegister_v2)(pinned, BLOCK, 0));
    CUdeviceptr base = reserve(2 * BLOCK);
    back(base, BLOCK, 0);

    OK(CALL(cuMemcpyDtoHAsync_v2)(pinned, base + BLOCK, 8, stream)); /* never mapped */
    expect_sticky(CALL(cuStreamSynchronize)(stream));
    OK(CALL(cuMemsetD8Async)(base + BLOCK - 4, 1, 8, stream)); /* runs off the mapping */
    expect_sticky(CALL(cuStreamSynchronize)(stream));

    /* Unmapped while queued. */
    CALL(fakecuda_hold_streams)(1);
    OK(CALL(cuMemcpyDtoHAsync_v2)(pinned, base, BLOCK, stream));
    OK(CALL(cuMemUnmap)(base, BLOCK));
    CALL(fakecuda_hold_streams)(0);
    expect_sticky(CALL(cuStreamSynchronize)(stream));
    EQ(CALL(fakecuda_live_handles)(0), 0);

    /* A read-only range, and one without any access. */
    back(base, BLOCK, 0);
    allow(base, BLOCK, 0, CU_MEM_ACCESS_READ);
    OK(CALL(cuMemcpyDtoHAsync_v2)(pinned, base, 8, stream));
    OK(CALL(cuStreamSynchronize)(stream));
    OK(CALL(cuMemcpyHtoDAsync_v2)(base, pinned, 8, stream));
    expect_sticky(CALL(cuStreamSynchronize)(stream));

    /* An address that was given back. */
    OK(CALL(cuMemUnmap)(base, BLOCK));
    OK(CALL(cuMemAddressFree)(base, 2 * BLOCK));
    OK(CALL(cuMemcpyAsync)((uintptr_t)pinned, base, 8, stream));
    expect_sticky(CALL(cuStreamSynchronize)(stream));

    /* A copy from the host into a device range must begin inside the range. */
    base = allocate(BLOCK, 0);
    EQ(CALL(cuMemcpyDtoHAsync_v2)(pinned, base - 4, 8, stream), CUDA_ERROR_INVALID_VALUE);
    release(base, BLOCK);
    OK(CALL(cuStreamDestroy_v2)(stream));
    OK(CALL(cuMemHostUnregister)(pinned));
    nothing_left(0);
}

static int peer_copy(CUdeviceptr dst, CUdeviceptr src, CUstream stream) {
    int rc = CALL(cuMemcpyDtoDAsync_v2)(dst, src, 64, stream);
    return rc ? rc : CALL(cuStreamSynchronize)(stream);
}

static void test_peers(void) {
    CUcontext second = start(1), first = start(0);
    int can = 0;
    OK(CALL(cuDeviceCanAccessPeer)(&can, 0, 1));
    EQ(can, 1);
    CUdeviceptr here = allocate(BLOCK, 0), there = allocate(BLOCK, 1);
    EQ(CALL(fakecuda_live_handles)(1), 1);
    OK(CALL(cuCtxPushCurrent_v2)(second));
    CUstream stream = new_stream();
    EQ(peer_copy(there, here, stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    CALL(fakecuda_reset_faults)();
    allow(here, BLOCK, 1, CU_MEM_ACCESS_READ);
    OK(peer_copy(there, here, stream));
    EQ(peer_copy(here, there, stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    CALL(fakecuda_reset_faults)();
    OK(CALL(cuMemcpyPeerAsync)(here, first, there, second, 64, stream));
    OK(CALL(cuStreamSynchronize)(stream));

    /* Plain memory follows cuCtxEnablePeerAccess instead. */
    CUdeviceptr plain = 0;
    OK(CALL(cuCtxPushCurrent_v2)(first));
    OK(CALL(cuMemAlloc_v2)(&plain, 100));
    OK(CALL(cuCtxPopCurrent_v2)(NULL));
    EQ(peer_copy(there, plain, stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    CALL(fakecuda_reset_faults)();
    OK(CALL(cuCtxEnablePeerAccess)(first, 0));
    EQ(CALL(cuCtxEnablePeerAccess)(first, 0), CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
    OK(peer_copy(there, plain, stream));

    /* An event of one device orders another. */
    OK(CALL(cuCtxPushCurrent_v2)(first));
    CUstream on_first = new_stream();
    CUevent event = new_event();
    OK(CALL(cuMemsetD8Async)(here, 9, BLOCK, on_first));
    EQ(CALL(cuEventRecord)(event, stream), CUDA_ERROR_INVALID_HANDLE);
    OK(CALL(cuEventRecord)(event, on_first));
    OK(CALL(cuCtxPopCurrent_v2)(NULL));
    OK(CALL(cuStreamWaitEvent)(stream, event, 0));
    OK(peer_copy(there, here, stream));
    EQ(peek_byte(there + 63), 9);
    OK(CALL(cuEventDestroy_v2)(event));
    OK(CALL(cuStreamDestroy_v2)(on_first));
    OK(CALL(cuStreamDestroy_v2)(stream));
    OK(CALL(cuCtxPopCurrent_v2)(NULL));
    OK(CALL(cuMemFree_v2)(plain));
    release(here, BLOCK);
    release(there, BLOCK);
    nothing_left(0);
    nothing_left(1);
}

/* ---- Capture ---- */

static CUevent outside_event;

static int in_thread_result;
static int in_thread_mode;

static void *query_event(void *context) {
    int mode = in_thread_mode;
    OK(CALL(cuCtxPushCurrent_v2)((CUcontext)context));
    OK(CALL(cuThreadExchangeStreamCaptureMode)(&mode));
    EQ(mode, CU_CAPTURE_MODE_GLOBAL);
    in_thread_result = CALL(cuEventQuery)(outside_event);
    return NULL;
}

/* What an event query on another thread, in the given mode, returns. */
static int query_elsewhere(int mode) {
    CUcontext context;
    pthread_t thread;
    OK(CALL(cuCtxGetCurrent)(&context));
    in_thread_mode = mode;
    pthread_create(&thread, NULL, query_event, context);
    pthread_join(thread, NULL);
    return in_thread_result;
}

static int capture_status(CUstream stream) {
    int status = -1;
    OK(CALL(cuStreamIsCapturing)(stream, &status));
    return status;
}

static void test_capture(void) {
    CUcontext context = start(0);
    (void)context;
    CUstream stream = new_stream(), side = new_stream(), blocking = NULL;
    OK(CALL(cuStreamCreate)(&blocking, CU_STREAM_DEFAULT));
    outside_event = new_event();
    OK(CALL(cuEventRecord)(outside_event, side));
    OK(CALL(cuEventSynchronize)(outside_event));
    CUgraph graph = NULL;
    CUgraphExec exec = NULL;
    size_t a, b;

    /* An unsafe call: on this thread, on another one, by mode. */
    for (int mode = CU_CAPTURE_MODE_GLOBAL; mode <= CU_CAPTURE_MODE_RELAXED; mode++) {
        OK(CALL(cuStreamBeginCapture_v2)(stream, mode));
        OK(CALL(cuMemGetInfo_v2)(&a, &b));
        EQ(query_elsewhere(CU_CAPTURE_MODE_RELAXED), 0);
        EQ(query_elsewhere(CU_CAPTURE_MODE_THREAD_LOCAL), 0);
        EQ(capture_status(stream), CU_CAPTURE_STATUS_ACTIVE);
        bool breaks = mode == CU_CAPTURE_MODE_GLOBAL;
        EQ(query_elsewhere(CU_CAPTURE_MODE_GLOBAL), breaks ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : 0);
        EQ(capture_status(stream), breaks ? CU_CAPTURE_STATUS_INVALIDATED : CU_CAPTURE_STATUS_ACTIVE);
        EQ(CALL(cuStreamEndCapture)(stream, &graph), breaks ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : 0);
        EQ(graph == NULL, breaks);
        if (graph) {
            OK(CALL(cuGraphDestroy)(graph));
        }

        OK(CALL(cuStreamBeginCapture_v2)(stream, mode));
        breaks = mode != CU_CAPTURE_MODE_RELAXED;
        EQ(CALL(cuEventQuery)(outside_event), breaks ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : 0);
        EQ(CALL(cuStreamEndCapture)(stream, &graph), breaks ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : 0);
        if (graph) {
            OK(CALL(cuGraphDestroy)(graph));
        }
    }
    EQ(capture_status(stream), CU_CAPTURE_STATUS_NONE);

    /* With the mode exchanged, this thread may do what it likes; and mapping is always allowed. */
    int mode = CU_CAPTURE_MODE_RELAXED;
    OK(CALL(cuThreadExchangeStreamCaptureMode)(&mode));
    OK(CALL(cuStreamBeginCapture_v2)(stream, CU_CAPTURE_MODE_GLOBAL));
    OK(CALL(cuEventQuery)(outside_event));
    OK(CALL(cuThreadExchangeStreamCaptureMode)(&mode));
    CUdeviceptr memory = allocate(BLOCK, 0), other = allocate(BLOCK, 0);
    EQ(CALL(cuStreamQuery)(stream), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    EQ(CALL(cuMemsetD8Async)(memory, 1, 1, stream), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    EQ(CALL(cuStreamEndCapture)(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);

    OK(CALL(cuStreamBeginCapture_v2)(stream, CU_CAPTURE_MODE_RELAXED));
    EQ(CALL(cuCtxSynchronize)(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    EQ(CALL(cuStreamEndCapture)(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    OK(CALL(cuCtxSynchronize)());
    EQ(CALL(cuStreamEndCapture)(stream, &graph), CUDA_ERROR_ILLEGAL_STATE);

    /* The legacy stream beside a blocking stream that captures, and beside one that does not block. */
    OK(CALL(cuStreamBeginCapture_v2)(blocking, CU_CAPTURE_MODE_RELAXED));
    int status;
    EQ(CALL(cuStreamIsCapturing)(NULL, &status), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    EQ(capture_status(blocking), CU_CAPTURE_STATUS_ACTIVE);
    EQ(CALL(cuMemsetD8Async)(memory, 1, 1, NULL), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    EQ(CALL(cuStreamEndCapture)(blocking, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    OK(CALL(cuStreamBeginCapture_v2)(stream, CU_CAPTURE_MODE_RELAXED));
    OK(CALL(cuMemsetD8Async)(memory, 1, 1, NULL));
    OK(CALL(cuStreamEndCapture)(stream, &graph));
    OK(CALL(cuGraphDestroy)(graph));
    OK(CALL(cuCtxSynchronize)()); /* a stream that does not block does not wait for the legacy one */

    /* A fork that is joined, replayed after the memory was replaced under the same address. */
    CUevent fork_event = new_event(), join_event = new_event();
    OK(CALL(cuStreamBeginCapture_v2)(stream, CU_CAPTURE_MODE_THREAD_LOCAL));
    OK(CALL(cuMemsetD8Async)(memory, 42, 100, stream));
    OK(CALL(cuEventRecord)(fork_event, stream));
    OK(CALL(cuStreamWaitEvent)(side, fork_event, 0));
    EQ(capture_status(side), CU_CAPTURE_STATUS_ACTIVE);
    OK(CALL(cuMemcpyDtoDAsync_v2)(other, memory, 100, side));
    OK(CALL(cuEventRecord)(join_event, side));
    OK(CALL(cuStreamWaitEvent)(stream, join_event, 0));
    OK(CALL(cuMemsetD8Async)(memory, 43, 50, stream));
    OK(CALL(cuStreamEndCapture)(stream, &graph));
    EQ(CALL(cuEventQuery)(fork_event), CUDA_ERROR_CAPTURED_EVENT);
    OK(CALL(cuGraphInstantiateWithFlags)(&exec, graph, 0));
    OK(CALL(cuGraphDestroy)(graph));
    EQ(peek_byte(memory + 99), 0);
    OK(CALL(cuGraphLaunch)(exec, stream));
    OK(CALL(cuStreamSynchronize)(stream));
    EQ(peek_byte(other + 99), 42);
    EQ(peek_byte(memory), 43);
    OK(CALL(cuMemUnmap)(memory, BLOCK));
    OK(CALL(cuMemUnmap)(other, BLOCK));
    back(memory, BLOCK, 0);
    back(other, BLOCK, 0);
    EQ(peek_byte(other + 99), 0);
    OK(CALL(cuGraphLaunch)(exec, side));
    OK(CALL(cuStreamSynchronize)(side));
    EQ(peek_byte(other + 99), 42);
    OK(CALL(cuMemUnmap)(other, BLOCK));
    OK(CALL(cuGraphLaunch)(exec, stream));
    EQ(CALL(cuStreamSynchronize)(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    CALL(fakecuda_reset_faults)();
    OK(CALL(cuGraphExecDestroy)(exec));

    /* A fork that is not joined, a wait for work outside, and captures that would merge. */
    OK(CALL(cuStreamBeginCapture_v2)(stream, CU_CAPTURE_MODE_RELAXED));
    OK(CALL(cuEventRecord)(fork_event, stream));
    OK(CALL(cuStreamWaitEvent)(side, fork_event, 0));
    OK(CALL(cuMemsetD8Async)(memory, 1, 1, side));
    EQ(CALL(cuStreamEndCapture)(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    EQ(capture_status(side), CU_CAPTURE_STATUS_NONE);
    OK(CALL(cuStreamBeginCapture_v2)(stream, CU_CAPTURE_MODE_RELAXED));
    EQ(CALL(cuStreamWaitEvent)(stream, outside_event, 0), CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    EQ(CALL(cuStreamEndCapture)(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    OK(CALL(cuStreamBeginCapture_v2)(stream, CU_CAPTURE_MODE_RELAXED));
    OK(CALL(cuStreamBeginCapture_v2)(side, CU_CAPTURE_MODE_RELAXED));
    OK(CALL(cuEventRecord)(fork_event, stream));
    EQ(CALL(cuStreamWaitEvent)(side, fork_event, 0), CUDA_ERROR_STREAM_CAPTURE_MERGE);
    EQ(CALL(cuStreamEndCapture)(stream, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    EQ(CALL(cuStreamEndCapture)(side, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);

    OK(CALL(cuEventDestroy_v2)(fork_event));
    OK(CALL(cuEventDestroy_v2)(join_event));
    OK(CALL(cuEventDestroy_v2)(outside_event));
    OK(CALL(cuStreamDestroy_v2)(stream));
    OK(CALL(cuStreamDestroy_v2)(side));
    OK(CALL(cuStreamDestroy_v2)(blocking));
    release(memory, BLOCK);
    OK(CALL(cuMemAddressFree)(other, BLOCK));
    nothing_left(0);
}

/* ---- Kernels ---- */

static const char PTX[] = "// a comment with .entry ghost(\n"
                          ".version 8.0\n"
                          ".target sm_70\n"
                          ".address_size 64\n"
                          ".visible .entry fakecuda_fill(\n"
                          "\t.param .u64 .ptr .global .align 1 fill_0,\n"
                          "\t.param .u32 fill_1,\n"
                          "\t.param .u64 fill_2\n"
                          ")\n{ ret; }\n"
                          ".visible .entry sum_pair(.param .align 4 .b8 sum_0[12], .param .u64 sum_1)\n{ ret; }\n"
                          ".visible .entry unknown()\n{ ret; }\n";

/* sum_pair({u32 a, b, c}, u64 out): writes a + b + c. */
static void sum_pair(const struct fakecuda_launch *launch) {
    uint32_t values[3], sum;
    uint64_t out;
    EQ(launch->param_count, 2);
    EQ(launch->param_sizes[0], 12);
    EQ(launch->grid[0], 3);
    EQ(launch->block[1], 2);
    memcpy(values, launch->params[0], sizeof values);
    memcpy(&out, launch->params[1], sizeof out);
    sum = values[0] + values[1] + values[2];
    CALL(fakecuda_kernel_write)(launch, out, &sum, sizeof sum);
}

static void test_kernels(void) {
    start(0);
    CUmodule module = NULL;
    CUfunction fill = NULL, sum = NULL, unknown = NULL;
    EQ(CALL(cuModuleLoadData)(&module, "nonsense"), CUDA_ERROR_INVALID_PTX);
    EQ(CALL(cuModuleLoadData)(&module, ".version 9.9\n.target sm_70\n"), CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
    EQ(CALL(cuModuleLoadData)(&module, ".version 8.0\n.target sm_120\n"), CUDA_ERROR_NO_BINARY_FOR_GPU);
    OK(CALL(cuModuleLoadDataEx)(&module, PTX, 0, NULL, NULL));
    EQ(CALL(cuModuleGetFunction)(&fill, module, "ghost"), CUDA_ERROR_NOT_FOUND);
    EQ(CALL(cuModuleGetFunction)(&fill, module, "fakecuda_fil"), CUDA_ERROR_NOT_FOUND);
    OK(CALL(cuModuleGetFunction)(&fill, module, "fakecuda_fill"));
    OK(CALL(cuModuleGetFunction)(&sum, module, "sum_pair"));
    OK(CALL(cuModuleGetFunction)(&unknown, module, "unknown"));
    int number = 0;
    OK(CALL(cuFuncGetAttribute)(&number, 0, fill));
    EQ(number, 1024);
    OK(CALL(cuOccupancyMaxActiveBlocksPerMultiprocessor)(&number, fill, 256, 0));
    EQ(number, 8);

    CUdeviceptr memory = reserve(2 * BLOCK);
    back(memory, BLOCK, 0);
    CUstream stream = new_stream();
    uint64_t address = memory + 1, count = 5000;
    uint32_t value = 77;
    void *params[] = {&address, &value, &count};
    OK(CALL(cuLaunchKernel)(fill, 1, 1, 1, 32, 1, 1, 0, stream, params, NULL));
    value = 78; /* the arguments were taken */
    OK(CALL(cuStreamSynchronize)(stream));
    EQ(peek_byte(memory), 0);
    EQ(peek_byte(memory + 5000), 77);
    EQ(peek_byte(memory + 5001), 0);
    EQ(CALL(cuLaunchKernel)(fill, 1, 1, 1, 2000, 1, 1, 0, stream, params, NULL), CUDA_ERROR_INVALID_VALUE);
    EQ(CALL(cuLaunchKernel)(unknown, 1, 1, 1, 1, 1, 1, 0, stream, NULL, NULL), CUDA_ERROR_NOT_FOUND);
    EQ(CALL(cuLaunchKernel)(sum, 1, 1, 1, 1, 1, 1, 0, stream, NULL, NULL), CUDA_ERROR_NOT_FOUND);

    /* Another model, its arguments in a buffer; captured and replayed. */
    CALL(fakecuda_register_kernel)("sum_pair", sum_pair);
    struct {
        uint32_t values[3];
        uint32_t gap;
        uint64_t out;
    } arguments = {{1, 2, 300}, 0, memory + 8};
    size_t size = sizeof arguments;
    void *extra[] = {(void *)CU_LAUNCH_PARAM_BUFFER_POINTER, &arguments, (void *)CU_LAUNCH_PARAM_BUFFER_SIZE, &size,
                     (void *)CU_LAUNCH_PARAM_END};
    CUgraph graph = NULL;
    CUgraphExec exec = NULL;
    OK(CALL(cuStreamBeginCapture_v2)(stream, CU_CAPTURE_MODE_GLOBAL));
    OK(CALL(cuLaunchKernel)(sum, 3, 1, 1, 1, 2, 1, 0, stream, NULL, extra));
    OK(CALL(cuStreamEndCapture)(stream, &graph));
    OK(CALL(cuGraphInstantiateWithFlags)(&exec, graph, 0));
    EQ(peek_byte(memory + 8), 77);
    OK(CALL(cuGraphLaunch)(exec, stream));
    OK(CALL(cuStreamSynchronize)(stream));
    EQ(peek_byte(memory + 8), 303 & 255);
    EQ(peek_byte(memory + 9), 303 >> 8);
    OK(CALL(cuGraphExecDestroy)(exec));
    OK(CALL(cuGraphDestroy)(graph));

    /* Off the end of the memory. */
    count = 2 * BLOCK;
    OK(CALL(cuLaunchKernel)(fill, 1, 1, 1, 32, 1, 1, 0, stream, params, NULL));
    EQ(CALL(cuStreamSynchronize)(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    CALL(fakecuda_reset_faults)();
    OK(CALL(cuModuleUnload)(module));
    EQ(CALL(cuLaunchKernel)(fill, 1, 1, 1, 1, 1, 1, 0, stream, params, NULL), CUDA_ERROR_INVALID_HANDLE);
    EQ(CALL(fakecuda_live_modules)(), 0);
    OK(CALL(cuStreamDestroy_v2)(stream));
    OK(CALL(cuMemUnmap)(memory, BLOCK));
    OK(CALL(cuMemAddressFree)(memory, 2 * BLOCK));
    nothing_left(0);
}

/* The kernels of the library under test, whose models are there from the start. */
static void test_models(void) {
    static const char ptx[] = ".version 8.0\n.target sm_80\n"
                              ".visible .entry tms_copy_pieces(.param .u64 list, .param .u32 count)\n{ ret; }\n"
                              ".visible .entry tms_fingerprint(.param .align 8 .b8 key[288], .param .u64 blocks,\n"
                              "    .param .u64 prints, .param .u32 count)\n{ ret; }\n";
    start(0);
    CUmodule module = NULL;
    CUfunction copy = NULL, fingerprint = NULL;
    OK(CALL(cuModuleLoadData)(&module, ptx));
    OK(CALL(cuModuleGetFunction)(&copy, module, "tms_copy_pieces"));
    OK(CALL(cuModuleGetFunction)(&fingerprint, module, "tms_fingerprint"));
    CUdeviceptr memory = allocate(BLOCK, 0);
    CUstream stream = new_stream();
    char *host = host_buffer(2 * MiB);
    OK(CALL(cuMemHostRegister_v2)(host, MiB, CU_MEMHOST_PORTABLE | CU_MEMHOST_DEVICEMAP));

    /* To the device, on it, and back; nothing beside the pieces. */
    struct {
        uint64_t destination, source, bytes;
    } *pieces = (void *)host;
    uint64_t list = (uintptr_t)host;
    uint32_t count = 2;
    void *of_copy[] = {&list, &count};
    memset(host + 4096, 7, 100);
    memset(host + 8192, 9, 3);
    pieces[0].destination = memory + 1;
    pieces[0].source = list + 4096;
    pieces[0].bytes = 100;
    pieces[1].destination = memory + 300;
    pieces[1].source = list + 8192;
    pieces[1].bytes = 3;
    OK(CALL(cuLaunchKernel)(copy, 4, 1, 1, 256, 1, 1, 0, stream, of_copy, NULL));
    OK(CALL(cuStreamSynchronize)(stream));
    EQ(peek_byte(memory), 0);
    EQ(peek_byte(memory + 100), 7);
    EQ(peek_byte(memory + 101), 0);
    EQ(peek_byte(memory + 302), 9);
    EQ(peek_byte(memory + 303), 0);
    pieces[0].destination = list + 12288;
    pieces[0].source = memory + 1;
    pieces[1].destination = memory + 1000;
    pieces[1].source = memory + 300;
    OK(CALL(cuLaunchKernel)(copy, 4, 1, 1, 256, 1, 1, 0, stream, of_copy, NULL));
    OK(CALL(cuStreamSynchronize)(stream));
    EQ(host[12288 + 99], 7);
    EQ(host[12288 + 100], 0);
    EQ(peek_byte(memory + 1002), 9);

    /* With keys of zero and r = 2 and 1: 3 * 5 stands at r^511, behind it the length. */
    struct {
        uint32_t nh[2][16];
        uint64_t powers[2][10];
    } key = {.powers = {{2}, {1}}};
    struct {
        uint64_t address, bytes;
    } *blocks = (void *)host;
    uint64_t *prints = (void *)(host + 4096), of_prints = list + 4096;
    void *of_fingerprint[] = {&key, &list, &of_prints, &count};
    uint32_t words[] = {3, 5};
    OK(CALL(cuMemsetD8Async)(memory, 0, BLOCK, stream));
    OK(CALL(cuStreamSynchronize)(stream));
    OK(CALL(fakecuda_poke)((void *)(uintptr_t)memory, &words[0], 4));
    OK(CALL(fakecuda_poke)((void *)(uintptr_t)(memory + 512), &words[1], 4));
    blocks[0].address = memory;
    blocks[0].bytes = 1000;
    blocks[1].address = memory + 1024;
    blocks[1].bytes = 77;
    prints[4] = 1;
    OK(CALL(cuLaunchKernel)(fingerprint, 2, 1, 1, 256, 1, 1, 0, stream, of_fingerprint, NULL));
    OK(CALL(cuStreamSynchronize)(stream));
    EQ(prints[0], (15 << 511 % 61) + 1000);
    EQ(prints[1], 15 + 1000);
    EQ(prints[2], 77);
    EQ(prints[3], 77);
    EQ(prints[4], 1);

    /* Memory that is not registered, or not aligned, is out of reach. */
    blocks[1].address = memory + 8;
    OK(CALL(cuLaunchKernel)(fingerprint, 2, 1, 1, 256, 1, 1, 0, stream, of_fingerprint, NULL));
    EQ(CALL(cuStreamSynchronize)(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    CALL(fakecuda_reset_faults)();
    pieces[0].destination = memory;
    pieces[0].source = list + MiB;
    pieces[0].bytes = 1;
    count = 1;
    OK(CALL(cuLaunchKernel)(copy, 1, 1, 1, 256, 1, 1, 0, stream, of_copy, NULL));
    EQ(CALL(cuStreamSynchronize)(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    CALL(fakecuda_reset_faults)();
    list += MiB;
    OK(CALL(cuLaunchKernel)(copy, 1, 1, 1, 256, 1, 1, 0, stream, of_copy, NULL));
    EQ(CALL(cuStreamSynchronize)(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    CALL(fakecuda_reset_faults)();

    OK(CALL(cuModuleUnload)(module));
    OK(CALL(cuMemHostUnregister)(host));
    munmap(host, 2 * MiB);
    OK(CALL(cuStreamDestroy_v2)(stream));
    release(memory, BLOCK);
    nothing_left(0);
}

/* ---- Pitched copies ---- */

static void test_pitched(void) {
    start(0);
    CUdeviceptr memory = allocate(BLOCK, 0);
    CUstream stream = new_stream();
    char *host = host_buffer(MiB), *back_again = host_buffer(MiB);
    OK(CALL(cuMemHostRegister_v2)(host, MiB, CU_MEMHOST_PORTABLE));
    for (int i = 0; i < 30; i++) {
        host[i] = (char)(i + 1);
    }
    CUDA_MEMCPY2D up = {.srcMemoryType = CU_MEMORYTYPE_HOST,
                        .srcHost = host,
                        .srcPitch = 10,
                        .srcXInBytes = 1,
                        .dstMemoryType = CU_MEMORYTYPE_DEVICE,
                        .dstDevice = memory,
                        .dstPitch = 100,
                        .dstY = 1,
                        .WidthInBytes = 4,
                        .Height = 3};
    OK(CALL(cuMemcpy2DAsync_v2)(&up, stream));
    OK(CALL(cuStreamSynchronize)(stream));
    EQ(peek_byte(memory + 99), 0);
    EQ(peek_byte(memory + 100), 2);
    EQ(peek_byte(memory + 103), 5);
    EQ(peek_byte(memory + 104), 0);
    EQ(peek_byte(memory + 300), 22);
    EQ(peek_byte(memory + 400), 0);

    /* Into pageable memory it is done when the call returns. */
    CUDA_MEMCPY2D down = {.srcMemoryType = CU_MEMORYTYPE_DEVICE,
                          .srcDevice = memory + 100,
                          .srcPitch = 100,
                          .dstMemoryType = CU_MEMORYTYPE_HOST,
                          .dstHost = back_again,
                          .dstPitch = 5,
                          .WidthInBytes = 4,
                          .Height = 3};
    OK(CALL(cuMemcpy2DAsync_v2)(&down, stream));
    EQ(back_again[0], 2);
    EQ(back_again[4], 0);
    EQ(back_again[10], 22);
    EQ(back_again[13], 25);
    EQ(back_again[14], 0);

    /* Refused as a whole. */
    up.WidthInBytes = 10;
    EQ(CALL(cuMemcpy2DAsync_v2)(&up, stream), CUDA_ERROR_INVALID_VALUE);
    up.WidthInBytes = 4;
    up.srcMemoryType = CU_MEMORYTYPE_DEVICE;
    up.srcDevice = 0x1000;
    EQ(CALL(cuMemcpy2DAsync_v2)(&up, stream), CUDA_ERROR_INVALID_VALUE);
    up.srcMemoryType = CU_MEMORYTYPE_HOST;
    up.srcHost = host + MiB - 13; /* the second row leaves the registration */
    up.dstY = 5;
    EQ(CALL(cuMemcpy2DAsync_v2)(&up, stream), CUDA_ERROR_INVALID_VALUE);
    OK(CALL(cuStreamSynchronize)(stream));
    EQ(peek_byte(memory + 500), 0);
    up.srcHost = host;
    EQ(CALL(cuMemcpy2DAsync_v2)(&up, (CUstream)77), CUDA_ERROR_INVALID_HANDLE);
    up.Height = 0;
    OK(CALL(cuMemcpy2DAsync_v2)(&up, stream));

    OK(CALL(cuMemHostUnregister)(host));
    munmap(host, MiB);
    munmap(back_again, MiB);
    OK(CALL(cuStreamDestroy_v2)(stream));
    release(memory, BLOCK);
    nothing_left(0);
}

/* ---- Faults ---- */

static void test_faults(void) {
    start(0);
    CUmemAllocationProp prop = prop_of(0);
    CUmemHandle handle = 0;
    const char *text;
    CALL(fakecuda_fail)("cuMemCreate", 2, 12345, 2);
    OK(CALL(cuMemCreate)(&handle, BLOCK, &prop, 0));
    OK(CALL(cuMemRelease)(handle));
    EQ(CALL(cuMemCreate)(&handle, BLOCK, &prop, 0), 12345);
    EQ(CALL(cuMemCreate)(&handle, BLOCK, &prop, 0), 12345);
    OK(CALL(cuMemCreate)(&handle, BLOCK, &prop, 0));
    CALL(fakecuda_fail)("cuMemRelease", 1, 0, 1); /* a success without effect */
    OK(CALL(cuMemRelease)(handle));
    EQ(CALL(fakecuda_live_handles)(0), 1);
    OK(CALL(cuMemRelease)(handle));
    EQ(CALL(fakecuda_live_handles)(0), 0);
    CALL(fakecuda_reset_faults)();

    CALL(fakecuda_exclude)("cuGetErrorName, cuGetErrorString");
    CALL(fakecuda_reset_count)();
    CALL(fakecuda_fail_any)(2, 999, -1);
    OK(CALL(cuMemCreate)(&handle, BLOCK, &prop, 0));
    OK(CALL(cuGetErrorName)(1, &text));
    EQ(CALL(cuMemRelease)(handle), 999);
    EQ(CALL(cuCtxSynchronize)(), 999);
    OK(CALL(cuGetErrorName)(1, &text));
    EQ(CALL(fakecuda_count)(), 3);
    EQ(CALL(fakecuda_count_of)("cuGetErrorName"), 2);
    EQ(CALL(fakecuda_count_of)("cuMemCreate"), 1);
    EQ(strcmp(CALL(fakecuda_call_name)(2), "cuMemRelease"), 0);
    EQ(CALL(fakecuda_call_name)(4) == NULL, 1);
    EQ(CALL(fakecuda_call_name)(0) == NULL, 1);
    CALL(fakecuda_reset_faults)();
    OK(CALL(cuMemRelease)(handle));

    /* A poisoned call: no effect, sticky, queued work dropped, host memory untouched. */
    CUdeviceptr memory = allocate(BLOCK, 0);
    CUstream stream = new_stream();
    CUevent event = new_event();
    CALL(fakecuda_hold_streams)(1);
    OK(CALL(cuMemsetD8Async)(memory, 5, 1, stream));
    OK(CALL(cuEventRecord)(event, stream));
    CALL(fakecuda_fail_any_effect)(1, 700);
    EQ(CALL(cuMemUnmap)(memory, BLOCK), 700);
    EQ(CALL(cuMemUnmap)(memory, BLOCK), 700);
    CALL(fakecuda_hold_streams)(0);
    EQ(CALL(cuStreamSynchronize)(stream), 700);
    while (CALL(fakecuda_pending_work)()) {
        usleep(1000);
    }
    int number;
    OK(CALL(cuDeviceGetCount)(&number));
    CALL(fakecuda_reset_faults)();
    OK(CALL(cuEventSynchronize)(event));
    EQ(peek_byte(memory), 0);
    OK(CALL(cuEventDestroy_v2)(event));
    OK(CALL(cuStreamDestroy_v2)(stream));
    release(memory, BLOCK);
    nothing_left(0);
}

/* With FAKECUDA_FAIL=cuMemCreate:2:2,cuMemMap:1:999:2 */
static void test_faults_from_environment(void) {
    start(0);
    CUmemAllocationProp prop = prop_of(0);
    CUmemHandle handle = 0, none;
    CUdeviceptr address = reserve(BLOCK);
    OK(CALL(cuMemCreate)(&handle, BLOCK, &prop, 0));
    EQ(CALL(cuMemCreate)(&none, BLOCK, &prop, 0), CUDA_ERROR_OUT_OF_MEMORY);
    EQ(CALL(cuMemMap)(address, BLOCK, 0, handle, 0), 999);
    EQ(CALL(cuMemMap)(address, BLOCK, 0, handle, 0), 999);
    OK(CALL(cuMemMap)(address, BLOCK, 0, handle, 0));
}

static void test_fork(void) {
    start(0);
    CUstream stream = new_stream();
    CUdeviceptr memory = allocate(BLOCK, 0);
    OK(CALL(cuMemsetD8Async)(memory, 1, BLOCK, stream));
    pid_t child = fork();
    if (child == 0) {
        int number;
        failures = 0;
        EQ(CALL(cuInit)(0), CUDA_ERROR_NOT_INITIALIZED);
        EQ(CALL(cuDeviceGetCount)(&number), CUDA_ERROR_NOT_INITIALIZED);
        EQ(CALL(cuCtxSynchronize)(), CUDA_ERROR_NOT_INITIALIZED);
        EQ(CALL(cuMemUnmap)(memory, BLOCK), CUDA_ERROR_NOT_INITIALIZED);
        EQ(CALL(fakecuda_live_handles)(0), 1);
        _exit(failures ? 1 : 0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    EQ(status, 0);
    OK(CALL(cuStreamSynchronize)(stream));
    OK(CALL(cuStreamDestroy_v2)(stream));
    release(memory, BLOCK);
}

/* ---- Between processes ---- */

static void hex_of(const void *bytes, size_t size, char *out) {
    for (size_t i = 0; i < size; i++) {
        sprintf(out + 2 * i, "%02x", ((const unsigned char *)bytes)[i]);
    }
}

static void test_processes(void) {
    start(0);
    CUmemAllocationProp prop = prop_of(0);
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    CUmemHandle handle = 0;
    int fd = -1;
    OK(CALL(cuMemCreate)(&handle, BLOCK, &prop, 0));
    OK(CALL(cuMemExportToShareableHandle)(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    CUdeviceptr memory = reserve(BLOCK);
    OK(CALL(cuMemMap)(memory, BLOCK, 0, handle, 0));
    OK(CALL(cuMemRelease)(handle));
    allow(memory, BLOCK, 0, CU_MEM_ACCESS_READWRITE);

    CUevent event = NULL, same = NULL;
    CUipcEventHandle address;
    CUstream stream = new_stream();
    EQ(CALL(cuEventCreate)(&event, CU_EVENT_INTERPROCESS), CUDA_ERROR_INVALID_VALUE);
    OK(CALL(cuEventCreate)(&event, CU_EVENT_INTERPROCESS | CU_EVENT_DISABLE_TIMING));
    OK(CALL(cuIpcGetEventHandle)(&address, event));
    EQ(CALL(cuIpcOpenEventHandle)(&same, address), CUDA_ERROR_INVALID_CONTEXT);

    CALL(fakecuda_hold_streams)(1);
    OK(CALL(cuMemsetD8Async)(memory, 66, BLOCK, stream));
    OK(CALL(cuEventRecord)(event, stream));
    EQ(CALL(cuEventQuery)(event), CUDA_ERROR_NOT_READY);

    char hex[2 * sizeof address + 1], number[16];
    hex_of(&address, sizeof address, hex);
    fcntl(fd, F_SETFD, 0);
    snprintf(number, sizeof number, "%d", fd);
    pid_t child = fork();
    if (child == 0) {
        execl(self_path, self_path, library_path, "child", number, hex, (char *)NULL);
        _exit(127);
    }
    usleep(100000);
    CALL(fakecuda_hold_streams)(0);
    int status = -1;
    waitpid(child, &status, 0);
    EQ(status, 0);
    OK(CALL(cuStreamSynchronize)(stream));
    EQ(peek_byte(memory + 1), 67);
    OK(CALL(cuEventQuery)(event));
    OK(CALL(cuEventDestroy_v2)(event));
    OK(CALL(cuStreamDestroy_v2)(stream));
    release(memory, BLOCK);
    close(fd);
    nothing_left(0);
}

static void test_child(char **arguments) {
    start(0);
    CUipcEventHandle address;
    for (size_t i = 0; i < sizeof address; i++) {
        unsigned byte;
        sscanf(arguments[1] + 2 * i, "%2x", &byte);
        address.reserved[i] = (char)byte;
    }
    CUmemHandle handle = 0;
    OK(CALL(cuMemImportFromShareableHandle)(&handle, (void *)(intptr_t)atoi(arguments[0]), CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    CUdeviceptr memory = reserve(BLOCK);
    OK(CALL(cuMemMap)(memory, BLOCK, 0, handle, 0));
    OK(CALL(cuMemRelease)(handle));
    allow(memory, BLOCK, 0, CU_MEM_ACCESS_READWRITE);

    CUevent event = NULL;
    CUstream stream = new_stream();
    char *pinned = host_buffer(4096);
    OK(CALL(cuMemHostRegister_v2)(pinned, 4096, 0));
    OK(CALL(cuIpcOpenEventHandle)(&event, address));
    OK(CALL(cuStreamWaitEvent)(stream, event, 0));
    OK(CALL(cuMemcpyDtoHAsync_v2)(pinned, memory, 4096, stream));
    OK(CALL(cuMemsetD8Async)(memory + 1, 67, 1, stream));
    OK(CALL(cuEventSynchronize)(event));
    OK(CALL(cuStreamSynchronize)(stream));
    EQ(pinned[4095], 66);
    OK(CALL(cuEventDestroy_v2)(event));
    OK(CALL(cuStreamDestroy_v2)(stream));
    OK(CALL(cuMemHostUnregister)(pinned));
    release(memory, BLOCK);
    nothing_left(0);
}

/* ---- Many threads ---- */

static void *one_of_many(void *context) {
    OK(CALL(cuCtxPushCurrent_v2)((CUcontext)context));
    CUstream stream = new_stream();
    CUevent event = new_event();
    char *pinned = host_buffer(BLOCK);
    OK(CALL(cuMemHostRegister_v2)(pinned, BLOCK, 0));
    for (int round = 1; round <= 30; round++) {
        CUdeviceptr memory = allocate(BLOCK, 0);
        OK(CALL(cuMemsetD8Async)(memory, (unsigned char)round, BLOCK, stream));
        OK(CALL(cuMemcpyDtoHAsync_v2)(pinned, memory, BLOCK, stream));
        OK(CALL(cuEventRecord)(event, stream));
        if (round % 2) {
            OK(CALL(cuEventSynchronize)(event));
        } else {
            OK(CALL(cuStreamSynchronize)(stream));
        }
        EQ(pinned[BLOCK - 1], round);
        release(memory, BLOCK);
    }
    OK(CALL(cuMemHostUnregister)(pinned));
    munmap(pinned, BLOCK);
    OK(CALL(cuEventDestroy_v2)(event));
    OK(CALL(cuStreamDestroy_v2)(stream));
    return NULL;
}

static void test_threads(void) {
    CUcontext context = start(0);
    pthread_t threads[8];
    for (int i = 0; i < 8; i++) {
        pthread_create(&threads[i], NULL, one_of_many, context);
    }
    for (int i = 0; i < 8; i++) {
        pthread_join(threads[i], NULL);
    }
    OK(CALL(cuCtxSynchronize)());
    nothing_left(0);
}

/* ---- Variants of the library ---- */

static void test_init_fails(char **arguments) {
    int number;
    EQ(CALL(cuInit)(0), atoi(arguments[0]));
    EQ(CALL(cuDeviceGetCount)(&number), atoi(arguments[1]));
}

static void test_absent(char **arguments) {
    EQ(dlsym(library, arguments[0]) == NULL, 1);
    start(0);
    void *function;
    int status;
    OK(CALL(cuGetProcAddress_v2)(arguments[0], &function, 13000, 0, &status));
    EQ(status, 1);
}

static const struct group {
    const char *name;
    void (*run)(void);
    void (*run_with)(char **arguments);
} groups[] = {
    {"basics", test_basics, NULL},
    {"vmm", test_vmm, NULL},
    {"plain", test_plain, NULL},
    {"host", test_host_memory, NULL},
    {"copies", test_copies, NULL},
    {"legacy", test_legacy_stream, NULL},
    {"illegal", test_illegal, NULL},
    {"peers", test_peers, NULL},
    {"capture", test_capture, NULL},
    {"kernels", test_kernels, NULL},
    {"models", test_models, NULL},
    {"pitched", test_pitched, NULL},
    {"faults", test_faults, NULL},
    {"environment", test_faults_from_environment, NULL},
    {"fork", test_fork, NULL},
    {"processes", test_processes, NULL},
    {"child", NULL, test_child},
    {"threads", test_threads, NULL},
    {"init-fails", NULL, test_init_fails},
    {"absent", NULL, test_absent},
};

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s LIBRARY GROUP [ARGUMENT...]\n", argv[0]);
        return 2;
    }
    self_path = argv[0];
    library_path = argv[1];
    library = dlopen(library_path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        if (strcmp(groups[i].name, argv[2]) == 0) {
            if (groups[i].run) {
                groups[i].run();
            } else {
                groups[i].run_with(argv + 3);
            }
            return failures || checks == 0 ? 1 : 0;
        }
    }
    fprintf(stderr, "no such group: %s\n", argv[2]);
    return 2;
}
