/* A process that ends while an operation runs ends with its own code, without a hang, at whatever
 * point the operation is. */
#include "exit.h"

#define SIZE ((size_t)32 << 20)

static unsigned wait_ms;
static const char *backup;

static void leave_while_pausing(void)
{
    check_time_limit(20);
    tms_saver_t *saver = check_saver();
    exit_malloc(saver, SIZE, backup, 1);
    tms_op_t *op = NULL;
    CHECK_OK(tms_saver_pause_async(saver, NULL, &op));
    check_sleep_ms(wait_ms);
    exit(0);
}

static void leave_while_resuming(void)
{
    check_time_limit(20);
    tms_saver_t *saver = check_saver();
    exit_malloc(saver, SIZE, backup, 1);
    check_pause(saver, NULL);
    tms_op_t *op = NULL;
    CHECK_OK(tms_saver_resume_async(saver, NULL, &op));
    check_sleep_ms(wait_ms);
    exit(0);
}

/* The operation waits a minute for memory that nobody releases. */
static void leave_while_waiting(void)
{
    check_time_limit(20);
    setenv("TMS_HOST_DEVICE_MEMORY", "48M", 1);
    setenv("TMS_DEVICE", "host", 1);
    tms_saver_t *saver = check_saver();
    exit_malloc(saver, SIZE, backup, 1);
    check_pause(saver, NULL);
    exit_malloc(saver, SIZE, "none", 1);
    tms_resume_options_t options = check_resume_options(NULL, 0);
    options.wait_ms = 60000;
    tms_op_t *op = NULL;
    CHECK_OK(tms_saver_resume_async(saver, &options, &op));
    check_sleep_ms(wait_ms);
    exit(0);
}

int main(void)
{
    exit_begin();
    static const char *const backups[] = {"pinned", "mmap", "file"};
    for (unsigned i = 0; i < check_iterations(6); i++) {
        backup = backups[i % 3];
        wait_ms = i * 3 % 20;
        CHECK(check_in_child(leave_while_pausing) == 0);
        CHECK(check_in_child(leave_while_resuming) == 0);
        CHECK(check_in_child(leave_while_waiting) == 0);
        CHECK(exit_backup_files() == 0);
    }
    exit_end();
    return 0;
}
