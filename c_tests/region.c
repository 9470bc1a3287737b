/* Regions are per thread, nest, and restore exactly what was there. */
#include "check.h"

static const char *tag_of_new_memory(const tms_saver_t *saver, char *text, size_t size)
{
    void *memory = NULL;
    CHECK_OK(tms_saver_malloc(saver, 4096, -1, NULL, &memory));
    tms_allocation_info_t info = check_query(saver, memory);
    snprintf(text, size, "%s", info.tag);
    CHECK_OK(tms_saver_free_memory(saver, memory));
    return text;
}

static void nesting(const tms_saver_t *saver)
{
    char tag[256];
    CHECK(!tms_get_interesting_region());

    tms_region_options_t outer = check_region("outer", "pinned");
    CHECK_OK(tms_region_push(&outer));
    CHECK(tms_get_interesting_region());
    CHECK(strcmp(tms_get_current_tag(), "outer") == 0);
    CHECK(tms_get_enable_cpu_backup());
    CHECK(strcmp(tms_get_cpu_backup_backend(), "pinned") == 0);
    CHECK(strcmp(tag_of_new_memory(saver, tag, sizeof tag), "outer") == 0);

    tms_region_options_t inner = check_region("inner", "mmap");
    CHECK_OK(tms_region_push(&inner));
    CHECK(strcmp(tms_get_current_tag(), "inner") == 0);
    CHECK(strcmp(tms_get_cpu_backup_backend(), "mmap") == 0);
    CHECK(strcmp(tag_of_new_memory(saver, tag, sizeof tag), "inner") == 0);

    tms_region_options_t disabled = check_region(NULL, NULL);
    disabled.flags = TMS_REGION_DISABLED;
    CHECK_OK(tms_region_push(&disabled));
    CHECK(!tms_get_interesting_region());
    CHECK_OK(tms_region_pop());

    CHECK(tms_get_interesting_region());
    CHECK(strcmp(tms_get_current_tag(), "inner") == 0);
    CHECK_OK(tms_region_pop());

    CHECK(tms_get_interesting_region());
    CHECK(strcmp(tms_get_current_tag(), "outer") == 0);
    CHECK(tms_get_enable_cpu_backup());
    CHECK(strcmp(tms_get_cpu_backup_backend(), "pinned") == 0);
    CHECK(strcmp(tag_of_new_memory(saver, tag, sizeof tag), "outer") == 0);
    CHECK_OK(tms_region_pop());

    CHECK(!tms_get_interesting_region());
    CHECK(strcmp(tms_get_current_tag(), "default") == 0);
    CHECK(!tms_get_enable_cpu_backup());

    /* There is no region to leave, and asking changes nothing. */
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_region_pop());
    CHECK(strcmp(tms_get_current_tag(), "default") == 0);
}

/* What a Python context manager does: read the state, set it, put it back. */
static void compatible_setters(void)
{
    tms_set_current_tag("first");
    tms_set_interesting_region(true);
    tms_set_enable_cpu_backup(true);
    tms_set_cpu_backup_backend("mmap");

    tms_region_options_t region = check_region("pushed", "pinned");
    CHECK_OK(tms_region_push(&region));
    /* Setters inside a region are undone with it. */
    tms_set_current_tag("set inside");
    tms_set_enable_cpu_backup(false);
    tms_set_interesting_region(false);
    CHECK(strcmp(tms_get_current_tag(), "set inside") == 0);
    CHECK_OK(tms_region_pop());

    CHECK(strcmp(tms_get_current_tag(), "first") == 0);
    CHECK(tms_get_interesting_region());
    CHECK(tms_get_enable_cpu_backup());
    CHECK(strcmp(tms_get_cpu_backup_backend(), "mmap") == 0);

    tms_set_interesting_region(false);
    tms_set_enable_cpu_backup(false);
    tms_set_cpu_backup_backend("pinned");
    tms_set_current_tag("default");
}

/* A thread begins with the defaults, whatever its parent set. */
static void *other_thread(void *unused)
{
    (void)unused;
    CHECK(!tms_get_interesting_region());
    CHECK(strcmp(tms_get_current_tag(), "default") == 0);
    tms_region_options_t region = check_region("of the other thread", NULL);
    CHECK_OK(tms_region_push(&region));
    return NULL;
}

static void refusals(void)
{
    tms_region_options_t region = check_region("x", "no such backup");
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_region_push(&region));
    region = check_region("x", NULL);
    region.flags = 1u << 31;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_region_push(&region));
    region = check_region("x", NULL);
    region.struct_size = 4;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_region_push(&region));
    region.struct_size = 0;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_region_push(&region));
    CHECK(!tms_get_interesting_region());
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_region_pop());
}

int main(void)
{
    check_begin();
    tms_saver_t *saver = check_saver();
    nesting(saver);
    compatible_setters();
    refusals();

    tms_region_options_t region = check_region("of the main thread", NULL);
    CHECK_OK(tms_region_push(&region));
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, other_thread, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(strcmp(tms_get_current_tag(), "of the main thread") == 0);
    CHECK_OK(tms_region_pop());
    CHECK_OK(tms_saver_free(saver));

    /* Deeper than anybody nests. */
    for (int i = 0; i < 1000; i++) {
        char tag[32];
        snprintf(tag, sizeof tag, "depth %d", i);
        region = check_region(tag, NULL);
        CHECK_OK(tms_region_push(&region));
    }
    for (int i = 999; i >= 0; i--) {
        char tag[32];
        snprintf(tag, sizeof tag, "depth %d", i);
        CHECK(strcmp(tms_get_current_tag(), tag) == 0);
        CHECK_OK(tms_region_pop());
    }
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_region_pop());
    return 0;
}
