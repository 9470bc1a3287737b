/* Without CUDA a region is served from host memory: pausing gives it back to the system, resuming
 * restores it at the same address. Run with the library preloaded. */
#include "preload.h"

enum { BYTES = 64 << 20, SLACK = 24 << 20 };

int main(void) {
    hooks_t hooks = hooks_of(RTLD_DEFAULT);
    void *kept = NULL, *dropped = NULL, *small = NULL;

    hooks.set_region(true);
    hooks.set_tag("kept");
    hooks.set_cpu_backup(true);
    CHECK_EQ(hooks.cudaMalloc(&kept, BYTES), 0);
    CHECK_EQ(hooks.cudaMalloc(&small, 6912), 0);
    hooks.set_tag("dropped");
    hooks.set_cpu_backup(false);
    CHECK_EQ(hooks.cudaMalloc(&dropped, BYTES), 0);
    hooks.set_region(false);
    fill_random(kept, BYTES, 1);
    fill_random(small, 6912, 2);
    fill_random(dropped, BYTES, 3);

    size_t before = resident_bytes();
    CHECK_EQ(hooks.pause("dropped"), 0);
    CHECK(resident_bytes() + BYTES - SLACK < before);
    CHECK(holds_random(kept, BYTES, 1));
    CHECK_EQ(hooks.pause("dropped"), 0);
    CHECK_EQ(hooks.resume("dropped"), 0);
    CHECK(!holds_random(dropped, BYTES, 3));
    fill_random(dropped, BYTES, 4);

    CHECK_EQ(hooks.pause(NULL), 0);
    CHECK_EQ(hooks.resume(""), 0);
    CHECK_EQ(hooks.resume(NULL), 0);
    CHECK(holds_random(kept, BYTES, 1));
    CHECK(holds_random(small, 6912, 2));
    CHECK(!holds_random(dropped, BYTES, 4));

    CHECK_EQ(hooks.pause("kept"), 0);
    CHECK_EQ(hooks.cudaFree(kept), 0);
    CHECK_EQ(hooks.resume("kept"), 0);
    CHECK(holds_random(small, 6912, 2));
    CHECK_EQ(hooks.cudaFree(small), 0);
    hooks.torch_free(dropped, BYTES, 0, NULL);
    CHECK_EQ(hooks.pause(NULL), 0);

    void *torch = hooks.torch_malloc(1 << 20, 0, NULL);
    CHECK(torch);
    CHECK_EQ(hooks.cudaFree(torch), 0);
    return 0;
}
