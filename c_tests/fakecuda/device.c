/* The library, its devices and what they say of themselves. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

CUresult cuInit(unsigned flags) {
    ENTER(NEEDS_NOTHING)
    if (flags) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (settings.init_code) {
        return call_end(settings.init_code);
    }
    if (settings.devices == 0) {
        return call_end(CUDA_ERROR_NO_DEVICE);
    }
    settings.initialised = true;
    return call_end(CUDA_SUCCESS);
}

CUresult cuDriverGetVersion(int *version) {
    ENTER(NEEDS_NOTHING)
    if (!version) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    *version = settings.version;
    return call_end(CUDA_SUCCESS);
}

static void *symbol_in_this_library(const char *name) {
    Dl_info info;
    if (!dladdr((void *)cuInit, &info)) {
        return NULL;
    }
    void *library = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    if (!library) {
        return NULL;
    }
    void *address = dlsym(library, name);
    dlclose(library);
    /* dlsym looks into the dependencies too. */
    Dl_info found;
    return address && dladdr(address, &found) && found.dli_fbase == info.dli_fbase ? address : NULL;
}

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    enum { FOUND = 0, NOT_FOUND = 1, VERSION_TOO_LOW = 2 };
    ENTER(NEEDS_NOTHING)
    (void)flags;
    if (!symbol || !function) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    char versioned[128];
    snprintf(versioned, sizeof versioned, "%s_v2", symbol);
    *function = symbol_in_this_library(versioned);
    if (!*function) {
        *function = symbol_in_this_library(symbol);
    }
    int found = *function ? FOUND : NOT_FOUND;
    if (*function && strcmp(symbol, "cuMemcpyBatchAsync") == 0 && (version < 12080 || settings.version < 12080)) {
        *function = NULL;
        found = VERSION_TOO_LOW;
    }
    if (status) {
        *status = found;
    }
    return call_end(*function || status ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND);
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER(NEEDS_INIT)
    if (!device) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!device_valid(ordinal)) {
        return call_end(CUDA_ERROR_INVALID_DEVICE);
    }
    *device = ordinal;
    return call_end(CUDA_SUCCESS);
}

CUresult cuDeviceGetCount(int *count) {
    ENTER(NEEDS_INIT)
    if (!count) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    *count = settings.devices;
    return call_end(CUDA_SUCCESS);
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    ENTER(NEEDS_INIT)
    if (!name || length <= 0) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!device_valid(device)) {
        return call_end(CUDA_ERROR_INVALID_DEVICE);
    }
    snprintf(name, (size_t)length, "fakecuda");
    return call_end(CUDA_SUCCESS);
}

/* The values of a compute capability 9.0 part; what is not listed reads 0, as an unsupported
 * feature does. */
static int attribute_value(int attribute, int device) {
    static const struct {
        int attribute, value;
    } table[] = {
        {1, 1024},    /* threads per block */
        {2, 1024},    /* block x */
        {3, 1024},    /* block y */
        {4, 64},      /* block z */
        {5, 2147483647}, /* grid x */
        {6, 65535},   /* grid y */
        {7, 65535},   /* grid z */
        {8, 49152},   /* shared memory per block */
        {10, 32},     /* warp */
        {12, 65536},  /* registers per block */
        {15, 1},      /* overlap of copies and kernels */
        {16, 132},    /* multiprocessors */
        {19, 1},      /* can map host memory */
        {31, 1},      /* concurrent kernels */
        {39, 2048},   /* threads per multiprocessor */
        {40, 3},      /* copy engines */
        {41, 1},      /* unified addressing */
        {75, 9},      /* compute capability, major */
        {78, 1},      /* stream priorities */
        {81, 233472}, /* shared memory per multiprocessor */
        {91, 1},      /* registered host memory keeps its address */
        {97, 232448}, /* shared memory per block, opt-in */
        {99, 1},      /* host registration */
        {102, 1},     /* virtual memory management */
        {103, 1},     /* export by file descriptor */
        {106, 32},    /* blocks per multiprocessor */
        {110, 1},     /* RDMA with virtual memory management */
        {113, 1},     /* read-only host registration */
        {116, 1},     /* RDMA */
    };
    if (attribute == 33) {
        return 0x10 + device; /* PCI bus */
    }
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (table[i].attribute == attribute) {
            return table[i].value;
        }
    }
    return 0;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    ENTER(NEEDS_INIT)
    if (!value || attribute < 1 || attribute > 160) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!device_valid(device)) {
        return call_end(CUDA_ERROR_INVALID_DEVICE);
    }
    *value = attribute_value(attribute, device);
    return call_end(CUDA_SUCCESS);
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    ENTER(NEEDS_INIT)
    if (!bytes) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!device_valid(device)) {
        return call_end(CUDA_ERROR_INVALID_DEVICE);
    }
    *bytes = settings.memory[device];
    return call_end(CUDA_SUCCESS);
}

static int write_uuid(CUuuid *uuid, int device) {
    if (!uuid) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (!device_valid(device)) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    memcpy(uuid->bytes, "fakecuda-device", sizeof uuid->bytes);
    uuid->bytes[15] = (char)device;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
    ENTER(NEEDS_INIT)
    return call_end(write_uuid(uuid, device));
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    ENTER(NEEDS_INIT)
    return call_end(write_uuid(uuid, device));
}

CUresult cuDeviceGetPCIBusId(char *id, int length, CUdevice device) {
    ENTER(NEEDS_INIT)
    if (!id || length < 13) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!device_valid(device)) {
        return call_end(CUDA_ERROR_INVALID_DEVICE);
    }
    snprintf(id, (size_t)length, "0000:%02X:00.0", (unsigned)attribute_value(33, device));
    return call_end(CUDA_SUCCESS);
}

CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
    ENTER(NEEDS_INIT)
    if (!can) {
        return call_end(CUDA_ERROR_INVALID_VALUE);
    }
    if (!device_valid(device) || !device_valid(peer)) {
        return call_end(CUDA_ERROR_INVALID_DEVICE);
    }
    *can = device != peer;
    return call_end(CUDA_SUCCESS);
}
