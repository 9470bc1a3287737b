/* Asking too early: a wait that times out and a result that is not there yet are told apart from
 * the operation's own status. */
#include "check.h"

int main(void)
{
    check_begin();
    setenv("TMS_HOST_DEVICE_MEMORY", "32M", 1);
    setenv("TMS_DEVICE", "host", 1);
    tms_saver_t *saver = check_saver();
    void *memory = check_malloc(saver, (size_t)20 << 20, "first", "mmap", 1);
    check_pause(saver, "first");
    void *other = check_malloc(saver, (size_t)20 << 20, "second", "mmap", 2);

    /* This resume waits for memory until some is freed below. */
    const char *tag = "first";
    tms_resume_options_t options = check_resume_options(&tag, 1);
    options.wait_ms = 60000;
    tms_op_t *op = NULL;
    CHECK_OK(tms_saver_resume_async(saver, &options, &op));
    CHECK_STATUS(TMS_ERR_TIMEOUT, tms_op_wait(op, 0));
    CHECK_STATUS(TMS_ERR_TIMEOUT, tms_op_wait(op, 20));
    int32_t done = 1;
    CHECK_OK(tms_op_poll(op, &done));
    CHECK(done == 0);
    tms_result_t result = check_result();
    CHECK_STATUS(TMS_ERR_TIMEOUT, tms_op_result(op, &result));
    CHECK_STATUS(TMS_ERR_BUSY, tms_saver_free(saver));

    CHECK_OK(tms_saver_free_memory(saver, other));
    CHECK_OK(tms_op_wait(op, 60000));
    CHECK_KEPT(memory, (size_t)20 << 20, 1);
    CHECK_OK(tms_op_free(op));

    /* An operation that fails: its status, again and again, and a message on the asking thread. */
    check_pause(saver, "first");
    other = check_malloc(saver, (size_t)20 << 20, "second", "mmap", 2);
    options.wait_ms = 0;
    CHECK_OK(tms_saver_resume_async(saver, &options, &op));
    CHECK_STATUS(TMS_ERR_OUT_OF_DEVICE_MEMORY, tms_op_wait(op, 60000));
    CHECK(strstr(tms_last_error_message(), "first") != NULL);
    CHECK_STATUS(TMS_ERR_OUT_OF_DEVICE_MEMORY, tms_op_wait(op, 0));
    result = check_result();
    CHECK_STATUS(TMS_ERR_OUT_OF_DEVICE_MEMORY, tms_op_result(op, &result));
    CHECK(result.done_count == 0);
    CHECK_OK(tms_op_free(op));
    CHECK_OK(tms_saver_free(saver));
    return 0;
}
