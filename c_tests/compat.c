/* The names that other packages look up, on the process-wide saver: every one is there, and does
 * what the package relies on. */
#include "check.h"

#include <dirent.h>
#include <dlfcn.h>
#include <sys/stat.h>

#define SIZE ((size_t)4 << 20)

static const char *const NAMES[] = {
    "tms_set_current_tag",         "tms_get_current_tag",
    "tms_set_interesting_region",  "tms_get_interesting_region",
    "tms_set_enable_cpu_backup",   "tms_get_enable_cpu_backup",
    "tms_set_cpu_backup_backend",  "tms_get_cpu_backup_backend",
    "tms_set_enable_disk_backup",  "tms_get_enable_disk_backup",
    "tms_set_disk_backup_dir",     "tms_set_retain_cpu_backup",
    "tms_get_retain_cpu_backup",   "tms_pause",
    "tms_resume",                  "tms_get_cpu_backup_pointer",
    "tms_torch_malloc",            "tms_torch_free",
    "tms_set_storage_backend_type", "tms_get_storage_backend_type",
    "tms_set_mooncake_config",
};

/* Only the preload library has these; a host that links this one keeps its own. */
static const char *const ABSENT[] = {
    "cudaMalloc", "cudaFree", "cudaHostGetFlags", "cudaGetLastError", "set_memory_margin_bytes",
    "tms_xpu_pause",
};

static void names(void)
{
    for (size_t i = 0; i < sizeof NAMES / sizeof NAMES[0]; i++) {
        if (dlsym(RTLD_DEFAULT, NAMES[i]) == NULL) {
            fprintf(stderr, "missing: %s\n", NAMES[i]);
            CHECK(false);
        }
    }
    for (size_t i = 0; i < sizeof ABSENT / sizeof ABSENT[0]; i++) {
        CHECK(dlsym(RTLD_DEFAULT, ABSENT[i]) == NULL);
    }
}

static void defaults(void)
{
    CHECK(strcmp(tms_get_current_tag(), "default") == 0);
    CHECK(!tms_get_interesting_region());
    CHECK(!tms_get_enable_cpu_backup());
    CHECK(!tms_get_enable_disk_backup());
    CHECK(!tms_get_retain_cpu_backup());
    CHECK(strcmp(tms_get_cpu_backup_backend(), "pinned") == 0);
}

/* Returned strings stay valid until the same thread sets the value again. */
static void *set_in_other_thread(void *unused)
{
    (void)unused;
    tms_set_current_tag("other");
    tms_set_cpu_backup_backend("mmap");
    return NULL;
}

static void returned_strings(void)
{
    tms_set_current_tag("mine");
    const char *tag = tms_get_current_tag();
    const char *backend = tms_get_cpu_backup_backend();
    tms_set_interesting_region(true);
    tms_set_interesting_region(false);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, set_in_other_thread, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(strcmp(tag, "mine") == 0 && tag == tms_get_current_tag());
    CHECK(strcmp(backend, "pinned") == 0 && backend == tms_get_cpu_backup_backend());
    tms_set_cpu_backup_backend("no such backend");
    CHECK(strcmp(tms_get_cpu_backup_backend(), "pinned") == 0);
    tms_set_current_tag("default");
}

static void *malloc_in_region(const char *tag, uint64_t seed)
{
    tms_set_current_tag(tag);
    tms_set_interesting_region(true);
    void *memory = tms_torch_malloc((ptrdiff_t)SIZE, 0, NULL);
    tms_set_interesting_region(false);
    tms_set_current_tag("default");
    CHECK(memory != NULL);
    check_fill(memory, SIZE, seed);
    return memory;
}

static void host_backups(const char *backend)
{
    tms_set_enable_cpu_backup(true);
    tms_set_cpu_backup_backend(backend);
    uint8_t *memory = malloc_in_region("weights", 1);
    tms_set_enable_cpu_backup(false);
    tms_set_cpu_backup_backend("pinned");
    void *dropped = malloc_in_region("cache", 2);

    for (int cycle = 0; cycle < 2; cycle++) {
        CHECK(tms_get_cpu_backup_pointer(memory, SIZE) == NULL);
        CHECK(tms_pause("weights") == 0);
        uint8_t *backup = tms_get_cpu_backup_pointer(memory, SIZE);
        CHECK(backup != NULL);
        CHECK_KEPT(backup, SIZE, 1);
        CHECK(tms_get_cpu_backup_pointer(memory + 64, 64) == backup + 64);
        /* NULL and "" mean all; what is paused already stays as it is. */
        CHECK(tms_pause(cycle == 0 ? NULL : "") == 0);
        CHECK(tms_get_cpu_backup_pointer(dropped, SIZE) == NULL);
        CHECK(tms_resume("weights") == 0);
        CHECK_KEPT(memory, SIZE, 1);
        CHECK(tms_resume(cycle == 0 ? "" : NULL) == 0);
        CHECK_GONE(dropped, SIZE, 2);
        check_fill(dropped, SIZE, 2);
    }
    CHECK(tms_pause("no such tag") == 0);
    tms_torch_free(memory, (ptrdiff_t)SIZE, 0, NULL);
    CHECK(tms_pause("cache") == 0);
    tms_torch_free(dropped, (ptrdiff_t)SIZE, 0, NULL);
    CHECK(tms_resume(NULL) == 0);
}

static void retained_backups(void)
{
    tms_set_retain_cpu_backup(true);
    CHECK(tms_get_retain_cpu_backup());
    tms_set_enable_cpu_backup(true);
    void *memory = malloc_in_region("retained", 1);
    uint8_t *pointer = NULL;
    for (uint64_t cycle = 0; cycle < 3; cycle++) {
        CHECK(tms_pause("retained") == 0);
        uint8_t *paused = tms_get_cpu_backup_pointer(memory, SIZE);
        CHECK(paused != NULL && (cycle == 0 || paused == pointer));
        pointer = paused;
        check_fill(pointer, SIZE, 10 + cycle);
        CHECK(tms_resume("retained") == 0);
        CHECK(tms_get_cpu_backup_pointer(memory, SIZE) == pointer);
        CHECK_KEPT(memory, SIZE, 10 + cycle);
    }
    tms_torch_free(memory, (ptrdiff_t)SIZE, 0, NULL);
    tms_set_enable_cpu_backup(false);
    tms_set_retain_cpu_backup(false);
}

/* Regular files in a folder that have contents; `mode` gets the mode of the last. */
static unsigned files_in(const char *path, mode_t *mode)
{
    unsigned found = 0;
    DIR *folder = opendir(path);
    CHECK(folder != NULL);
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        struct stat status;
        if (fstatat(dirfd(folder), entry->d_name, &status, 0) == 0 && S_ISREG(status.st_mode) &&
            status.st_size > 0) {
            found++;
            *mode = status.st_mode & 07777;
        }
    }
    closedir(folder);
    return found;
}

static void disk_backups(void)
{
    char folder[] = "/tmp/tms-compat-XXXXXX";
    CHECK(mkdtemp(folder) != NULL);
    mode_t mode = 0;
    tms_set_disk_backup_dir(folder);
    tms_set_enable_disk_backup(true);
    CHECK(tms_get_enable_disk_backup());

    /* Both kinds at once exclude each other. */
    tms_set_enable_cpu_backup(true);
    tms_set_interesting_region(true);
    CHECK(tms_torch_malloc((ptrdiff_t)SIZE, 0, NULL) == NULL);
    CHECK(tms_last_error_message()[0] != '\0');
    tms_set_interesting_region(false);
    tms_set_enable_cpu_backup(false);

    void *first = malloc_in_region("disk", 1);
    void *second = malloc_in_region("disk", 2);
    for (int cycle = 0; cycle < 2; cycle++) {
        CHECK(tms_pause("disk") == 0);
        CHECK(files_in(folder, &mode) == 2);
        CHECK(mode == 0600);
        CHECK(tms_get_cpu_backup_pointer(first, SIZE) == NULL);
        CHECK(tms_resume("disk") == 0);
        CHECK_KEPT(first, SIZE, 1);
        CHECK_KEPT(second, SIZE, 2);
    }
    CHECK(tms_pause("disk") == 0);
    tms_torch_free(first, (ptrdiff_t)SIZE, 0, NULL);
    CHECK(files_in(folder, &mode) == 1);
    tms_torch_free(second, (ptrdiff_t)SIZE, 0, NULL);
    CHECK(files_in(folder, &mode) == 0);
    tms_set_enable_disk_backup(false);

    DIR *left = opendir(folder);
    CHECK(left != NULL);
    for (struct dirent *entry; (entry = readdir(left)) != NULL;) {
        /* An empty lock file may stay until the process ends. */
        unlinkat(dirfd(left), entry->d_name, 0);
    }
    closedir(left);
    CHECK(rmdir(folder) == 0);
}

/* Outside a region the thread's defaults hold; the other thread may be in none. */
static void *free_in_other_thread(void *memory)
{
    tms_torch_free(memory, (ptrdiff_t)SIZE, 0, NULL);
    return NULL;
}

static void outside_regions(void)
{
    void *memory = tms_torch_malloc((ptrdiff_t)SIZE, 0, NULL);
    CHECK(memory != NULL);
    check_fill(memory, SIZE, 5);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, free_in_other_thread, memory) == 0);
    CHECK(pthread_join(thread, NULL) == 0);

    tms_set_interesting_region(true);
    CHECK(tms_torch_malloc((ptrdiff_t)SIZE, 77, NULL) == NULL);
    CHECK(tms_torch_malloc(-1, 0, NULL) == NULL);
    tms_set_interesting_region(false);
    tms_torch_free(NULL, 0, 0, NULL);
}

/* The handle of the process-wide saver sees what the compatible names made. */
static void same_saver(void)
{
    const tms_saver_t *saver = NULL;
    CHECK_OK(tms_saver_default(&saver));
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_free((tms_saver_t *)(uintptr_t)saver));
    const tms_saver_t *again = NULL;
    CHECK_OK(tms_saver_default(&again));
    CHECK(saver == again);
    void *memory = malloc_in_region("shared", 5);
    CHECK(strcmp(check_query(saver, memory).tag, "shared") == 0);
    CHECK(tms_pause("shared") == 0);
    CHECK(check_query(saver, memory).state == TMS_STATE_PAUSED);
    CHECK_OK(tms_saver_free_memory(saver, memory));
}

int main(void)
{
    check_begin();
    names();
    defaults();
    returned_strings();
    host_backups("pinned");
    host_backups("mmap");
    retained_backups();
    disk_backups();
    outside_regions();
    same_saver();
    return 0;
}
