/* Shared by the tests of libtms_preload.so: the functions they call, looked up at run time so that
 * no test needs a CUDA header or library, and the check that ends a test. */
#ifndef TMS_TESTS_PRELOAD_H
#define TMS_TESTS_PRELOAD_H

#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHECK(condition)                                                                \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);             \
            _exit(1);                                                                   \
        }                                                                               \
    } while (0)

#define CHECK_EQ(left, right)                                                           \
    do {                                                                                \
        long long left_ = (long long)(left), right_ = (long long)(right);               \
        if (left_ != right_) {                                                          \
            fprintf(stderr, "%s:%d: %s is %lld, expected %lld\n", __FILE__, __LINE__,   \
                    #left, left_, right_);                                              \
            _exit(1);                                                                   \
        }                                                                               \
    } while (0)

enum { CUDA_INVALID_VALUE = 1, CUDA_OUT_OF_MEMORY = 2, CUDA_INITIALIZATION = 3 };

typedef struct {
    int (*cudaMalloc)(void **, size_t);
    int (*cudaFree)(void *);
    int (*cudaGetLastError)(void);
    int (*cudaHostGetFlags)(unsigned *, void *);
    void (*set_memory_margin_bytes)(uint64_t);
    void (*set_tag)(const char *);
    const char *(*get_tag)(void);
    void (*set_region)(bool);
    bool (*get_region)(void);
    void (*set_cpu_backup)(bool);
    int (*pause)(const char *);
    int (*resume)(const char *);
    void *(*torch_malloc)(ssize_t, int, void *);
    void (*torch_free)(void *, ssize_t, int, void *);
} hooks_t;

static inline void *symbol(void *handle, const char *name) {
    void *found = dlsym(handle, name);
    if (!found) {
        fprintf(stderr, "%s is missing: %s\n", name, dlerror());
        _exit(1);
    }
    return found;
}

/* handle: of dlopen, or RTLD_DEFAULT for a preloaded library. */
static inline hooks_t hooks_of(void *handle) {
    hooks_t hooks;
    *(void **)&hooks.cudaMalloc = symbol(handle, "cudaMalloc");
    *(void **)&hooks.cudaFree = symbol(handle, "cudaFree");
    *(void **)&hooks.cudaGetLastError = symbol(handle, "cudaGetLastError");
    *(void **)&hooks.cudaHostGetFlags = symbol(handle, "cudaHostGetFlags");
    *(void **)&hooks.set_memory_margin_bytes = symbol(handle, "set_memory_margin_bytes");
    *(void **)&hooks.set_tag = symbol(handle, "tms_set_current_tag");
    *(void **)&hooks.get_tag = symbol(handle, "tms_get_current_tag");
    *(void **)&hooks.set_region = symbol(handle, "tms_set_interesting_region");
    *(void **)&hooks.get_region = symbol(handle, "tms_get_interesting_region");
    *(void **)&hooks.set_cpu_backup = symbol(handle, "tms_set_enable_cpu_backup");
    *(void **)&hooks.pause = symbol(handle, "tms_pause");
    *(void **)&hooks.resume = symbol(handle, "tms_resume");
    *(void **)&hooks.torch_malloc = symbol(handle, "tms_torch_malloc");
    *(void **)&hooks.torch_free = symbol(handle, "tms_torch_free");
    return hooks;
}

static inline void *open_library(const char *path) {
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        fprintf(stderr, "%s\n", dlerror());
        _exit(1);
    }
    return handle;
}

/* Calls of `name` that the fake runtime behind `handle` has served. */
static inline int fake_calls(void *handle, const char *name) {
    int (*calls)(const char *);
    *(void **)&calls = symbol(handle, "fakecudart_calls");
    return calls(name);
}

static inline size_t resident_bytes(void) {
    unsigned long total, resident;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file && fscanf(file, "%lu %lu", &total, &resident) == 2);
    fclose(file);
    return resident * (size_t)sysconf(_SC_PAGESIZE);
}

/* Bytes that differ everywhere and are never all zero. */
static inline void fill_random(void *memory, size_t bytes, uint64_t seed) {
    uint64_t *words = memory;
    for (size_t i = 0; i < bytes / 8; i++) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        words[i] = seed;
    }
}

static inline bool holds_random(const void *memory, size_t bytes, uint64_t seed) {
    const uint64_t *words = memory;
    for (size_t i = 0; i < bytes / 8; i++) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        if (words[i] != seed) return false;
    }
    return true;
}

#endif
