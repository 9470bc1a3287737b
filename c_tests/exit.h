/* What the tests of process ends share: a child does the work and ends; the parent looks at how it
 * ended and at what it left behind. */
#ifndef EXIT_H
#define EXIT_H

#include "check.h"

#include <dirent.h>
#include <sys/stat.h>

/* Folder for file backups, made by exit_begin. */
static char exit_folder[64];

static UNUSED void exit_begin(void)
{
    check_begin();
    snprintf(exit_folder, sizeof exit_folder, "/tmp/tms-exit-XXXXXX");
    CHECK(mkdtemp(exit_folder) != NULL);
}

/* Names in the folder whose file has contents: backups, not locks. */
static UNUSED unsigned exit_backup_files(void)
{
    unsigned found = 0;
    DIR *folder = opendir(exit_folder);
    CHECK(folder != NULL);
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        struct stat status;
        if (fstatat(dirfd(folder), entry->d_name, &status, 0) == 0 && S_ISREG(status.st_mode)) {
            found += status.st_size > 0;
        }
    }
    closedir(folder);
    return found;
}

/* Everything that is left must be empty files of the library, which go now. */
static UNUSED void exit_end(void)
{
    CHECK(exit_backup_files() == 0);
    DIR *folder = opendir(exit_folder);
    CHECK(folder != NULL);
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) {
            CHECK(unlinkat(dirfd(folder), entry->d_name, 0) == 0);
        }
    }
    closedir(folder);
    CHECK(rmdir(exit_folder) == 0);
}

static UNUSED void *exit_malloc(const tms_saver_t *saver, size_t bytes, const char *backup,
                                uint64_t seed)
{
    tms_region_options_t region = check_region(backup, backup);
    region.directory = strcmp(backup, "file") == 0 ? exit_folder : NULL;
    void *memory = NULL;
    CHECK_OK(tms_saver_malloc(saver, bytes, -1, &region, &memory));
    check_fill(memory, bytes, seed);
    return memory;
}

#endif
