/* A CUDA driver can be loaded (the software driver of c_tests/fakecuda). Argument 1: "serves", it
 * has a device and regions live on it; "refuses", it has none or fails, and its error is returned,
 * for host memory never stands in. Argument 2, optional: a runtime to load first. */
#include "preload.h"

enum { BYTES = 32 << 20, CUDA_NO_DEVICE = 100 };

static hooks_t hooks;
static uint64_t (*live_bytes)(int);
static int (*peek)(const void *, void *, size_t);
static int (*poke)(void *, const void *, size_t);

static void serves(void) {
    char *written = malloc(BYTES), *found = calloc(1, BYTES);
    void *memory = NULL, *huge = NULL;
    fill_random(written, BYTES, 21);

    hooks.set_region(true);
    hooks.set_cpu_backup(true);
    CHECK_EQ(hooks.cudaMalloc(&memory, BYTES), 0);
    CHECK_EQ(live_bytes(0), BYTES);
    CHECK_EQ(poke(memory, written, BYTES), 0);
    for (int cycle = 0; cycle < 2; cycle++) {
        CHECK_EQ(hooks.pause(NULL), 0);
        CHECK_EQ(live_bytes(0), 0);
        CHECK_EQ(hooks.resume(NULL), 0);
        CHECK_EQ(live_bytes(0), BYTES);
        CHECK_EQ(peek(memory, found, BYTES), 0);
        CHECK(holds_random(found, BYTES, 21));
        memset(found, 0, BYTES);
    }
    CHECK_EQ(hooks.cudaMalloc(&huge, (size_t)64 << 30), CUDA_OUT_OF_MEMORY);
    CHECK(!huge);
    CHECK_EQ(hooks.cudaGetLastError(), CUDA_OUT_OF_MEMORY);
    CHECK(!hooks.torch_malloc((ssize_t)64 << 30, 0, NULL));
    hooks.set_memory_margin_bytes((uint64_t)1 << 40);
    CHECK_EQ(hooks.cudaMalloc(&huge, BYTES), CUDA_OUT_OF_MEMORY);
    hooks.set_memory_margin_bytes(0);
    CHECK_EQ(hooks.cudaMalloc(&huge, BYTES), 0);
    hooks.set_region(false);
    CHECK_EQ(hooks.cudaFree(huge), 0);
    CHECK_EQ(hooks.cudaFree(memory), 0);
    CHECK_EQ(live_bytes(0), 0);
    free(written);
    free(found);
}

static void refuses(bool runtime) {
    void *memory = NULL;
    hooks.set_region(true);
    if (runtime) {
        setenv("FAKE_GET_DEVICE_CODE", "46", 1);
        CHECK_EQ(hooks.cudaMalloc(&memory, BYTES), 46);
        CHECK_EQ(hooks.cudaGetLastError(), 46);
        unsetenv("FAKE_GET_DEVICE_CODE");
    }
    CHECK_EQ(hooks.cudaMalloc(&memory, BYTES), CUDA_NO_DEVICE);
    CHECK(!memory);
    CHECK_EQ(hooks.cudaGetLastError(), CUDA_NO_DEVICE);
    CHECK(!hooks.torch_malloc(BYTES, 0, NULL));
    hooks.set_region(false);
    if (!runtime) {
        CHECK(hooks.cudaMalloc(&memory, BYTES) != 0);
        CHECK(hooks.cudaFree(&memory) != 0);
        CHECK(!memory);
    }
}

int main(int argc, char **argv) {
    CHECK(argc == 2 || argc == 3);
    if (argc == 3) open_library(argv[2]);
    void *driver = open_library("libcuda.so.1");
    hooks = hooks_of(RTLD_DEFAULT);
    *(void **)&live_bytes = symbol(driver, "fakecuda_live_bytes");
    *(void **)&peek = symbol(driver, "fakecuda_peek");
    *(void **)&poke = symbol(driver, "fakecuda_poke");
    if (!strcmp(argv[1], "serves"))
        serves();
    else
        refuses(argc == 3);
    return 0;
}
