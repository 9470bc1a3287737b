/* A process that ends while its memory is paused ends with its own code, without a hang, and leaves
 * no backup behind. */
#include "exit.h"

#define SIZE ((size_t)8 << 20)

static int code;

static void leave_paused(void)
{
    check_time_limit(20);
    tms_saver_t *saver = check_saver();
    exit_malloc(saver, SIZE, "pinned", 1);
    exit_malloc(saver, SIZE, "mmap", 2);
    exit_malloc(saver, SIZE, "file", 3);
    check_pause(saver, NULL);
    CHECK(exit_backup_files() == 1);
    exit(code);
}

static void leave_default_saver_paused(void)
{
    check_time_limit(20);
    tms_set_interesting_region(true);
    tms_set_enable_disk_backup(true);
    tms_set_disk_backup_dir(exit_folder);
    CHECK(tms_torch_malloc((ptrdiff_t)SIZE, 0, NULL) != NULL);
    CHECK(tms_pause(NULL) == 0);
    CHECK(exit_backup_files() == 1);
    exit(code);
}

static void leave_resumed(void)
{
    check_time_limit(20);
    tms_saver_t *saver = check_saver();
    exit_malloc(saver, SIZE, "file", 3);
    check_pause(saver, NULL);
    check_resume(saver, NULL);
    exit(code);
}

static tms_saver_t *left;

/* Destructors of the host may still call. */
static void use_during_exit(void)
{
    int32_t status = tms_saver_pause(left, NULL, NULL);
    if (status != TMS_OK && status != TMS_ERR_SHUTDOWN) {
        _exit(99);
    }
    tms_torch_free((void *)(uintptr_t)4096, 4096, 0, NULL);
}

static void leave_with_handlers(void)
{
    check_time_limit(20);
    atexit(use_during_exit);
    left = check_saver();
    exit_malloc(left, SIZE, "mmap", 3);
    atexit(use_during_exit);
    exit(code);
}

int main(void)
{
    exit_begin();
    for (code = 0; code < 8; code += 7) {
        CHECK(check_in_child(leave_paused) == code);
        CHECK(exit_backup_files() == 0);
        CHECK(check_in_child(leave_default_saver_paused) == code);
        CHECK(exit_backup_files() == 0);
        CHECK(check_in_child(leave_resumed) == code);
        CHECK(exit_backup_files() == 0);
        CHECK(check_in_child(leave_with_handlers) == code);
    }
    exit_end();
    return 0;
}
