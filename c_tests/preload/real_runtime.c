/* NVIDIA's own runtime (argument 1) gives the same codes through the hooks as without them. Run
 * with the library preloaded. */
#include "preload.h"

int main(int argc, char **argv) {
    CHECK(argc == 2);
    void *runtime = open_library(argv[1]);
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
    hooks_t hooks = hooks_of(RTLD_DEFAULT);
    int (*bare_malloc)(void **, size_t), (*bare_free)(void *), (*bare_last)(void);
    int (*bare_flags)(unsigned *, void *);
    *(void **)&bare_malloc = symbol(runtime, "cudaMalloc");
    *(void **)&bare_free = symbol(runtime, "cudaFree");
    *(void **)&bare_last = symbol(runtime, "cudaGetLastError");
    *(void **)&bare_flags = symbol(runtime, "cudaHostGetFlags");
    CHECK(*(void **)&bare_malloc != *(void **)&hooks.cudaMalloc);

    void *bare = NULL, *hooked = NULL;
    int expected = bare_malloc(&bare, 1 << 20);
    int last = bare_last(), later = bare_last();
    CHECK_EQ(hooks.cudaMalloc(&hooked, 1 << 20), expected);
    CHECK_EQ(hooks.cudaGetLastError(), last);
    CHECK_EQ(hooks.cudaGetLastError(), later);
    if (!driver) {
        CHECK(expected != 0);
        hooks.set_region(true);
        CHECK_EQ(hooks.cudaMalloc(&hooked, 1 << 20), expected);
        CHECK_EQ(hooks.cudaGetLastError(), last);
        hooks.set_region(false);
    }
    CHECK_EQ(hooks.cudaMalloc(&hooked, 0), bare_malloc(&bare, 0));
    CHECK_EQ(hooks.cudaMalloc(NULL, 64), bare_malloc(NULL, 64));
    CHECK_EQ(hooks.cudaFree(NULL), bare_free(NULL));
    CHECK_EQ(hooks.cudaFree(&hooked), bare_free(&hooked));
    unsigned flags;
    CHECK_EQ(hooks.cudaHostGetFlags(&flags, &flags), bare_flags(&flags, &flags));
    printf("# without hooks cudaMalloc returns %d\n", expected);
    return 0;
}
