/* Pinned host memory: made ahead of need, found by the next pause, kept, trimmed, limited, counted. */
#include "check.h"

#define MIB ((uint64_t)1 << 20)

static tms_pinned_stats_t pinned_stats(const tms_saver_t *saver)
{
    tms_pinned_stats_t stats;
    memset(&stats, 0xA5, sizeof stats);
    stats.struct_size = (uint32_t)sizeof stats;
    CHECK_OK(tms_saver_pinned_stats(saver, &stats));
    CHECK(stats.struct_size == sizeof stats);
    CHECK(stats.used_bytes + stats.idle_bytes + stats.adopted_bytes == stats.pinned_bytes);
    CHECK(stats.huge_page_bytes + stats.small_page_bytes == stats.pinned_bytes);
    CHECK(stats.high_water_bytes >= stats.pinned_bytes);
    CHECK(stats.adopted_bytes == 0);
    return stats;
}

static void the_next_pause_finds_it(const tms_saver_t *saver)
{
    CHECK(pinned_stats(saver).pinned_bytes == 0);
    CHECK_OK(tms_saver_prewarm(saver, -1, 40 * MIB));
    tms_pinned_stats_t before = pinned_stats(saver);
    CHECK(before.idle_bytes == 40 * MIB && before.used_bytes == 0);
    CHECK(before.keep_bytes == 40 * MIB && before.chunk_count == 1);

    void *memory = check_malloc(saver, 24 * MIB, "warm", "pinned", 1);
    check_pause(saver, "warm");
    /* Neither on the way there nor now is more pinned than before. */
    tms_pinned_stats_t paused = pinned_stats(saver);
    CHECK(paused.pinned_bytes == 40 * MIB && paused.used_bytes >= 24 * MIB);
    CHECK(paused.high_water_bytes == 40 * MIB);
    check_resume(saver, "warm");
    CHECK_KEPT(memory, 24 * MIB, 1);
    /* Kept, although TMS_PINNED_KEEP is 0. */
    CHECK(pinned_stats(saver).idle_bytes == 40 * MIB);

    check_pause(saver, "warm");
    uint64_t released = 77;
    CHECK_OK(tms_saver_trim(saver, 0, &released));
    CHECK(released == 0);
    check_resume(saver, "warm");
    CHECK_KEPT(memory, 24 * MIB, 1);
    CHECK_OK(tms_saver_free_memory(saver, memory));
    CHECK(pinned_stats(saver).keep_bytes == 0);
    CHECK_OK(tms_saver_trim(saver, 0, NULL));
    /* What is given back in the background is gone soon. */
    while (pinned_stats(saver).pinned_bytes > 0) {
        check_sleep_ms(1);
    }
}

static void as_an_operation(const tms_saver_t *saver)
{
    tms_op_t *op = NULL;
    CHECK_OK(tms_saver_prewarm_async(saver, 0, 6 * MIB, &op));
    CHECK_OK(tms_op_wait(op, TMS_WAIT_FOREVER));
    uint64_t done = 0;
    uint64_t total = 0;
    CHECK_OK(tms_op_progress(op, &done, &total));
    CHECK(done == 6 * MIB && total == 6 * MIB);
    tms_result_t result = check_result();
    CHECK_OK(tms_op_result(op, &result));
    CHECK(result.done_count == 0 && result.copied_bytes == 0);
    CHECK_OK(tms_op_free(op));
    CHECK(pinned_stats(saver).idle_bytes == 6 * MIB);
    uint64_t released = 0;
    CHECK_OK(tms_saver_trim(saver, 6 * MIB, &released));
    CHECK(released == 0);
    CHECK_OK(tms_saver_trim(saver, 6 * MIB - 1, &released));
    CHECK(released == 6 * MIB);
    CHECK(pinned_stats(saver).pinned_bytes == 0);
    /* From now on that is what a prewarm keeps. */
    CHECK(pinned_stats(saver).keep_bytes == 6 * MIB - 1);
    CHECK_OK(tms_saver_trim(saver, 0, NULL));
    CHECK(pinned_stats(saver).keep_bytes == 0);
}

static void limits_are_reported(const tms_saver_t *saver)
{
    CHECK(pinned_stats(saver).limit_bytes == 64 * MIB);
    CHECK_STATUS(TMS_ERR_OUT_OF_HOST_MEMORY, tms_saver_prewarm(saver, -1, 65 * MIB));
    CHECK(strstr(tms_last_error_message(), "TMS_PINNED_LIMIT") != NULL);
    CHECK(pinned_stats(saver).pinned_bytes == 0 && pinned_stats(saver).keep_bytes == 0);
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_prewarm(saver, -1, 0));
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_prewarm(saver, 99, MIB));
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_prewarm(saver, -1, UINT64_MAX));
    tms_op_t *op = NULL;
    CHECK_OK(tms_saver_prewarm_async(saver, -1, 65 * MIB, &op));
    CHECK_STATUS(TMS_ERR_OUT_OF_HOST_MEMORY, tms_op_wait(op, TMS_WAIT_FOREVER));
    CHECK_OK(tms_op_free(op));

    /* A pause that would exceed the limit changes nothing. */
    void *memory = check_malloc(saver, 65 * MIB, "large", "pinned", 2);
    CHECK_STATUS(TMS_ERR_OUT_OF_HOST_MEMORY, tms_saver_pause(saver, NULL, NULL));
    CHECK(check_query(saver, memory).state == TMS_STATE_ACTIVE);
    CHECK_KEPT(memory, 65 * MIB, 2);
    CHECK_OK(tms_saver_free_memory(saver, memory));
}

static void structs_may_be_smaller(const tms_saver_t *saver)
{
    tms_pinned_stats_t stats;
    memset(&stats, 0xA5, sizeof stats);
    stats.struct_size = offsetof(tms_pinned_stats_t, used_bytes);
    CHECK_OK(tms_saver_pinned_stats(saver, &stats));
    CHECK(stats.pinned_bytes == 0 && stats.used_bytes == 0xA5A5A5A5A5A5A5A5u);
    stats.struct_size = 4;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_pinned_stats(saver, &stats));
}

int main(void)
{
    check_begin();
    setenv("TMS_PINNED_LIMIT", "64M", 1);
    setenv("TMS_PINNED_KEEP", "0", 1);
    tms_saver_t *saver = check_saver();
    the_next_pause_finds_it(saver);
    as_an_operation(saver);
    limits_are_reported(saver);
    structs_may_be_smaller(saver);
    CHECK_OK(tms_saver_free(saver));
    return 0;
}
