/* Operations: poll, wait, eventfd, progress, result; freed while running. */
#include "check.h"

#include <poll.h>

#define SIZE ((size_t)64 << 20)

static tms_op_t *start_pause(const tms_saver_t *saver)
{
    tms_op_t *op = NULL;
    CHECK_OK(tms_saver_pause_async(saver, NULL, &op));
    CHECK(op != NULL);
    return op;
}

static tms_op_t *start_resume(const tms_saver_t *saver)
{
    tms_op_t *op = NULL;
    CHECK_OK(tms_saver_resume_async(saver, NULL, &op));
    CHECK(op != NULL);
    return op;
}

static void wait_and_result(const tms_saver_t *saver, void *memory)
{
    tms_op_t *op = start_pause(saver);
    CHECK_OK(tms_op_wait(op, 60000));
    /* The end can be asked for again and again. */
    CHECK_OK(tms_op_wait(op, 0));
    tms_result_t result = check_result();
    CHECK_OK(tms_op_result(op, &result));
    CHECK(result.done_count == 1 && result.copied_bytes >= SIZE && result.failed_count == 0);
    uint64_t done = 0;
    uint64_t total = 0;
    CHECK_OK(tms_op_progress(op, &done, &total));
    CHECK(done == total && total >= SIZE);
    CHECK(check_query(saver, memory).state == TMS_STATE_PAUSED);
    CHECK_OK(tms_op_free(op));

    op = start_resume(saver);
    CHECK_OK(tms_op_wait(op, UINT64_MAX));
    CHECK_OK(tms_op_free(op));
    CHECK_KEPT(memory, SIZE, 1);
}

static void polling(const tms_saver_t *saver, void *memory)
{
    tms_op_t *op = start_pause(saver);
    int32_t done = 0;
    uint64_t before = 0;
    while (!done) {
        CHECK_OK(tms_op_poll(op, &done));
        uint64_t now = 0;
        uint64_t total = 0;
        CHECK_OK(tms_op_progress(op, &now, &total));
        CHECK(now >= before);
        before = now;
        check_sleep_ms(1);
    }
    CHECK(done == 1);
    CHECK_OK(tms_op_wait(op, 0));
    CHECK_OK(tms_op_free(op));
    check_resume(saver, NULL);
    CHECK_KEPT(memory, SIZE, 1);
}

static void eventfd_becomes_readable(const tms_saver_t *saver, void *memory)
{
    tms_op_t *op = start_pause(saver);
    int32_t fd = -1;
    CHECK_OK(tms_op_eventfd(op, &fd));
    CHECK(fd >= 0);
    for (int again = 0; again < 2; again++) {
        struct pollfd pollfd = {fd, POLLIN, 0};
        CHECK(poll(&pollfd, 1, 60000) == 1);
        CHECK((pollfd.revents & POLLIN) != 0);
    }
    int32_t done = 0;
    CHECK_OK(tms_op_poll(op, &done));
    CHECK(done == 1);
    CHECK_OK(tms_op_wait(op, 0));
    CHECK_OK(tms_op_free(op));
    check_resume(saver, NULL);
    CHECK_KEPT(memory, SIZE, 1);
}

/* Two operations and a call of another kind: each is done, in the order they came. */
static void one_after_the_other(const tms_saver_t *saver, void *memory)
{
    tms_op_t *pause = start_pause(saver);
    tms_op_t *resume = start_resume(saver);
    tms_op_t *again = start_pause(saver);
    CHECK_OK(tms_op_wait(again, 60000));
    CHECK_OK(tms_op_wait(pause, 0));
    CHECK_OK(tms_op_wait(resume, 0));
    tms_op_t *ops[] = {pause, resume, again};
    for (size_t i = 0; i < 3; i++) {
        tms_result_t result = check_result();
        CHECK_OK(tms_op_result(ops[i], &result));
        CHECK(result.done_count == 1);
        CHECK_OK(tms_op_free(ops[i]));
    }
    check_resume(saver, NULL);
    CHECK_KEPT(memory, SIZE, 1);
}

/* Freeing the handle does not stop the operation. */
static void freed_while_running(const tms_saver_t *saver, void *memory)
{
    tms_op_t *op = start_pause(saver);
    CHECK_OK(tms_op_free(op));
    while (check_query(saver, memory).state != TMS_STATE_PAUSED) {
        check_sleep_ms(1);
    }
    op = start_resume(saver);
    CHECK_OK(tms_op_free(op));
    while (check_query(saver, memory).state != TMS_STATE_ACTIVE) {
        check_sleep_ms(1);
    }
    CHECK_KEPT(memory, SIZE, 1);
}

/* Memory that is freed while an operation works on it goes with the operation. */
static void memory_freed_while_running(const tms_saver_t *saver)
{
    tms_stats_t entry;
    size_t count = 1;
    for (int i = 0; i < 4; i++) {
        void *memory = check_malloc(saver, SIZE, "freed", "pinned", 9);
        tms_op_t *op = start_pause(saver);
        check_sleep_ms((unsigned)i * 3);
        CHECK_OK(tms_saver_free_memory(saver, memory));
        CHECK_OK(tms_op_wait(op, 60000));
        CHECK_OK(tms_op_free(op));
        memset(&entry, 0, sizeof entry);
        entry.struct_size = (uint32_t)sizeof entry;
        CHECK_OK(tms_saver_stats(saver, &entry, 1, &count));
        CHECK(count == 0);
    }
}

/* The saver refuses to go while an operation runs, and the failure changes nothing. */
static void saver_in_use(void)
{
    tms_saver_t *saver = check_saver();
    void *memory = check_malloc(saver, SIZE, "busy", "mmap", 2);
    tms_op_t *op = start_pause(saver);
    int32_t status = tms_saver_free(saver);
    if (status == TMS_ERR_BUSY) {
        CHECK_OK(tms_op_wait(op, 60000));
        check_resume(saver, NULL);
        CHECK_KEPT(memory, SIZE, 2);
        status = tms_saver_free(saver);
    }
    CHECK(status == TMS_OK);
    /* An operation outlives its saver. */
    CHECK_OK(tms_op_wait(op, 60000));
    CHECK_OK(tms_op_free(op));
}

/* Who has waited for the last operation can free the saver at once. */
static void saver_not_in_use(void)
{
    for (unsigned i = 0; i < check_iterations(100); i++) {
        tms_saver_t *saver = check_saver();
        check_malloc(saver, 4096, "short", "mmap", 3);
        tms_op_t *op = start_pause(saver);
        CHECK_OK(tms_op_wait(op, 60000));
        CHECK_OK(tms_saver_free(saver));
        CHECK_OK(tms_op_free(op));
    }
}

int main(void)
{
    check_begin();
    tms_saver_t *saver = check_saver();
    void *memory = check_malloc(saver, SIZE, "op", "pinned", 1);
    wait_and_result(saver, memory);
    polling(saver, memory);
    eventfd_becomes_readable(saver, memory);
    one_after_the_other(saver, memory);
    freed_while_running(saver, memory);
    CHECK_OK(tms_saver_free_memory(saver, memory));
    memory_freed_while_running(saver);
    CHECK_OK(tms_saver_free(saver));
    saver_in_use();
    saver_not_in_use();
    return 0;
}
