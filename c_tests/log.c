/* Log records reach the callback up to its level, on a thread of the library, and never hold up the
 * thread that raised them. */
#include "check.h"
#include "memcache.h"

/* Protects what follows; while a test holds it, the callback hangs. */
static pthread_mutex_t host_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned count_of_level[5];
static char last_message[512];
static bool on_raising_thread;

static pthread_t main_thread;
static int user_data;

static void callback(void *user, int32_t level, const char *target, const char *message)
{
    CHECK(user == &user_data);
    CHECK(level >= TMS_LOG_ERROR && level <= TMS_LOG_DEBUG);
    CHECK(target != NULL && strncmp(target, "tms_memcache", 12) == 0);
    CHECK(message != NULL && message[0] != '\0');
    CHECK(pthread_mutex_lock(&host_lock) == 0);
    count_of_level[level]++;
    snprintf(last_message, sizeof last_message, "%s", message);
    on_raising_thread |= pthread_equal(pthread_self(), main_thread) != 0;
    pthread_mutex_unlock(&host_lock);
}

static unsigned count(int32_t level)
{
    CHECK_OK(tms_log_flush(10000));
    pthread_mutex_lock(&host_lock);
    unsigned found = count_of_level[level];
    pthread_mutex_unlock(&host_lock);
    return found;
}

static void *read_bad_setting(void *unused)
{
    (void)unused;
    CHECK(strcmp(tms_get_cpu_backup_backend(), "pinned") == 0);
    return NULL;
}

/* Every new thread reads its defaults from the environment, where one is wrong. */
static void raise_error(void)
{
    setenv("TMS_INIT_CPU_BACKUP_BACKEND", "nonsense", 1);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, read_bad_setting, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    unsetenv("TMS_INIT_CPU_BACKUP_BACKEND");
}

/* A region in which nothing is allocated is worth a warning, the first time. */
static void raise_warning(void)
{
    tms_region_options_t region = check_region("unused", NULL);
    CHECK_OK(tms_region_push(&region));
    CHECK_OK(tms_region_pop());
}

static void *read_capitals(void *unused)
{
    (void)unused;
    CHECK(strcmp(tms_get_cpu_backup_backend(), "mmap") == 0);
    return NULL;
}

/* Words of the environment are taken in any case of letters. */
static void capitals(void)
{
    setenv("TMS_INIT_CPU_BACKUP_BACKEND", "MMAP", 1);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, read_capitals, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    unsetenv("TMS_INIT_CPU_BACKUP_BACKEND");
}

static void levels(void)
{
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_log_set_callback(callback, &user_data, 0));
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_log_set_callback(callback, &user_data, 5));

    CHECK_OK(tms_log_set_callback(callback, &user_data, TMS_LOG_ERROR));
    raise_error();
    CHECK(count(TMS_LOG_ERROR) == 1);
    CHECK(strstr(last_message, "nonsense") != NULL);
    CHECK(count(TMS_LOG_WARN) == 0);

    CHECK_OK(memcache_log_set_callback(callback, &user_data, TMS_LOG_WARN));
    raise_warning();
    CHECK(count(TMS_LOG_WARN) == 1);
    raise_error();
    CHECK(count(TMS_LOG_ERROR) == 2);
    CHECK(count(TMS_LOG_INFO) == 0 && count(TMS_LOG_DEBUG) == 0);
}

/* The shape of Python's GIL: the host holds a lock that the callback needs, and calls us. */
static void a_hanging_callback_holds_nobody_up(tms_saver_t *saver)
{
    CHECK_OK(tms_log_set_callback(callback, &user_data, TMS_LOG_DEBUG));
    pthread_mutex_lock(&host_lock);
    raise_error();
    CHECK_STATUS(TMS_ERR_TIMEOUT, tms_log_flush(10));
    void *memory = check_malloc(saver, 1 << 20, "log", "pinned", 1);
    check_pause(saver, "log");
    raise_error();
    check_resume(saver, "log");
    CHECK_KEPT(memory, 1 << 20, 1);
    CHECK_OK(tms_saver_free_memory(saver, memory));
    pthread_mutex_unlock(&host_lock);
    CHECK(count(TMS_LOG_ERROR) == 4);
    CHECK(!on_raising_thread);
}

static void removed(void)
{
    CHECK_OK(tms_log_set_callback(NULL, NULL, TMS_LOG_ERROR));
    raise_error();
    check_sleep_ms(20);
    CHECK(count(TMS_LOG_ERROR) == 4);
    /* Set again, it does not deliver what was raised meanwhile. */
    CHECK_OK(tms_log_set_callback(callback, &user_data, TMS_LOG_ERROR));
    CHECK(count(TMS_LOG_ERROR) == 4);
    raise_error();
    CHECK(count(TMS_LOG_ERROR) == 5);
    CHECK_OK(tms_log_set_callback(NULL, NULL, TMS_LOG_ERROR));
}

int main(void)
{
    check_begin();
    main_thread = pthread_self();
    levels();
    capitals();
    tms_saver_t *saver = check_saver();
    a_hanging_callback_holds_nobody_up(saver);
    removed();
    CHECK_OK(tms_saver_free(saver));
    return 0;
}
