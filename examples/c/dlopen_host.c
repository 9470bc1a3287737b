/* A C program that loads the library when it runs, and does without it if it is not there:
 *
 *     cc dlopen_host.c $(pkg-config --cflags tms-memcache) -ldl -o dlopen_host
 *     ./dlopen_host [/path/to/libtms_memcache.so.0]
 *
 * The header gives the types; every function is found by name. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tms.h>

#define BYTES ((size_t)16 << 20)

/* Every function that this program uses, with the type that the header declares. */
#define FUNCTIONS(X)                                                                               \
    X(tms_abi_version)                                                                             \
    X(tms_version)                                                                                 \
    X(tms_status_str)                                                                              \
    X(tms_last_error_message)                                                                      \
    X(tms_device_info)                                                                             \
    X(tms_saver_create)                                                                            \
    X(tms_saver_free)                                                                              \
    X(tms_saver_malloc)                                                                            \
    X(tms_saver_free_memory)                                                                       \
    X(tms_saver_pause)                                                                             \
    X(tms_saver_resume)                                                                            \
    X(tms_saver_query)

#define MEMBER(name) __typeof__(&name) name;
static struct {
    FUNCTIONS(MEMBER)
} library;

static int find(void *handle, const char *name, void *function)
{
    void *symbol = dlsym(handle, name);
    if (symbol == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        return 0;
    }
    /* C has no cast between object and function pointers; POSIX says that the bytes are good. */
    memcpy(function, &symbol, sizeof symbol);
    return 1;
}

static int load(const char *path)
{
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        return 0;
    }
#define FIND(name)                                                                                 \
    if (!find(handle, #name, &library.name)) {                                                     \
        return 0;                                                                                  \
    }
    FUNCTIONS(FIND)
    if (library.tms_abi_version() != TMS_ABI_VERSION) {
        fprintf(stderr, "%s has ABI version %u; this program was built for %d\n", path,
                (unsigned)library.tms_abi_version(), TMS_ABI_VERSION);
        return 0;
    }
    return 1;
}

static void expect(int32_t status, const char *what)
{
    if (status != TMS_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, library.tms_status_str(status),
                library.tms_last_error_message());
        exit(1);
    }
}

int main(int argc, char **argv)
{
    if (!load(argc > 1 ? argv[1] : "libtms_memcache.so.0")) {
        return 1;
    }
    printf("loaded tms-memcache %s\n", library.tms_version());

    tms_saver_t *saver = NULL;
    expect(library.tms_saver_create(NULL, &saver), "creating a saver");
    tms_device_info_t device = {0};
    device.struct_size = sizeof device;
    expect(library.tms_device_info(-1, &device), "describing the device");

    tms_region_options_t region = {0};
    region.struct_size = sizeof region;
    region.tag = "cache";
    region.backup = "mmap";
    void *memory = NULL;
    expect(library.tms_saver_malloc(saver, BYTES, -1, &region, &memory), "allocating");
    int writable = device.kind == TMS_DEVICE_HOST;
    if (writable) {
        memset(memory, 0x17, BYTES);
    }

    tms_result_t result = {0};
    result.struct_size = sizeof result;
    expect(library.tms_saver_pause(saver, NULL, &result), "pausing");
    printf("paused %" PRIu64 " allocation of %" PRIu64 " MiB on %s\n", result.done_count,
           result.done_bytes >> 20, device.name);

    tms_allocation_info_t info = {0};
    info.struct_size = sizeof info;
    expect(library.tms_saver_query(saver, memory, &info), "asking for the allocation");
    if (info.state != TMS_STATE_PAUSED) {
        fprintf(stderr, "the allocation is in state %d\n", (int)info.state);
        return 1;
    }

    expect(library.tms_saver_resume(saver, NULL, &result), "resuming");
    for (size_t i = 0; writable && i < BYTES; i++) {
        if (((unsigned char *)memory)[i] != 0x17) {
            fprintf(stderr, "byte %zu came back as %#x\n", i, ((unsigned char *)memory)[i]);
            return 1;
        }
    }
    printf("resumed at the same address, %" PRIu64 " MiB copied\n", result.copied_bytes >> 20);

    /* Errors are told by code and by text. */
    region.backup = "tape";
    void *refused = NULL;
    int32_t status = library.tms_saver_malloc(saver, BYTES, -1, &region, &refused);
    printf("a wrong backup: %s: %s\n", library.tms_status_str(status),
           library.tms_last_error_message());
    if (status != TMS_ERR_INVALID_ARGUMENT) {
        return 1;
    }

    expect(library.tms_saver_free_memory(saver, memory), "freeing");
    expect(library.tms_saver_free(saver), "freeing the saver");
    return 0;
}
