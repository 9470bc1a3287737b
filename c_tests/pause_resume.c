/* Pausing takes the physical memory away, resuming puts memory and contents back, with every
 * backup, by tag, any number of times. */
#include "check.h"

#define MIB ((size_t)1 << 20)
#define SIZE (5 * MIB)

static void backup_keeps_bytes(const tms_saver_t *saver, const char *backup)
{
    void *memory = check_malloc(saver, SIZE, "weights", backup, 3);
    tms_allocation_info_t info = check_query(saver, memory);
    CHECK(info.base == memory);
    CHECK(info.requested_bytes == SIZE);
    CHECK(info.bytes >= SIZE);
    for (uint64_t cycle = 0; cycle < 3; cycle++) {
        tms_result_t result = check_pause(saver, "weights");
        CHECK(result.done_count == 1 && result.done_bytes == info.bytes);
        CHECK(result.copied_bytes >= SIZE);
        CHECK(result.unchanged_count == 0 && result.failed_count == 0);
        CHECK(result.shortfall_bytes == 0);
        CHECK(check_query(saver, memory).state == TMS_STATE_PAUSED);

        result = check_resume(saver, "weights");
        CHECK(result.done_count == 1 && result.done_bytes == info.bytes);
        CHECK(result.copied_bytes >= SIZE);
        CHECK(check_query(saver, memory).state == TMS_STATE_ACTIVE);
        CHECK_KEPT(memory, SIZE, 3 + cycle);
        check_fill(memory, SIZE, 4 + cycle);
    }
    CHECK_OK(tms_saver_free_memory(saver, memory));
}

static void none_discards(const tms_saver_t *saver)
{
    void *dropped = check_malloc(saver, SIZE, "cache", "none", 7);
    void *plain = check_malloc(saver, SIZE, "cache", NULL, 8);
    tms_result_t result = check_pause(saver, "cache");
    CHECK(result.done_count == 2 && result.copied_bytes == 0);
    result = check_resume(saver, "cache");
    CHECK(result.done_count == 2 && result.copied_bytes == 0);
    CHECK_GONE(dropped, SIZE, 7);
    CHECK_GONE(plain, SIZE, 8);
    CHECK_OK(tms_saver_free_memory(saver, dropped));
    CHECK_OK(tms_saver_free_memory(saver, plain));
}

/* What is kept can be decided at the pause. */
static void options_override_the_region(const tms_saver_t *saver)
{
    void *kept = check_malloc(saver, SIZE, "cache", "none", 11);
    tms_pause_options_t options = check_pause_options(NULL, 0);
    options.backup = "mmap";
    CHECK_OK(tms_saver_pause(saver, &options, NULL));
    CHECK_OK(tms_saver_resume(saver, NULL, NULL));
    CHECK_KEPT(kept, SIZE, 11);
    CHECK_OK(tms_saver_free_memory(saver, kept));

    void *dropped = check_malloc(saver, SIZE, "weights", "pinned", 12);
    options.backup = "none";
    tms_result_t result = check_result();
    CHECK_OK(tms_saver_pause(saver, &options, &result));
    CHECK(result.done_count == 1 && result.copied_bytes == 0);
    CHECK_OK(tms_saver_resume(saver, NULL, NULL));
    CHECK_GONE(dropped, SIZE, 12);
    CHECK_OK(tms_saver_free_memory(saver, dropped));

    options.backup = "no such backup";
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_pause(saver, &options, NULL));
}

static void tags_select(const tms_saver_t *saver)
{
    void *a = check_malloc(saver, SIZE, "a", "pinned", 21);
    void *b = check_malloc(saver, SIZE, "b", "mmap", 22);
    void *c = check_malloc(saver, SIZE, "c", "file", 23);

    CHECK(check_pause(saver, "b").done_count == 1);
    CHECK(check_query(saver, a).state == TMS_STATE_ACTIVE);
    CHECK(check_query(saver, b).state == TMS_STATE_PAUSED);
    CHECK(check_query(saver, c).state == TMS_STATE_ACTIVE);
    CHECK_KEPT(a, SIZE, 21);
    CHECK_KEPT(c, SIZE, 23);

    const char *two[] = {"a", "b"};
    tms_pause_options_t options = check_pause_options(two, 2);
    tms_result_t result = check_result();
    CHECK_OK(tms_saver_pause(saver, &options, &result));
    CHECK(result.done_count == 1 && result.unchanged_count == 1);

    CHECK(check_pause(saver, NULL).done_count == 1);
    CHECK(check_query(saver, c).state == TMS_STATE_PAUSED);

    /* A tag that nothing has selects nothing. */
    CHECK(check_pause(saver, "no such tag").done_count == 0);
    CHECK(check_resume(saver, "no such tag").done_count == 0);

    const char *others[] = {"c", "a"};
    tms_resume_options_t resume = check_resume_options(others, 2);
    result = check_result();
    CHECK_OK(tms_saver_resume(saver, &resume, &result));
    CHECK(result.done_count == 2);
    CHECK_KEPT(a, SIZE, 21);
    CHECK_KEPT(c, SIZE, 23);
    CHECK(check_resume(saver, NULL).done_count == 1);
    CHECK_KEPT(b, SIZE, 22);

    CHECK_OK(tms_saver_free_memory(saver, a));
    CHECK_OK(tms_saver_free_memory(saver, b));
    CHECK_OK(tms_saver_free_memory(saver, c));
}

static void twice_is_once(const tms_saver_t *saver)
{
    void *first = check_malloc(saver, SIZE, "twice", "pinned", 31);
    void *second = check_malloc(saver, SIZE, "twice", "pinned", 32);
    tms_result_t result = check_resume(saver, "twice");
    CHECK(result.done_count == 0 && result.unchanged_count == 2 && result.copied_bytes == 0);
    CHECK(check_pause(saver, "twice").done_count == 2);
    result = check_pause(saver, "twice");
    CHECK(result.done_count == 0 && result.unchanged_count == 2 && result.copied_bytes == 0);
    CHECK(check_resume(saver, "twice").done_count == 2);
    result = check_resume(saver, "twice");
    CHECK(result.done_count == 0 && result.unchanged_count == 2);
    CHECK_KEPT(first, SIZE, 31);
    CHECK_KEPT(second, SIZE, 32);
    CHECK_OK(tms_saver_free_memory(saver, first));
    CHECK_OK(tms_saver_free_memory(saver, second));
}

static void free_while_paused(const tms_saver_t *saver, const char *backup)
{
    void *freed = check_malloc(saver, SIZE, "freed", backup, 41);
    void *kept = check_malloc(saver, SIZE, "freed", backup, 42);
    CHECK(check_pause(saver, "freed").done_count == 2);
    CHECK_OK(tms_saver_free_memory(saver, freed));
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_free_memory(saver, freed));
    CHECK(check_resume(saver, "freed").done_count == 1);
    CHECK_KEPT(kept, SIZE, 42);
    CHECK_OK(tms_saver_free_memory(saver, kept));
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_free_memory(saver, kept));
}

/* A plain backup can be read while paused, and is gone afterwards. */
static void pointer_while_paused(const tms_saver_t *saver, const char *backup)
{
    uint8_t *memory = check_malloc(saver, SIZE, "pointer", backup, 51);
    void *pointer = NULL;
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_backup_pointer(saver, memory, SIZE, &pointer));
    CHECK(pointer == NULL);
    check_pause(saver, "pointer");
    CHECK((check_query(saver, memory).flags & TMS_ALLOCATION_BACKED) != 0);
    CHECK_OK(tms_saver_backup_pointer(saver, memory, SIZE, &pointer));
    CHECK(pointer != NULL && pointer != memory);
    CHECK_KEPT(pointer, SIZE, 51);
    void *inside = NULL;
    CHECK_OK(tms_saver_backup_pointer(saver, memory + 4096, 4096, &inside));
    CHECK(inside == (uint8_t *)pointer + 4096);
    /* A range that leaves the allocation has no backup. */
    static const size_t too_long[] = {(size_t)1 << 40, SIZE_MAX, SIZE_MAX - 4095};
    for (size_t i = 0; i < 3; i++) {
        CHECK_STATUS(TMS_ERR_NOT_FOUND,
                     tms_saver_backup_pointer(saver, memory + 4096, too_long[i], &inside));
    }
    check_resume(saver, "pointer");
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_backup_pointer(saver, memory, SIZE, &pointer));
    CHECK((check_query(saver, memory).flags & TMS_ALLOCATION_BACKED) == 0);
    CHECK_KEPT(memory, SIZE, 51);
    CHECK_OK(tms_saver_free_memory(saver, memory));
}

static void retained(const tms_saver_t *saver, const char *backup)
{
    tms_region_options_t region = check_region("retained", backup);
    region.flags = TMS_REGION_RETAIN;
    void *memory = NULL;
    CHECK_OK(tms_saver_malloc(saver, SIZE, -1, &region, &memory));
    void *pointer = NULL;
    for (uint64_t cycle = 0; cycle < 3; cycle++) {
        check_fill(memory, SIZE, 60 + cycle);
        check_pause(saver, "retained");
        void *paused = NULL;
        CHECK_OK(tms_saver_backup_pointer(saver, memory, SIZE, &paused));
        CHECK(paused != NULL && (cycle == 0 || paused == pointer));
        pointer = paused;
        CHECK_KEPT(pointer, SIZE, 60 + cycle);

        /* The owner's edit wins. */
        check_fill(pointer, SIZE, 70 + cycle);
        check_resume(saver, "retained");
        CHECK_KEPT(memory, SIZE, 70 + cycle);

        /* While active the backup stays, at the same place. */
        void *active = NULL;
        CHECK_OK(tms_saver_backup_pointer(saver, memory, SIZE, &active));
        CHECK(active == pointer);
        CHECK_KEPT(active, SIZE, 70 + cycle);

        /* An edit while active is overwritten by the next pause. */
        check_fill(active, SIZE, 80 + cycle);
        CHECK_KEPT(memory, SIZE, 70 + cycle);
        check_pause(saver, "retained");
        CHECK_KEPT(pointer, SIZE, 70 + cycle);
        check_resume(saver, "retained");
        CHECK_KEPT(memory, SIZE, 70 + cycle);
    }
    CHECK_OK(tms_saver_free_memory(saver, memory));
}

static void many_sizes(const tms_saver_t *saver)
{
    enum { COUNT = 12 };
    static const size_t sizes[COUNT] = {8,     64,      4096,        6912,        65536,   1 << 20,
                                        2097152, 2097160, 3 * 1048576, 4194296, 9437184, 16};
    void *memory[COUNT];
    for (size_t i = 0; i < COUNT; i++) {
        const char *backups[] = {"pinned", "mmap", "file"};
        memory[i] = check_malloc(saver, sizes[i], "many", backups[i % 3], 90 + i);
    }
    for (int cycle = 0; cycle < 2; cycle++) {
        CHECK(check_pause(saver, "many").done_count == COUNT);
        CHECK(check_resume(saver, "many").done_count == COUNT);
        for (size_t i = 0; i < COUNT; i++) {
            CHECK_KEPT(memory[i], sizes[i], 90 + i);
        }
    }
    /* The rest is freed with the saver, paused as it is. */
    check_pause(saver, "many");
    for (size_t i = 0; i < COUNT; i += 2) {
        CHECK_OK(tms_saver_free_memory(saver, memory[i]));
    }
}

static void refused_sizes(const tms_saver_t *saver)
{
    tms_region_options_t region = check_region("sizes", NULL);
    void *memory = NULL;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_malloc(saver, 0, -1, &region, &memory));
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_malloc(saver, SIZE_MAX, -1, &region, &memory));
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_malloc(saver, 4096, 1000, &region, &memory));
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_malloc(saver, 4096, -2, &region, &memory));
    CHECK(memory == NULL);
    int local = 0;
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_free_memory(saver, &local));
    memory = check_malloc(saver, 1 << 20, "sizes", NULL, 1);
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_free_memory(saver, (uint8_t *)memory + 8));
    CHECK_OK(tms_saver_free_memory(saver, memory));
}

int main(void)
{
    check_begin();
    tms_saver_t *saver = check_saver();
    static const char *const backups[] = {"pinned", "mmap", "file"};
    for (size_t i = 0; i < 3; i++) {
        backup_keeps_bytes(saver, backups[i]);
        free_while_paused(saver, backups[i]);
    }
    none_discards(saver);
    options_override_the_region(saver);
    tags_select(saver);
    twice_is_once(saver);
    pointer_while_paused(saver, "pinned");
    pointer_while_paused(saver, "mmap");
    retained(saver, "pinned");
    retained(saver, "mmap");
    refused_sizes(saver);
    many_sizes(saver);
    CHECK_OK(tms_saver_free(saver));
    return 0;
}
