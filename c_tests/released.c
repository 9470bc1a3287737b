/* A pause gives the memory back to the system: without a backup, or with one in a file, the
 * resident memory of the process falls. */
#include "check.h"

#define SIZE ((size_t)192 << 20)

static size_t resident_bytes(void)
{
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file != NULL);
    unsigned long total = 0;
    unsigned long resident = 0;
    CHECK(fscanf(file, "%lu %lu", &total, &resident) == 2);
    fclose(file);
    return (size_t)resident * (size_t)sysconf(_SC_PAGESIZE);
}

static void falls_with(const tms_saver_t *saver, const char *backup)
{
    void *memory = check_malloc(saver, SIZE, "large", backup, 1);
    size_t active = resident_bytes();
    check_pause(saver, "large");
    size_t paused = resident_bytes();
    CHECK(active > paused);
    /* Staging buffers may have come into use. */
    CHECK(active - paused > SIZE / 2);
    check_resume(saver, "large");
    CHECK_OK(tms_saver_free_memory(saver, memory));
}

int main(void)
{
    check_begin();
    tms_saver_t *saver = check_saver();
    falls_with(saver, "none");
    falls_with(saver, "file");
    CHECK_OK(tms_saver_free(saver));
    return 0;
}
