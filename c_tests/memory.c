/* Device memory that runs out: malloc and resume fail cleanly, resume can wait for memory that
 * somebody else is about to release, and a margin is left free. */
#include "check.h"

#define MIB ((uint64_t)1 << 20)
#define TOTAL (64 * MIB)
#define MOST (48 * MIB)

struct releasing {
    const tms_saver_t *saver;
    void *memory;
    unsigned after_ms;
};

static void *release_later(void *argument)
{
    const struct releasing *releasing = argument;
    check_sleep_ms(releasing->after_ms);
    CHECK_OK(tms_saver_free_memory(releasing->saver, releasing->memory));
    return NULL;
}

static void *pause_later(void *argument)
{
    const struct releasing *releasing = argument;
    check_sleep_ms(releasing->after_ms);
    check_pause(releasing->saver, "other");
    return NULL;
}

static void malloc_reports_it(const tms_saver_t *saver)
{
    tms_region_options_t region = check_region("large", NULL);
    void *memory = NULL;
    CHECK_STATUS(TMS_ERR_OUT_OF_DEVICE_MEMORY,
                 tms_saver_malloc(saver, (size_t)(TOTAL + MIB), -1, &region, &memory));
    CHECK(memory == NULL);
    CHECK(strstr(tms_last_error_message(), "large") != NULL);
    memory = check_malloc(saver, (size_t)TOTAL, "large", NULL, 1);
    void *more = NULL;
    CHECK_STATUS(TMS_ERR_OUT_OF_DEVICE_MEMORY, tms_saver_malloc(saver, 8, -1, &region, &more));
    check_pause(saver, "large");
    more = check_malloc(saver, 8, "small", NULL, 1);
    CHECK_OK(tms_saver_free_memory(saver, more));
    CHECK_OK(tms_saver_free_memory(saver, memory));
}

static void resume_reports_it_and_waits(const tms_saver_t *saver)
{
    void *memory = check_malloc(saver, MOST, "waiting", "pinned", 5);
    check_pause(saver, "waiting");
    void *other = check_malloc(saver, MOST, "other", "mmap", 6);

    /* At once, and after a short wait: everything stays paused. */
    const char *tag = "waiting";
    tms_resume_options_t options = check_resume_options(&tag, 1);
    for (options.wait_ms = 0; options.wait_ms <= 50; options.wait_ms += 50) {
        tms_result_t result = check_result();
        CHECK_STATUS(TMS_ERR_OUT_OF_DEVICE_MEMORY, tms_saver_resume(saver, &options, &result));
        CHECK(result.done_count == 0);
        CHECK(check_query(saver, memory).state == TMS_STATE_PAUSED);
        CHECK(strstr(tms_last_error_message(), "waiting") != NULL);
    }
    CHECK_KEPT(other, MOST, 6);

    /* Somebody pauses other memory: the waiting resume must not keep it from doing so. */
    struct releasing releasing = {saver, other, 100};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, pause_later, &releasing) == 0);
    options.wait_ms = 60000;
    CHECK_OK(tms_saver_resume(saver, &options, NULL));
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_KEPT(memory, MOST, 5);

    /* Somebody frees other memory, and an operation waits. */
    check_pause(saver, "waiting");
    check_resume(saver, "other");
    CHECK_KEPT(other, MOST, 6);
    tms_op_t *op = NULL;
    CHECK_OK(tms_saver_resume_async(saver, &options, &op));
    CHECK(pthread_create(&thread, NULL, release_later, &releasing) == 0);
    CHECK_OK(tms_op_wait(op, 60000));
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_OK(tms_op_free(op));
    CHECK_KEPT(memory, MOST, 5);
    CHECK_OK(tms_saver_free_memory(saver, memory));
}

static void margin_stays_free(const tms_saver_t *saver)
{
    tms_region_options_t region = check_region("margin", NULL);
    void *memory = NULL;
    CHECK_OK(tms_saver_set_memory_margin(saver, -1, 32 * MIB));
    CHECK_STATUS(TMS_ERR_OUT_OF_DEVICE_MEMORY,
                 tms_saver_malloc(saver, 40 * MIB, -1, &region, &memory));
    memory = check_malloc(saver, 30 * MIB, "margin", NULL, 1);
    CHECK_OK(tms_saver_free_memory(saver, memory));
    CHECK_OK(tms_saver_set_memory_margin(saver, 0, 0));
    memory = check_malloc(saver, 40 * MIB, "margin", NULL, 1);
    CHECK_OK(tms_saver_free_memory(saver, memory));
    CHECK_OK(tms_saver_set_memory_margin(saver, -1, 0));
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_set_memory_margin(saver, -2, 0));
}

int main(void)
{
    check_begin();
    setenv("TMS_HOST_DEVICE_MEMORY", "64M", 1);
    setenv("TMS_DEVICE", "host", 1);
    tms_saver_t *saver = check_saver();
    malloc_reports_it(saver);
    resume_reports_it_and_waits(saver);
    margin_stays_free(saver);
    CHECK_OK(tms_saver_free(saver));
    return 0;
}
