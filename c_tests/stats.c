/* Statistics by tag and device, and what is known of one allocation. */
#include "check.h"

#define MIB ((size_t)1 << 20)

static tms_stats_t entry_of(const tms_saver_t *saver, const char *tag, int32_t device)
{
    tms_stats_t entries[8];
    memset(entries, 0, sizeof entries);
    for (size_t i = 0; i < 8; i++) {
        entries[i].struct_size = (uint32_t)sizeof entries[i];
    }
    size_t count = 0;
    CHECK_OK(tms_saver_stats(saver, entries, 8, &count));
    CHECK(count <= 8);
    for (size_t i = 0; i < count; i++) {
        if (strcmp(entries[i].tag, tag) == 0 && entries[i].device == device) {
            return entries[i];
        }
    }
    memset(&entries[0], 0, sizeof entries[0]);
    return entries[0];
}

static void counts(const tms_saver_t *saver)
{
    uint64_t granule = check_device_info(0).granularity;
    uint64_t size = 3 * granule;
    void *a1 = check_malloc(saver, size, "a", "pinned", 1);
    void *a2 = check_malloc(saver, size - 8, "a", "mmap", 2);
    void *b = check_malloc(saver, 8, "b", "none", 3);

    tms_stats_t a = entry_of(saver, "a", 0);
    CHECK(a.active_count == 2 && a.active_bytes == 2 * size);
    CHECK(a.paused_count == 0 && a.paused_bytes == 0 && a.backed_bytes == 0);
    CHECK(entry_of(saver, "b", 0).active_bytes == granule);

    check_pause(saver, NULL);
    a = entry_of(saver, "a", 0);
    CHECK(a.active_count == 0 && a.active_bytes == 0);
    CHECK(a.paused_count == 2 && a.paused_bytes == 2 * size && a.backed_bytes == 2 * size);
    tms_stats_t dropped = entry_of(saver, "b", 0);
    CHECK(dropped.paused_count == 1 && dropped.paused_bytes == granule);
    CHECK(dropped.backed_bytes == 0);

    CHECK_OK(tms_saver_free_memory(saver, a1));
    a = entry_of(saver, "a", 0);
    CHECK(a.paused_count == 1 && a.paused_bytes == size && a.backed_bytes == size);

    check_resume(saver, NULL);
    a = entry_of(saver, "a", 0);
    CHECK(a.active_count == 1 && a.active_bytes == size && a.backed_bytes == 0);
    CHECK_OK(tms_saver_free_memory(saver, a2));
    CHECK(entry_of(saver, "a", 0).active_count == 0);
    CHECK_OK(tms_saver_free_memory(saver, b));
}

/* What a freed allocation leaves within a handle is told, used again by its class, and goes. */
static void held(const tms_saver_t *saver)
{
    uint64_t granule = check_device_info(0).granularity;
    void *memory[3];
    for (size_t i = 0; i < 3; i++) {
        memory[i] = check_malloc(saver, 8, "h", "pinned", i);
    }
    CHECK_OK(tms_saver_free_memory(saver, memory[1]));
    CHECK(entry_of(saver, "h", 0).held_bytes == 0);
    memory[1] = check_malloc(saver, 8, "h", "pinned", 4);
    check_pause(saver, NULL);
    check_resume(saver, NULL);
    CHECK_OK(tms_saver_free_memory(saver, memory[1]));
    CHECK(entry_of(saver, "h", 0).held_bytes == granule);
    CHECK(entry_of(saver, "h", 0).active_bytes == 2 * granule);
    memory[1] = check_malloc(saver, 8, "h", "pinned", 5);
    CHECK(entry_of(saver, "h", 0).held_bytes == 0);
    CHECK_OK(tms_saver_free_memory(saver, memory[1]));
    check_pause(saver, NULL);
    CHECK(entry_of(saver, "h", 0).held_bytes == 0);
    CHECK_OK(tms_saver_free_memory(saver, memory[0]));
    CHECK_OK(tms_saver_free_memory(saver, memory[2]));
}

/* The number of entries is told whatever fits; entries beyond the room are not touched. */
static void capacity(const tms_saver_t *saver)
{
    void *memory[3];
    for (size_t i = 0; i < 3; i++) {
        char tag[2] = {(char)('x' + (char)i), '\0'};
        memory[i] = check_malloc(saver, 8, tag, NULL, i);
    }
    tms_stats_t entries[3];
    memset(entries, 0x5A, sizeof entries);
    for (size_t i = 0; i < 3; i++) {
        entries[i].struct_size = (uint32_t)sizeof entries[i];
    }
    tms_stats_t untouched = entries[2];
    size_t count = 0;
    CHECK_OK(tms_saver_stats(saver, NULL, 0, &count));
    CHECK(count == 3);
    count = 0;
    CHECK_OK(tms_saver_stats(saver, entries, 2, &count));
    CHECK(count == 3);
    CHECK(strcmp(entries[0].tag, "x") == 0 && strcmp(entries[1].tag, "y") == 0);
    CHECK(memcmp(&entries[2], &untouched, sizeof untouched) == 0);
    for (size_t i = 0; i < 3; i++) {
        CHECK_OK(tms_saver_free_memory(saver, memory[i]));
    }
    CHECK_OK(tms_saver_stats(saver, entries, 3, &count));
    CHECK(count == 0);
}

static void query(const tms_saver_t *saver)
{
    uint64_t granule = check_device_info(0).granularity;
    uint8_t *memory = check_malloc(saver, granule + 6912, "queried", "pinned", 1);
    static const uint64_t offsets[] = {0, 1, 6911};
    for (size_t i = 0; i < 3; i++) {
        tms_allocation_info_t info = check_query(saver, memory + offsets[i]);
        CHECK(info.base == memory);
        CHECK(info.bytes == 2 * granule && info.requested_bytes == granule + 6912);
        CHECK(info.device == 0 && info.state == TMS_STATE_ACTIVE);
        CHECK(strcmp(info.tag, "queried") == 0);
    }
    check_pause(saver, NULL);
    CHECK(check_query(saver, memory + granule).state == TMS_STATE_PAUSED);

    tms_allocation_info_t info;
    memset(&info, 0x5A, sizeof info);
    info.struct_size = (uint32_t)sizeof info;
    tms_allocation_info_t untouched = info;
    int local = 0;
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_query(saver, &local, &info));
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_query(saver, memory + 2 * granule, &info));
    CHECK(memcmp(&info, &untouched, sizeof info) == 0);

    /* A program built with an older, shorter struct: what fits is filled, nothing beyond. */
    memset(&info, 0x5A, sizeof info);
    info.struct_size = (uint32_t)offsetof(tms_allocation_info_t, tag);
    CHECK_OK(tms_saver_query(saver, memory, &info));
    CHECK(info.base == memory && info.struct_size == offsetof(tms_allocation_info_t, tag));
    CHECK(info.tag[0] == 0x5A);
    info.struct_size = 0;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_saver_query(saver, memory, &info));

    CHECK_OK(tms_saver_free_memory(saver, memory));
    info.struct_size = (uint32_t)sizeof info;
    CHECK_STATUS(TMS_ERR_NOT_FOUND, tms_saver_query(saver, memory, &info));
}

static void devices(void)
{
    uint32_t count = 0;
    CHECK_OK(tms_device_count(&count));
    CHECK(count >= 1);
    for (uint32_t i = 0; i < count; i++) {
        tms_device_info_t info = check_device_info((int32_t)i);
        CHECK(info.ordinal == i);
        CHECK(info.kind == TMS_DEVICE_HOST || info.kind == TMS_DEVICE_CUDA);
        CHECK(info.name[0] != '\0');
        CHECK(info.granularity > 0 && (info.granularity & (info.granularity - 1)) == 0);
        CHECK(info.total_bytes >= info.free_bytes && info.free_bytes > 0);
    }
    tms_device_info_t info;
    memset(&info, 0, sizeof info);
    info.struct_size = (uint32_t)sizeof info;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_device_info((int32_t)count, &info));
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_device_info(-2, &info));
    CHECK_OK(tms_device_info(-1, &info));
    info.struct_size = 0;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_device_info(0, &info));
}

/* Two devices: memory lies where it was asked for, and each counts its own. */
static void two_devices(const tms_saver_t *saver)
{
    uint32_t count = 0;
    CHECK_OK(tms_device_count(&count));
    if (count < 2) {
        return;
    }
    tms_region_options_t region = check_region("two", "pinned");
    void *memory[2] = {NULL, NULL};
    for (int32_t device = 0; device < 2; device++) {
        CHECK_OK(tms_saver_malloc(saver, MIB, device, &region, &memory[device]));
        check_fill(memory[device], MIB, (uint64_t)device);
        CHECK(check_query(saver, memory[device]).device == device);
        CHECK(entry_of(saver, "two", device).active_count == 1);
    }
    check_pause(saver, "two");
    CHECK(entry_of(saver, "two", 1).paused_count == 1);
    check_resume(saver, "two");
    for (int32_t device = 0; device < 2; device++) {
        CHECK_KEPT(memory[device], MIB, (uint64_t)device);
        CHECK_OK(tms_saver_free_memory(saver, memory[device]));
    }
}

int main(void)
{
    check_begin();
    setenv("TMS_HOST_DEVICES", "2", 0);
    tms_saver_t *saver = check_saver();
    devices();
    counts(saver);
    held(saver);
    capacity(saver);
    query(saver);
    two_devices(saver);
    CHECK_OK(tms_saver_free(saver));
    return 0;
}
