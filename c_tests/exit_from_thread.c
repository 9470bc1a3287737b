/* A thread calls exit while others pause, resume, allocate and free. */
#include "exit.h"

#define SIZE ((size_t)4 << 20)

static tms_saver_t *saver;
static unsigned wait_ms;

/* Once exit has begun, calls are refused, and what is under way stops in the middle. */
static bool go_on(int32_t status)
{
    CHECK(status == TMS_OK || status == TMS_ERR_SHUTDOWN || status == TMS_ERR_PARTIAL);
    return status == TMS_OK;
}

static void *pause_and_resume(void *unused)
{
    (void)unused;
    for (;;) {
        if (!go_on(tms_saver_pause(saver, NULL, NULL))) {
            return NULL;
        }
        if (!go_on(tms_saver_resume(saver, NULL, NULL))) {
            return NULL;
        }
    }
}

static void *malloc_and_free(void *unused)
{
    (void)unused;
    tms_region_options_t region = check_region("more", "mmap");
    for (;;) {
        void *memory = NULL;
        if (!go_on(tms_saver_malloc(saver, SIZE, -1, &region, &memory))) {
            return NULL;
        }
        if (!go_on(tms_saver_free_memory(saver, memory))) {
            return NULL;
        }
    }
}

static void *leave(void *unused)
{
    (void)unused;
    check_sleep_ms(wait_ms);
    exit(0);
}

static void leave_from_thread(void)
{
    check_time_limit(20);
    saver = check_saver();
    exit_malloc(saver, SIZE, "pinned", 1);
    exit_malloc(saver, SIZE, "mmap", 2);
    exit_malloc(saver, SIZE, "file", 3);
    pthread_t threads[3];
    CHECK(pthread_create(&threads[0], NULL, pause_and_resume, NULL) == 0);
    CHECK(pthread_create(&threads[1], NULL, malloc_and_free, NULL) == 0);
    CHECK(pthread_create(&threads[2], NULL, leave, NULL) == 0);
    for (;;) {
        check_sleep_ms(1000);
    }
}

int main(void)
{
    exit_begin();
    for (unsigned i = 0; i < check_iterations(12); i++) {
        wait_ms = i * 7 % 40;
        CHECK(check_in_child(leave_from_thread) == 0);
        CHECK(exit_backup_files() == 0);
    }
    exit_end();
    return 0;
}
