/* The message of the last error belongs to its thread, names what was wrong, and stays until the
 * thread's next error. */
#include "check.h"
#include "memcache.h"

static tms_saver_t *saver;
static pthread_barrier_t barrier;

static void *other_thread(void *unused)
{
    (void)unused;
    /* The main thread has failed already; this one has not. */
    pthread_barrier_wait(&barrier);
    CHECK(strcmp(tms_last_error_message(), "") == 0);
    tms_region_options_t region = check_region("x", "of the other thread");
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_region_push(&region));
    CHECK(strstr(tms_last_error_message(), "of the other thread") != NULL);
    pthread_barrier_wait(&barrier);
    pthread_barrier_wait(&barrier);
    CHECK(strstr(tms_last_error_message(), "of the other thread") != NULL);
    return NULL;
}

int main(void)
{
    check_begin();
    CHECK(strcmp(tms_last_error_message(), "") == 0);
    saver = check_saver();
    CHECK(strcmp(tms_last_error_message(), "") == 0);
    CHECK(pthread_barrier_init(&barrier, NULL, 2) == 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, other_thread, NULL) == 0);

    tms_region_options_t region = check_region("x", "of the main thread");
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_region_push(&region));
    CHECK(strstr(tms_last_error_message(), "of the main thread") != NULL);
    pthread_barrier_wait(&barrier);
    pthread_barrier_wait(&barrier);
    CHECK(strstr(tms_last_error_message(), "of the main thread") != NULL);
    CHECK(strcmp(tms_last_error_message(), memcache_last_error_message()) == 0);

    /* Success leaves it; the next error replaces it. */
    void *memory = check_malloc(saver, 4096, "x", NULL, 1);
    CHECK(strstr(tms_last_error_message(), "of the main thread") != NULL);
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_free_memory(saver, (void *)(uintptr_t)0x123000));
    CHECK(strstr(tms_last_error_message(), "0x123000") != NULL);
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_device_count(NULL));
    CHECK(strstr(tms_last_error_message(), "count") != NULL);
    CHECK(strchr(tms_last_error_message(), '\n') == NULL);
    pthread_barrier_wait(&barrier);
    CHECK(pthread_join(thread, NULL) == 0);

    /* A failure that changes nothing: all is as before. */
    CHECK_KEPT(memory, 4096, 1);
    CHECK_OK(tms_saver_free_memory(saver, memory));
    CHECK_OK(tms_saver_free(saver));
    pthread_barrier_destroy(&barrier);
    return 0;
}
