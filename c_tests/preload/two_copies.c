/* Two copies of the library in one process have one default saver and one region state a thread:
 * what is set and allocated through one is seen through the other. Arguments: the copy that is
 * loaded first (or "preloaded"), and the second. */
#include "preload.h"

typedef struct {
    uint32_t struct_size;
    int32_t device, state;
    uint32_t flags;
    void *base;
    uint64_t bytes, requested_bytes;
    char tag[256];
} allocation_info_t;

typedef struct {
    void (*set_tag)(const char *);
    const char *(*get_tag)(void);
    void (*set_region)(bool);
    bool (*get_region)(void);
    void (*set_cpu_backup)(bool);
    bool (*get_cpu_backup)(void);
    int (*pause)(const char *);
    int (*resume)(const char *);
    void *(*torch_malloc)(ssize_t, int, void *);
    void (*torch_free)(void *, ssize_t, int, void *);
    int32_t (*saver_default)(const void **);
    int32_t (*saver_query)(const void *, const void *, allocation_info_t *);
} copy_t;

enum { BYTES = 8 << 20 };

static copy_t copy_of(void *handle) {
    copy_t copy;
    *(void **)&copy.set_tag = symbol(handle, "tms_set_current_tag");
    *(void **)&copy.get_tag = symbol(handle, "tms_get_current_tag");
    *(void **)&copy.set_region = symbol(handle, "tms_set_interesting_region");
    *(void **)&copy.get_region = symbol(handle, "tms_get_interesting_region");
    *(void **)&copy.set_cpu_backup = symbol(handle, "tms_set_enable_cpu_backup");
    *(void **)&copy.get_cpu_backup = symbol(handle, "tms_get_enable_cpu_backup");
    *(void **)&copy.pause = symbol(handle, "tms_pause");
    *(void **)&copy.resume = symbol(handle, "tms_resume");
    *(void **)&copy.torch_malloc = symbol(handle, "tms_torch_malloc");
    *(void **)&copy.torch_free = symbol(handle, "tms_torch_free");
    *(void **)&copy.saver_default = symbol(handle, "tms_saver_default");
    *(void **)&copy.saver_query = symbol(handle, "tms_saver_query");
    return copy;
}

/* Memory of `a` is known to, paused, resumed and freed by `b`. */
static void share(const copy_t *a, const copy_t *b) {
    const void *saver = NULL;
    allocation_info_t info = {.struct_size = sizeof info};

    a->set_region(true);
    CHECK(b->get_region());
    a->set_tag("shared");
    CHECK(!strcmp(b->get_tag(), "shared"));
    a->set_cpu_backup(true);
    CHECK(b->get_cpu_backup());

    void *memory = a->torch_malloc(BYTES, 0, NULL);
    CHECK(memory);
    fill_random(memory, BYTES, 11);
    CHECK_EQ(b->saver_default(&saver), 0);
    CHECK_EQ(b->saver_query(saver, memory, &info), 0);
    CHECK(info.base == memory && info.state == 0 && !strcmp(info.tag, "shared"));
    CHECK_EQ(b->pause("shared"), 0);
    CHECK_EQ(a->saver_default(&saver), 0);
    CHECK_EQ(a->saver_query(saver, memory, &info), 0);
    CHECK_EQ(info.state, 2);
    CHECK_EQ(a->resume(NULL), 0);
    CHECK(holds_random(memory, BYTES, 11));
    b->torch_free(memory, BYTES, 0, NULL);
    CHECK(a->saver_query(saver, memory, &info) != 0);
    b->set_region(false);
    CHECK(!a->get_region());
    b->set_cpu_backup(false);
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    bool preloaded = !strcmp(argv[1], "preloaded");
    copy_t first = copy_of(preloaded ? RTLD_DEFAULT : open_library(argv[1]));
    if (preloaded) {
        void *early = first.torch_malloc(BYTES, 0, NULL);
        CHECK(early);
        first.torch_free(early, BYTES, 0, NULL);
    }
    copy_t second = copy_of(open_library(argv[2]));
    CHECK(*(void **)&first.pause != *(void **)&second.pause);
    share(&first, &second);
    share(&second, &first);

    /* Hooks of either copy serve the same saver. */
    void *hook = dlsym(preloaded ? RTLD_DEFAULT : open_library(argv[2]), "cudaMalloc");
    if (hook) {
        hooks_t hooks = hooks_of(preloaded ? RTLD_DEFAULT : open_library(argv[2]));
        void *memory = NULL;
        allocation_info_t info = {.struct_size = sizeof info};
        const void *saver = NULL;
        second.set_region(true);
        CHECK_EQ(hooks.cudaMalloc(&memory, BYTES), 0);
        CHECK_EQ(first.saver_default(&saver), 0);
        CHECK_EQ(first.saver_query(saver, memory, &info), 0);
        CHECK_EQ(hooks.cudaFree(memory), 0);
    }
    return 0;
}
