/* Without CUDA: memory outside regions is not paused, foreign pointers are refused, and an error
 * of a hook is what cudaGetLastError reports, once and on its own thread. */
#include <pthread.h>

#include "preload.h"

static hooks_t hooks;

static void *other_thread(void *unused) {
    CHECK_EQ(hooks.cudaGetLastError(), 0);
    return unused;
}

int main(void) {
    hooks = hooks_of(RTLD_DEFAULT);
    void *memory = NULL;
    int on_the_stack = 0;

    CHECK_EQ(hooks.cudaFree(NULL), 0);
    CHECK_EQ(hooks.cudaGetLastError(), 0);
    CHECK_EQ(hooks.cudaMalloc(&memory, 1 << 20), 0);
    CHECK(memory);
    fill_random(memory, 1 << 20, 9);
    CHECK_EQ(hooks.pause(NULL), 0);
    CHECK(holds_random(memory, 1 << 20, 9));
    CHECK_EQ(hooks.resume(NULL), 0);
    CHECK_EQ(hooks.cudaFree(memory), 0);

    CHECK_EQ(hooks.cudaFree(memory), CUDA_INVALID_VALUE);
    CHECK_EQ(hooks.cudaFree(&on_the_stack), CUDA_INVALID_VALUE);
    pthread_t thread;
    CHECK(!pthread_create(&thread, NULL, other_thread, NULL));
    pthread_join(thread, NULL);
    CHECK_EQ(hooks.cudaGetLastError(), CUDA_INVALID_VALUE);
    CHECK_EQ(hooks.cudaGetLastError(), 0);

    CHECK_EQ(hooks.cudaMalloc(NULL, 64), CUDA_INVALID_VALUE);
    memory = &on_the_stack;
    CHECK_EQ(hooks.cudaMalloc(&memory, 0), 0);
    CHECK(!memory);
    CHECK_EQ(hooks.cudaMalloc(&memory, SIZE_MAX / 4), CUDA_OUT_OF_MEMORY);
    hooks.set_region(true);
    CHECK_EQ(hooks.cudaMalloc(NULL, 64), CUDA_INVALID_VALUE);
    CHECK_EQ(hooks.cudaMalloc(&memory, 0), 0);
    CHECK_EQ(hooks.cudaMalloc(&memory, SIZE_MAX / 4), CUDA_OUT_OF_MEMORY);
    CHECK_EQ(hooks.cudaGetLastError(), CUDA_OUT_OF_MEMORY);
    hooks.set_region(false);

    unsigned flags = 7;
    CHECK(hooks.cudaHostGetFlags(&flags, &on_the_stack) != 0);
    CHECK(hooks.cudaHostGetFlags(NULL, &on_the_stack) != 0);
    return 0;
}
