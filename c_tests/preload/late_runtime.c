/* The hooks are called before any CUDA library is loaded; then runtimes come in by a local dlopen,
 * in the order of the arguments, the one that must be used first: USED [OTHER], or with a leading
 * "reversed" OTHER is loaded first. Run with the library preloaded. */
#include "preload.h"

int main(int argc, char **argv) {
    hooks_t hooks = hooks_of(RTLD_DEFAULT);
    void *early = NULL, *memory = NULL;
    bool reversed = argc > 1 && !strcmp(argv[1], "reversed");
    char **paths = argv + 1 + reversed;
    int count = argc - 1 - reversed;
    CHECK(count == 1 || count == 2);

    CHECK_EQ(hooks.cudaFree(NULL), 0);
    CHECK_EQ(hooks.cudaMalloc(&early, 4096), 0);

    void *other = reversed ? open_library(paths[1]) : NULL;
    void *used = open_library(paths[0]);
    if (!other && count == 2) other = open_library(paths[1]);

    CHECK_EQ(hooks.cudaMalloc(&memory, 4096), 0);
    CHECK_EQ(fake_calls(used, "cudaMalloc"), 1);
    CHECK_EQ(hooks.cudaFree(memory), 0);
    CHECK_EQ(hooks.cudaFree(NULL), 0);
    CHECK_EQ(fake_calls(used, "cudaFree"), 2);
    CHECK_EQ(hooks.cudaFree(&memory), CUDA_INVALID_VALUE);
    CHECK_EQ(fake_calls(used, "cudaFree"), 3);
    CHECK_EQ(hooks.cudaGetLastError(), CUDA_INVALID_VALUE);
    CHECK_EQ(hooks.cudaGetLastError(), 0);
    CHECK_EQ(hooks.cudaMalloc(&memory, 0), 0);
    CHECK_EQ(fake_calls(used, "cudaMalloc"), 2);
    setenv("FAKE_MALLOC_CODE", "46", 1);
    CHECK_EQ(hooks.cudaMalloc(&memory, 64), 46);
    CHECK_EQ(hooks.cudaGetLastError(), 46);
    unsetenv("FAKE_MALLOC_CODE");

    CHECK_EQ(hooks.cudaFree(early), 0);
    CHECK_EQ(fake_calls(used, "cudaFree"), 3);
    if (other) CHECK_EQ(fake_calls(other, "cudaMalloc") + fake_calls(other, "cudaFree"), 0);
    return 0;
}
