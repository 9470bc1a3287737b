/* A runtime is there (argument 1). With TMS_DEVICE=host a region is served by the host device, and
 * everything else by the runtime. Without, and with no driver, host memory never stands in: the
 * runtime answers. */
#include "preload.h"

int main(int argc, char **argv) {
    CHECK(argc == 2);
    void *runtime = open_library(argv[1]);
    hooks_t hooks = hooks_of(RTLD_DEFAULT);
    const char *device = getenv("TMS_DEVICE");
    bool host = device && !strcmp(device, "host");
    void *memory = NULL;

    hooks.set_region(true);
    CHECK_EQ(hooks.cudaMalloc(&memory, 1 << 20), 0);
    CHECK_EQ(fake_calls(runtime, "cudaMalloc"), host ? 0 : 1);
    if (!host) {
        setenv("FAKE_MALLOC_CODE", "35", 1);
        void *refused = NULL;
        CHECK_EQ(hooks.cudaMalloc(&refused, 1 << 20), 35);
        CHECK(!refused);
    }
    hooks.set_region(false);
    CHECK_EQ(hooks.cudaFree(memory), 0);
    CHECK_EQ(fake_calls(runtime, "cudaFree"), host ? 0 : 1);
    CHECK_EQ(hooks.cudaFree(&memory), CUDA_INVALID_VALUE);
    CHECK_EQ(fake_calls(runtime, "cudaFree"), host ? 1 : 2);
    return 0;
}
