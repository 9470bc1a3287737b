/* What the C tests share. A test is a program that ends with 0 if everything holds; the first check
 * that does not hold ends it with 1 and says where.
 *
 * Tests write to device memory through its address, so they run on the host device, or on a CUDA
 * driver whose memory the host can reach (c_tests/fakecuda). TMS_DEVICE chooses; unset means host. */
#ifndef CHECK_H
#define CHECK_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tms.h"

#define UNUSED __attribute__((unused))

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            check_failed(__FILE__, __LINE__, #condition);                                          \
        }                                                                                          \
    } while (0)

/* The status of a call. */
#define CHECK_STATUS(expected, call) check_status(__FILE__, __LINE__, #call, (expected), (call))
#define CHECK_OK(call) CHECK_STATUS(TMS_OK, call)

static UNUSED void check_failed(const char *file, int line, const char *what)
{
    fprintf(stderr, "%s:%d: does not hold: %s\n  last error: \"%s\"\n", file, line, what,
            tms_last_error_message());
    fflush(NULL);
    _exit(1);
}

static UNUSED void check_status(const char *file, int line, const char *call, int32_t expected,
                                int32_t found)
{
    if (found != expected) {
        fprintf(stderr, "%s:%d: %s\n  returned %d (%s), expected %d (%s)\n  last error: \"%s\"\n",
                file, line, call, (int)found, tms_status_str(found), (int)expected,
                tms_status_str(expected), tms_last_error_message());
        fflush(NULL);
        _exit(1);
    }
}

/* Ends the test with a signal, so that a hang is a failure. Valgrind needs the longer time. */
static UNUSED void check_time_limit(unsigned seconds)
{
    const char *factor = getenv("TMS_TEST_SLOWDOWN");
    unsigned times = factor != NULL ? (unsigned)atoi(factor) : 1;
    alarm(seconds * (times > 0 ? times : 1));
}

/* How often a test that looks for races repeats itself. */
static UNUSED unsigned check_iterations(unsigned usual)
{
    const char *factor = getenv("TMS_TEST_ITERATIONS");
    unsigned times = factor != NULL ? (unsigned)atoi(factor) : 1;
    return usual * (times > 0 ? times : 1);
}

/* First line of every test. */
static UNUSED void check_begin(void)
{
    setenv("TMS_DEVICE", "host", 0);
    check_time_limit(120);
}

static UNUSED void check_sleep_ms(unsigned milliseconds)
{
    struct timespec time = {(time_t)(milliseconds / 1000), (long)(milliseconds % 1000) * 1000000};
    while (nanosleep(&time, &time) != 0 && errno == EINTR) {
    }
}

/* Fills memory with words that depend on `seed` and on their place. `bytes` in multiples of 8. */
static UNUSED void check_fill(void *memory, size_t bytes, uint64_t seed)
{
    uint64_t *words = (uint64_t *)memory;
    for (size_t i = 0; i < bytes / 8; i++) {
        words[i] = (seed + 1) * 0x9E3779B97F4A7C15u + i * 0xD1342543DE82EF95u;
    }
}

/* Number of words that are as check_fill left them. */
static UNUSED size_t check_kept_words(const void *memory, size_t bytes, uint64_t seed)
{
    const uint64_t *words = (const uint64_t *)memory;
    size_t kept = 0;
    for (size_t i = 0; i < bytes / 8; i++) {
        kept += words[i] == (seed + 1) * 0x9E3779B97F4A7C15u + i * 0xD1342543DE82EF95u;
    }
    return kept;
}

#define CHECK_KEPT(memory, bytes, seed)                                                            \
    CHECK(check_kept_words((memory), (bytes), (seed)) == (bytes) / 8)
#define CHECK_GONE(memory, bytes, seed) CHECK(check_kept_words((memory), (bytes), (seed)) == 0)

static UNUSED tms_saver_t *check_saver(void)
{
    tms_saver_t *saver = NULL;
    CHECK_OK(tms_saver_create(NULL, &saver));
    CHECK(saver != NULL);
    return saver;
}

static UNUSED tms_region_options_t check_region(const char *tag, const char *backup)
{
    tms_region_options_t options;
    memset(&options, 0, sizeof options);
    options.struct_size = (uint32_t)sizeof options;
    options.tag = tag;
    options.backup = backup;
    return options;
}

/* Memory in a region, filled with the pattern of `seed`. */
static UNUSED void *check_malloc(const tms_saver_t *saver, size_t bytes, const char *tag,
                                 const char *backup, uint64_t seed)
{
    tms_region_options_t options = check_region(tag, backup);
    void *memory = NULL;
    CHECK_OK(tms_saver_malloc(saver, bytes, -1, &options, &memory));
    CHECK(memory != NULL);
    check_fill(memory, bytes, seed);
    return memory;
}

static UNUSED tms_pause_options_t check_pause_options(const char *const *tags, size_t count)
{
    tms_pause_options_t options;
    memset(&options, 0, sizeof options);
    options.struct_size = (uint32_t)sizeof options;
    options.tags = tags;
    options.tag_count = count;
    return options;
}

static UNUSED tms_resume_options_t check_resume_options(const char *const *tags, size_t count)
{
    tms_resume_options_t options;
    memset(&options, 0, sizeof options);
    options.struct_size = (uint32_t)sizeof options;
    options.tags = tags;
    options.tag_count = count;
    return options;
}

static UNUSED tms_result_t check_result(void)
{
    tms_result_t result;
    memset(&result, 0, sizeof result);
    result.struct_size = (uint32_t)sizeof result;
    return result;
}

/* Pauses or resumes what has `tag` (NULL: everything). */
static UNUSED tms_result_t check_pause(const tms_saver_t *saver, const char *tag)
{
    tms_pause_options_t options = check_pause_options(&tag, tag != NULL);
    tms_result_t result = check_result();
    CHECK_OK(tms_saver_pause(saver, &options, &result));
    return result;
}

static UNUSED tms_result_t check_resume(const tms_saver_t *saver, const char *tag)
{
    tms_resume_options_t options = check_resume_options(&tag, tag != NULL);
    tms_result_t result = check_result();
    CHECK_OK(tms_saver_resume(saver, &options, &result));
    return result;
}

static UNUSED tms_allocation_info_t check_query(const tms_saver_t *saver, const void *memory)
{
    tms_allocation_info_t info;
    memset(&info, 0, sizeof info);
    info.struct_size = (uint32_t)sizeof info;
    CHECK_OK(tms_saver_query(saver, memory, &info));
    return info;
}

static UNUSED tms_device_info_t check_device_info(int32_t device)
{
    tms_device_info_t info;
    memset(&info, 0, sizeof info);
    info.struct_size = (uint32_t)sizeof info;
    CHECK_OK(tms_device_info(device, &info));
    return info;
}

/* Runs `body` in a forked child and returns the child's exit code, -1 if a signal ended it. */
static UNUSED int check_in_child(void (*body)(void))
{
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        body();
        exit(0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#endif
