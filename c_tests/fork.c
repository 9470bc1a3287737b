/* After fork the child gets a status from every call and ends with code 0; the parent's memory,
 * backups and threads are unharmed. A child forked before the first use is a process of its own. */
#include "check.h"
#include "memcache.h"

#define SIZE ((size_t)4 << 20)

static tms_saver_t *saver;
static tms_op_t *op;
static void *active;
static void *paused;

static void use_in_child(void)
{
    check_time_limit(20);
    tms_region_options_t region = check_region("child", "pinned");
    tms_saver_t *other = NULL;
    tms_op_t *other_op = NULL;
    void *memory = NULL;
    size_t count = 0;
    uint32_t devices = 0;
    int32_t fd = -1;
    int32_t done = 0;
    uint64_t bytes = 0;
    tms_result_t result = check_result();
    tms_device_info_t device;
    memset(&device, 0, sizeof device);
    device.struct_size = (uint32_t)sizeof device;
    tms_allocation_info_t info;
    memset(&info, 0, sizeof info);
    info.struct_size = (uint32_t)sizeof info;
    const tms_saver_t *process_wide = NULL;

    CHECK_STATUS(TMS_ERR_FORKED, tms_device_count(&devices));
    CHECK_STATUS(TMS_ERR_FORKED, tms_device_info(0, &device));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_create(NULL, &other));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_default(&process_wide));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_malloc(saver, SIZE, -1, &region, &memory));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_free_memory(saver, active));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_free_memory(saver, paused));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_pause(saver, NULL, &result));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_resume(saver, NULL, &result));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_pause_async(saver, NULL, &other_op));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_resume_async(saver, NULL, &other_op));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_stats(saver, NULL, 0, &count));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_query(saver, active, &info));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_backup_pointer(saver, paused, 8, &memory));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_set_memory_margin(saver, -1, 0));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_export(saver, active, &fd, &bytes));
    char host[64];
    tms_transfer_engine_t *engine = NULL;
    CHECK_STATUS(TMS_ERR_FORKED, tms_transfer_engine_create(NULL, &engine));
    CHECK_STATUS(TMS_ERR_FORKED, tms_memcpy(NULL, host, active, 64, &bytes));
    CHECK_STATUS(TMS_ERR_FORKED, tms_memcpy_on_stream(NULL, host, active, 64, NULL));
    CHECK_STATUS(TMS_ERR_FORKED, tms_memcpy_async(NULL, host, active, 64, &other_op));
    CHECK_STATUS(TMS_ERR_FORKED, tms_memcpy_2d(NULL, host, 8, active, 8, 8, 8, &bytes));
    CHECK_STATUS(TMS_ERR_FORKED, tms_transfer_table_set(NULL, 0, "h2d:max=plain"));
    CHECK(engine == NULL && bytes == 0);
    CHECK_STATUS(TMS_ERR_FORKED, tms_op_wait(op, 1000));
    CHECK_OK(tms_op_poll(op, &done));
    CHECK_STATUS(TMS_ERR_FORKED, tms_saver_free(saver));
    CHECK(strstr(tms_last_error_message(), "fork") != NULL);
    CHECK(memory == NULL && other == NULL && other_op == NULL && process_wide == NULL);

    CHECK(tms_pause(NULL) != 0);
    CHECK(tms_resume(NULL) != 0);
    CHECK(tms_torch_malloc((ptrdiff_t)SIZE, 0, NULL) == NULL);
    tms_torch_free(active, (ptrdiff_t)SIZE, 0, NULL);
    CHECK(tms_get_cpu_backup_pointer(paused, 8) == NULL);

    /* What needs no state works. */
    CHECK(tms_abi_version() == TMS_ABI_VERSION);
    CHECK(tms_status_str(TMS_ERR_FORKED) != NULL);
    CHECK(memcache_version() != NULL);
    tms_set_current_tag("child");
    CHECK(strcmp(tms_get_current_tag(), "child") == 0);
}

static void use_and_leave_at_once(void)
{
    use_in_child();
    _exit(0);
}

static void use_alone(void)
{
    check_time_limit(20);
    tms_saver_t *own = check_saver();
    void *memory = check_malloc(own, SIZE, "own", "file", 9);
    check_pause(own, NULL);
    check_resume(own, NULL);
    CHECK_KEPT(memory, SIZE, 9);
    CHECK_OK(tms_saver_free(own));
}

static void parent_is_unharmed(void)
{
    CHECK_KEPT(active, SIZE, 1);
    CHECK(check_query(saver, paused).state == TMS_STATE_PAUSED);
    check_resume(saver, NULL);
    CHECK_KEPT(paused, SIZE, 2);
    check_pause(saver, NULL);
    check_resume(saver, NULL);
    CHECK_KEPT(active, SIZE, 1);
    CHECK_KEPT(paused, SIZE, 2);
}

int main(void)
{
    check_begin();
    CHECK(check_in_child(use_alone) == 0);

    /* Opens the process-wide saver; without it the compatible names have nothing to refuse. */
    void *of_process = tms_torch_malloc((ptrdiff_t)SIZE, 0, NULL);
    CHECK(of_process != NULL);
    static const char *const backups[] = {"pinned", "mmap", "file"};
    for (size_t i = 0; i < 3; i++) {
        saver = check_saver();
        active = check_malloc(saver, SIZE, "active", backups[i], 1);
        paused = check_malloc(saver, SIZE, "paused", backups[i], 2);
        const char *tag = "paused";
        tms_pause_options_t options = check_pause_options(&tag, 1);
        CHECK_OK(tms_saver_pause_async(saver, &options, &op));
        CHECK_OK(tms_op_wait(op, 60000));
        CHECK(check_in_child(use_in_child) == 0);
        CHECK(check_in_child(use_and_leave_at_once) == 0);
        parent_is_unharmed();
        CHECK_OK(tms_op_free(op));
        CHECK_OK(tms_saver_free(saver));
    }

    /* Forked while an operation runs: the child does not wait for it. */
    saver = check_saver();
    active = check_malloc(saver, SIZE, "active", "pinned", 1);
    paused = check_malloc(saver, SIZE, "paused", "pinned", 2);
    check_pause(saver, "paused");
    for (int i = 0; i < 4; i++) {
        CHECK_OK(tms_saver_resume_async(saver, NULL, &op));
        CHECK(check_in_child(use_in_child) == 0);
        CHECK_OK(tms_op_wait(op, 60000));
        CHECK_OK(tms_op_free(op));
        CHECK_KEPT(paused, SIZE, 2);
        check_pause(saver, "paused");
    }
    parent_is_unharmed();
    tms_torch_free(of_process, (ptrdiff_t)SIZE, 0, NULL);
    return 0;
}
