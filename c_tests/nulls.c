/* Every function with NULL for every pointer, one at a time: a status or the documented meaning,
 * never a crash; nothing is written on failure. */
#include "check.h"
#include "memcache.h"

#define MARK ((void *)(uintptr_t)0x5A5A)

static void saver_functions(tms_saver_t *saver, void *memory)
{
    tms_saver_t *out_saver = (tms_saver_t *)MARK;
    void *out = MARK;
    int32_t number = 77;
    uint64_t bytes = 77;
    size_t count = 77;
    tms_region_options_t region = check_region("nulls", NULL);
    tms_allocation_info_t info;
    memset(&info, 0, sizeof info);
    info.struct_size = (uint32_t)sizeof info;

    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_create(NULL, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_default(NULL));
    CHECK_OK(tms_saver_free(NULL));

    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_malloc(NULL, 4096, -1, &region, &out));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_malloc(saver, 4096, -1, &region, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_free_memory(NULL, memory));
    CHECK_OK(tms_saver_free_memory(saver, NULL));

    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_pause(NULL, NULL, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_resume(NULL, NULL, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_pause_async(saver, NULL, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_resume_async(saver, NULL, NULL));
    tms_op_t *op = (tms_op_t *)MARK;
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_pause_async(NULL, NULL, &op));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_resume_async(NULL, NULL, &op));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_resume_ordered_async(NULL, &memory, 1, NULL, &op));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_resume_ordered_async(saver, NULL, 1, NULL, &op));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_resume_ordered_async(saver, &memory, 1, NULL, NULL));
    void *nowhere = NULL;
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_resume_ordered_async(saver, &nowhere, 1, NULL, &op));
    CHECK(op == MARK);

    tms_pause_options_t pause = check_pause_options(NULL, 1);
    tms_resume_options_t resume = check_resume_options(NULL, 1);
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_pause(saver, &pause, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_resume(saver, &resume, NULL));
    const char *none[] = {"nulls", NULL};
    pause = check_pause_options(none, 2);
    resume = check_resume_options(none, 2);
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_pause(saver, &pause, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_resume(saver, &resume, NULL));
    CHECK(check_query(saver, memory).state == TMS_STATE_ACTIVE);

    /* Room for failures without the room: the list is not wanted. */
    tms_result_t result = check_result();
    result.failures_capacity = 4;
    CHECK_OK(tms_saver_pause(saver, NULL, &result));
    CHECK(result.done_count == 1 && result.failures == NULL);
    CHECK_OK(tms_saver_resume(saver, NULL, NULL));

    tms_stats_t entry;
    memset(&entry, 0, sizeof entry);
    entry.struct_size = (uint32_t)sizeof entry;
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_stats(NULL, &entry, 1, &count));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_stats(saver, NULL, 1, &count));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_stats(saver, &entry, 1, NULL));
    CHECK(count == 77);
    CHECK_OK(tms_saver_stats(saver, NULL, 0, &count));
    CHECK(count == 1);

    /* NULL as an address to look up is an address like any other: in no allocation. */
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_query(NULL, memory, &info));
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_query(saver, NULL, &info));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_query(saver, memory, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_backup_pointer(NULL, memory, 8, &out));
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_backup_pointer(saver, NULL, 8, &out));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_backup_pointer(saver, memory, 8, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_set_memory_margin(NULL, -1, 0));
    tms_pinned_stats_t pinned;
    memset(&pinned, 0, sizeof pinned);
    pinned.struct_size = (uint32_t)sizeof pinned;
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_prewarm(NULL, -1, 4096));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_prewarm_async(NULL, -1, 4096, &op));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_prewarm_async(saver, -1, 4096, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_trim(NULL, 0, &bytes));
    CHECK_OK(tms_saver_trim(saver, UINT64_MAX, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_pinned_stats(NULL, &pinned));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_pinned_stats(saver, NULL));
    CHECK(op == MARK);

    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_export(NULL, memory, &number, &bytes));
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_export(saver, NULL, &number, &bytes));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_saver_export(saver, memory, NULL, &bytes));

    CHECK(out_saver == (tms_saver_t *)MARK && out == MARK && number == 77 && bytes == 77);
}

static void operation_functions(tms_saver_t *saver)
{
    tms_op_t *op = NULL;
    int32_t number = 77;
    uint64_t done = 77;
    uint64_t total = 77;
    tms_result_t result = check_result();

    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_poll(NULL, &number));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_wait(NULL, 0));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_progress(NULL, &done, &total));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_result(NULL, &result));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_eventfd(NULL, &number));
    CHECK_OK(tms_op_free(NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_stream_wait(NULL, &number, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_ready(NULL, &done, &number));
    CHECK(number == 77 && done == 77 && total == 77);

    CHECK_OK(tms_saver_pause_async(saver, NULL, &op));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_poll(op, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_eventfd(op, NULL));
    CHECK_OK(tms_op_wait(op, 60000));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_result(op, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_progress(op, NULL, &total));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_progress(op, &done, NULL));
    CHECK(done == 77 && total == 77);
    CHECK_OK(tms_op_free(op));
    CHECK_OK(tms_saver_resume(saver, NULL, NULL));

    /* No allocations to resume need no array. */
    CHECK_OK(tms_saver_resume_ordered_async(saver, NULL, 0, NULL, &op));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_ready(op, &done, NULL));
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_op_ready(op, NULL, &number));
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_op_stream_wait(op, NULL, NULL));
    CHECK_OK(tms_op_wait(op, 60000));
    CHECK_OK(tms_op_free(op));
    CHECK(number == 77);
}

static void copy_functions(void *memory)
{
    char host[64] = {0};
    tms_transfer_engine_t *engine = (tms_transfer_engine_t *)MARK;
    tms_op_t *op = (tms_op_t *)MARK;
    tms_copy_t copy = {memory, NULL, 8};
    tms_pointer_info_t info;
    memset(&info, 0, sizeof info);
    info.struct_size = (uint32_t)sizeof info;

    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_transfer_engine_create(NULL, NULL));
    CHECK_OK(tms_transfer_engine_free(NULL));
    CHECK_OK(tms_pointer_query(NULL, NULL, &info));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_pointer_query(NULL, memory, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_transfer_table_get(NULL, 0, NULL, 8, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_transfer_table_set(NULL, 0, NULL));

#define NULLS(function)                                                                            \
    do {                                                                                           \
        CHECK_STATUS(TMS_ERR_NULL_POINTER, function(NULL, NULL, host, 8, NULL));                   \
        CHECK_STATUS(TMS_ERR_NULL_POINTER, function(NULL, memory, NULL, 8, NULL));                 \
        CHECK_OK(function(NULL, NULL, NULL, 0, NULL));                                             \
        CHECK_STATUS(TMS_ERR_NULL_POINTER, function##_on_stream(NULL, NULL, host, 8, NULL));       \
        CHECK_STATUS(TMS_ERR_NULL_POINTER, function##_on_stream(NULL, memory, NULL, 8, NULL));     \
        CHECK_OK(function##_on_stream(NULL, NULL, NULL, 0, NULL));                                 \
        CHECK_STATUS(TMS_ERR_NULL_POINTER, function##_async(NULL, memory, host, 8, NULL));         \
    } while (0)
    NULLS(tms_memcpy);
    NULLS(tms_memcpy_h2d);
    NULLS(tms_memcpy_d2h);
    NULLS(tms_memcpy_d2d);
#undef NULLS

    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_memcpy_batch(NULL, NULL, 1, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_memcpy_batch(NULL, &copy, 1, NULL));
    CHECK_OK(tms_memcpy_batch(NULL, NULL, 0, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_memcpy_batch_on_stream(NULL, NULL, 1, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_memcpy_batch_async(NULL, NULL, 1, &op));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_memcpy_batch_async(NULL, &copy, 1, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_memcpy_2d(NULL, NULL, 8, host, 8, 8, 2, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_memcpy_2d(NULL, memory, 8, NULL, 8, 8, 2, NULL));
    CHECK_OK(tms_memcpy_2d(NULL, NULL, 8, NULL, 8, 8, 0, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_memcpy_2d_on_stream(NULL, NULL, 8, host, 8, 8, 2, NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_memcpy_2d_async(NULL, memory, 8, host, 8, 8, 2, NULL));
    CHECK(engine == MARK && op == MARK);
}

static void other_functions(void)
{
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_device_count(NULL));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_device_info(0, NULL));
    CHECK_OK(tms_log_set_callback(NULL, NULL, 1));
    CHECK_OK(memcache_log_set_callback(NULL, NULL, 1));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_region_push(NULL));
    CHECK(!tms_get_interesting_region());
}

static void compatible_functions(void)
{
    tms_set_current_tag(NULL);
    CHECK(strcmp(tms_get_current_tag(), "default") == 0);
    tms_set_cpu_backup_backend(NULL);
    CHECK(strcmp(tms_get_cpu_backup_backend(), "pinned") == 0);
    tms_set_disk_backup_dir(NULL);
    CHECK(tms_get_cpu_backup_pointer(NULL, 8) == NULL);
    CHECK(tms_pause(NULL) == 0);
    CHECK(tms_resume(NULL) == 0);
    tms_torch_free(NULL, 0, 0, NULL);
    CHECK(tms_hook_malloc(NULL, 4096, -1) == TMS_ERR_NULL_POINTER);
    CHECK(tms_hook_free(NULL, NULL) == TMS_ERR_NOT_FOUND);
    CHECK(!tms_hook_is_pinned(NULL));
}

int main(void)
{
    check_begin();
    tms_saver_t *saver = check_saver();
    void *memory = check_malloc(saver, 1 << 20, "nulls", "pinned", 1);
    saver_functions(saver, memory);
    operation_functions(saver);
    copy_functions(memory);
    other_functions();
    compatible_functions();
    CHECK_KEPT(memory, 1 << 20, 1);
    CHECK_OK(tms_saver_free_memory(saver, memory));
    CHECK_OK(tms_saver_free(saver));
    return 0;
}
