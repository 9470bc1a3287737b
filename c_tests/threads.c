/* Many threads allocate, free, pause and resume at once; no byte is lost or mixed up.
 *
 * A pause takes memory away under the feet of threads that use it, so each thread only touches its
 * own tag's memory while it knows it to be active. A tag of its own is paused by its own thread,
 * and calls for all tags come only where every thread stands still. */
#include "check.h"

enum { THREADS = 6, SLOTS = 4, ROUNDS = 12 };

static tms_saver_t *saver;

static const char *const BACKUPS[] = {"pinned", "mmap", "file"};

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void *work(void *argument)
{
    uint64_t number = (uint64_t)(uintptr_t)argument;
    uint64_t random = number * 0x9E3779B97F4A7C15u + 1;
    char tag[32];
    snprintf(tag, sizeof tag, "thread %" PRIu64, number);
    void *memory[SLOTS] = {NULL};
    size_t bytes[SLOTS] = {0};
    uint64_t seed[SLOTS] = {0};

    for (unsigned round = 0; round < check_iterations(ROUNDS); round++) {
        for (size_t slot = 0; slot < SLOTS; slot++) {
            if (memory[slot] != NULL && next(&random) % 3 == 0) {
                CHECK_KEPT(memory[slot], bytes[slot], seed[slot]);
                CHECK_OK(tms_saver_free_memory(saver, memory[slot]));
                memory[slot] = NULL;
            }
            if (memory[slot] == NULL) {
                bytes[slot] = (size_t)(next(&random) % (3 << 20) + 8) & ~(size_t)7;
                seed[slot] = next(&random);
                memory[slot] = check_malloc(saver, bytes[slot], tag, BACKUPS[next(&random) % 3],
                                            seed[slot]);
            }
        }
        check_pause(saver, tag);
        if (next(&random) % 2 == 0) {
            size_t slot = next(&random) % SLOTS;
            CHECK_OK(tms_saver_free_memory(saver, memory[slot]));
            memory[slot] = NULL;
        }
        check_resume(saver, tag);
        for (size_t slot = 0; slot < SLOTS; slot++) {
            if (memory[slot] != NULL) {
                CHECK_KEPT(memory[slot], bytes[slot], seed[slot]);
            }
        }
    }
    for (size_t slot = 0; slot < SLOTS; slot++) {
        if (memory[slot] != NULL) {
            CHECK_OK(tms_saver_free_memory(saver, memory[slot]));
        }
    }
    return NULL;
}

static volatile bool stop;

/* Asks all the time; every answer must be consistent in itself. */
static void *observe(void *unused)
{
    (void)unused;
    while (!stop) {
        tms_stats_t entries[THREADS + 1];
        memset(entries, 0, sizeof entries);
        for (size_t i = 0; i <= THREADS; i++) {
            entries[i].struct_size = (uint32_t)sizeof entries[i];
        }
        size_t count = 0;
        CHECK_OK(tms_saver_stats(saver, entries, THREADS + 1, &count));
        CHECK(count <= THREADS);
        for (size_t i = 0; i < count; i++) {
            CHECK(entries[i].active_count + entries[i].paused_count <= SLOTS);
        }
        check_sleep_ms(1);
    }
    return NULL;
}

/* Pauses and resumes of everything from several threads at once: afterwards, all is back. */
static void *pause_and_resume_all(void *unused)
{
    (void)unused;
    for (unsigned round = 0; round < check_iterations(ROUNDS); round++) {
        check_pause(saver, NULL);
        check_resume(saver, NULL);
    }
    return NULL;
}

static void run(void *(*body)(void *), size_t threads)
{
    pthread_t thread[THREADS];
    for (size_t i = 0; i < threads; i++) {
        CHECK(pthread_create(&thread[i], NULL, body, (void *)(uintptr_t)(i + 1)) == 0);
    }
    for (size_t i = 0; i < threads; i++) {
        CHECK(pthread_join(thread[i], NULL) == 0);
    }
}

int main(void)
{
    check_begin();
    check_time_limit(300 * check_iterations(1));
    saver = check_saver();
    pthread_t observer;
    CHECK(pthread_create(&observer, NULL, observe, NULL) == 0);
    run(work, THREADS);
    stop = true;
    CHECK(pthread_join(observer, NULL) == 0);

    void *memory[SLOTS];
    for (size_t i = 0; i < SLOTS; i++) {
        memory[i] = check_malloc(saver, 1 << 20, "all", BACKUPS[i % 3], i);
    }
    run(pause_and_resume_all, 4);
    check_resume(saver, NULL);
    for (size_t i = 0; i < SLOTS; i++) {
        CHECK_KEPT(memory[i], 1 << 20, i);
    }
    CHECK_OK(tms_saver_free(saver));
    return 0;
}
