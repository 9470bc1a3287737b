/* Explicit copies: every function in every direction and form; what is refused names its argument;
 * engines with options; queries; the table. The device's memory is written through its address. */
#include "check.h"

#include <sys/mman.h>

#define SIZE ((size_t)1 << 20)

struct world {
    tms_transfer_engine_t *engine;
    tms_saver_t *saver;
    char *device;
    char *host;
};

static void fill(struct world *world, uint64_t seed)
{
    check_fill(world->device, SIZE, seed);
    check_fill(world->host, SIZE, seed + 1);
}

static void wait_and_free(tms_op_t *op, uint64_t bytes)
{
    uint64_t done = 0;
    uint64_t total = 0;
    tms_result_t result = check_result();
    CHECK_OK(tms_op_wait(op, 60000));
    CHECK_OK(tms_op_progress(op, &done, &total));
    CHECK(done == bytes && total == bytes);
    CHECK_OK(tms_op_result(op, &result));
    CHECK(result.copied_bytes == bytes && result.done_count == 0);
    CHECK_OK(tms_op_free(op));
}

#define FORMS(function, dst, src)                                                                  \
    do {                                                                                           \
        uint64_t certain = 7;                                                                      \
        tms_op_t *op = NULL;                                                                       \
        fill(world, 1);                                                                            \
        CHECK_OK(function(world->engine, (dst) + 8, (src) + 16, 800, &certain));                   \
        CHECK(certain == 800 && memcmp((dst) + 8, (src) + 16, 800) == 0);                          \
        CHECK_OK(function(NULL, (dst) + 1000, (src) + 2000, 77, NULL));                            \
        CHECK(memcmp((dst) + 1000, (src) + 2000, 77) == 0);                                        \
        CHECK_OK(function##_on_stream(world->engine, (dst) + 3000, (src) + 5000, 1999, NULL));     \
        CHECK_OK(function(world->engine, world->host, world->host + 8, 0, NULL));                  \
        CHECK_OK(function##_async(world->engine, (dst) + 9000, (src) + 9001, 70001, &op));         \
        wait_and_free(op, 70001);                                                                  \
        CHECK(memcmp((dst) + 9000, (src) + 9001, 70001) == 0);                                     \
    } while (0)

static void every_direction(struct world *world)
{
    char *other = check_malloc(world->saver, SIZE, "other", NULL, 9);
    FORMS(tms_memcpy, world->device, world->host);
    FORMS(tms_memcpy, world->host, world->device);
    FORMS(tms_memcpy, world->device, other);
    FORMS(tms_memcpy_h2d, world->device, world->host);
    FORMS(tms_memcpy_d2h, world->host, world->device);
    FORMS(tms_memcpy_d2d, other, world->device);
    CHECK_OK(tms_saver_free_memory(world->saver, other));
}

static void batches(struct world *world)
{
    enum { COUNT = 300 };
    static tms_copy_t copies[COUNT];
    uint64_t certain = 7;
    tms_op_t *op = NULL;
    for (int form = 0; form < 3; form++) {
        fill(world, (uint64_t)form);
        uint64_t total = 0;
        for (size_t i = 0; i < COUNT; i++) {
            /* Both directions, from one half into the other. */
            char *to = i % 2 ? world->device : world->host;
            char *from = i % 2 ? world->host : world->device;
            copies[i].dst = to + SIZE / 2 + i * 1000;
            copies[i].src = from + i * 1000;
            copies[i].bytes = i;
            total += i;
        }
        if (form == 0) {
            CHECK_OK(tms_memcpy_batch(world->engine, copies, COUNT, &certain));
            CHECK(certain == total);
        } else if (form == 1) {
            CHECK_OK(tms_memcpy_batch_on_stream(world->engine, copies, COUNT, NULL));
            /* The stream is waited for by a copy to pageable memory. */
            char byte;
            CHECK_OK(tms_memcpy_on_stream(world->engine, &byte, world->device, 1, NULL));
        } else {
            CHECK_OK(tms_memcpy_batch_async(world->engine, copies, COUNT, &op));
            memset(copies, 0, sizeof copies);
            wait_and_free(op, total);
        }
        for (size_t i = 0; i < COUNT; i++) {
            char *to = i % 2 ? world->device : world->host;
            char *from = i % 2 ? world->host : world->device;
            CHECK(memcmp(to + SIZE / 2 + i * 1000, from + i * 1000, i) == 0);
        }
    }
    CHECK_OK(tms_memcpy_batch(world->engine, NULL, 0, &certain));
    CHECK(certain == 0);
}

static void rows(struct world *world)
{
    uint64_t certain = 7;
    tms_op_t *op = NULL;
    for (int form = 0; form < 3; form++) {
        fill(world, (uint64_t)form);
        char *dst = world->device + 10;
        char *src = world->host + 20;
        char between = dst[60];
        if (form == 0) {
            CHECK_OK(tms_memcpy_2d(world->engine, dst, 100, src, 70, 60, 50, &certain));
            CHECK(certain == 3000);
        } else if (form == 1) {
            CHECK_OK(tms_memcpy_2d_on_stream(world->engine, dst, 100, src, 70, 60, 50, NULL));
            char byte;
            CHECK_OK(tms_memcpy_on_stream(world->engine, &byte, world->device, 1, NULL));
        } else {
            CHECK_OK(tms_memcpy_2d_async(world->engine, dst, 100, src, 70, 60, 50, &op));
            wait_and_free(op, 3000);
        }
        for (size_t row = 0; row < 50; row++) {
            CHECK(memcmp(dst + row * 100, src + row * 70, 60) == 0);
        }
        CHECK(dst[60] == between);
    }
}

static void refused(int32_t status, int32_t expected, uint64_t certain, const char *message)
{
    CHECK_STATUS(expected, status);
    CHECK(certain == 0);
    if (strstr(tms_last_error_message(), message) == NULL) {
        check_failed(__FILE__, __LINE__, message);
    }
}

#define REFUSED(expected, message, call)                                                           \
    do {                                                                                           \
        uint64_t certain = 7;                                                                      \
        int32_t status = (call);                                                                   \
        refused(status, expected, certain, message);                                               \
    } while (0)

static void refusals(struct world *world)
{
    const tms_transfer_engine_t *engine = world->engine;
    char *device = world->device;
    char *host = world->host;
    size_t rest = 2 * SIZE; /* The granularity: what belongs to the allocation. */
    fill(world, 3);
    REFUSED(TMS_ERR_NULL_POINTER, "dst", tms_memcpy(engine, NULL, host, 1, &certain));
    REFUSED(TMS_ERR_NULL_POINTER, "src", tms_memcpy(engine, host, NULL, 1, &certain));
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "dst: overlaps src by 8 bytes",
            tms_memcpy(engine, host, host + 8, 16, &certain));
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "dst: overlaps",
            tms_memcpy(engine, device + 8, device, 16, &certain));
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "by 5 bytes",
            tms_memcpy(engine, device + rest - 5, host, 10, &certain));
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "src: ",
            tms_memcpy(engine, host, device + rest - 5, 10, &certain));
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "more than there are addresses",
            tms_memcpy(engine, host, device, SIZE_MAX - 8, &certain));
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "dst: is host memory",
            tms_memcpy_h2d(engine, host, host + 64, 8, &certain));
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "src: is memory of device",
            tms_memcpy_h2d(engine, device + 64, device, 8, &certain));
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "dst: is memory of device",
            tms_memcpy_d2h(engine, device + 64, device, 8, &certain));
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "src: is host memory",
            tms_memcpy_d2d(engine, device, host, 8, &certain));

    tms_copy_t copies[2] = {{device, host, 8}, {device + 8, NULL, 8}};
    REFUSED(TMS_ERR_NULL_POINTER, "copies[1]: src", tms_memcpy_batch(engine, copies, 2, &certain));
    REFUSED(TMS_ERR_NULL_POINTER, "copies", tms_memcpy_batch(engine, NULL, 2, &certain));
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "count", tms_memcpy_batch(engine, copies, SIZE_MAX, &certain));

    REFUSED(TMS_ERR_INVALID_ARGUMENT, "dst_pitch",
            tms_memcpy_2d(engine, device, 9, host, 10, 10, 2, &certain));
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "src_pitch",
            tms_memcpy_2d(engine, device, 10, host, 9, 10, 2, &certain));
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "height",
            tms_memcpy_2d(engine, device, SIZE_MAX / 2, host, 16, 10, 4, &certain));

    /* Of an operation, its end tells. */
    tms_op_t *op = NULL;
    CHECK_OK(tms_memcpy_async(engine, NULL, host, 8, &op));
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_op_wait(op, 60000));
    CHECK(strstr(tms_last_error_message(), "dst") != NULL);
    CHECK_OK(tms_op_free(op));

    /* Paused, then freed memory. */
    char *paused = check_malloc(world->saver, SIZE, "paused", "pinned", 8);
    check_pause(world->saver, "paused");
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "dst: there is no memory",
            tms_memcpy(engine, paused, host, 64, &certain));
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "src: there is no memory",
            tms_memcpy(engine, host, paused, 64, &certain));
    check_resume(world->saver, "paused");
    CHECK_OK(tms_memcpy(engine, host, paused, 64, NULL));
    CHECK_OK(tms_saver_free_memory(world->saver, paused));
    char *gone = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(gone != MAP_FAILED && munmap(gone, 4096) == 0);
    REFUSED(TMS_ERR_INVALID_ARGUMENT, "src: there is no memory",
            tms_memcpy(engine, device, gone, 64, &certain));

    CHECK_KEPT(device, SIZE, 3);
    /* All but the first 64 bytes, which were copied over. */
    CHECK(check_kept_words(host, SIZE, 4) == SIZE / 8 - 8);
}

static tms_pointer_info_t query(const tms_transfer_engine_t *engine, const void *pointer)
{
    tms_pointer_info_t info;
    memset(&info, 0, sizeof info);
    info.struct_size = (uint32_t)sizeof info;
    CHECK_OK(tms_pointer_query(engine, pointer, &info));
    return info;
}

static void queries(struct world *world)
{
    tms_pointer_info_t info = query(world->engine, world->device + 100);
    CHECK(info.kind == TMS_MEMORY_DEVICE && info.device == 0 && info.reserved == 0);
    CHECK((char *)info.start <= world->device);
    CHECK((char *)info.start + info.bytes >= world->device + SIZE);
    info = query(NULL, world->host);
    CHECK(info.kind == TMS_MEMORY_PAGEABLE && info.device == -1);
    CHECK(info.start == world->host && info.bytes == 0);
    CHECK(query(NULL, NULL).kind == TMS_MEMORY_PAGEABLE);
    /* A backup in pinned memory, while its allocation is paused. */
    char *paused = check_malloc(world->saver, SIZE, "paused", "pinned", 4);
    check_pause(world->saver, "paused");
    void *backup = NULL;
    CHECK_OK(tms_saver_backup_pointer(world->saver, paused, SIZE, &backup));
    CHECK(query(world->engine, backup).kind == TMS_MEMORY_PINNED);
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_pointer_query(world->engine, paused, &info));
    CHECK(strstr(tms_last_error_message(), "pointer: there is no memory at ") != NULL);
    CHECK_OK(tms_memcpy_h2d(world->engine, world->device, backup, SIZE, NULL));
    CHECK_KEPT(world->device, SIZE, 4);
    CHECK_OK(tms_saver_free_memory(world->saver, paused));
    info.struct_size = 3;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_pointer_query(NULL, world->host, &info));
}

static void tables(const tms_transfer_engine_t *engine)
{
    char text[4096];
    size_t needed = 0;
    CHECK_OK(tms_transfer_table_set(engine, 0, "h2d:4096=batch,d2h:max=kernel"));
    CHECK_OK(tms_transfer_table_get(engine, 0, NULL, 0, &needed));
    CHECK(needed > 18 * strlen("h2d:4096=plain\n") && needed <= sizeof text);
    memset(text, 'x', sizeof text);
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT,
                 tms_transfer_table_get(engine, 0, text, needed - 1, &needed));
    CHECK(text[0] == 'x' && strstr(tms_last_error_message(), "capacity") != NULL);
    CHECK_OK(tms_transfer_table_get(engine, 0, text, needed, NULL));
    CHECK(strlen(text) + 1 == needed);
    CHECK(strncmp(text, "h2d:4096=batch ", strlen("h2d:4096=batch ")) == 0);
    CHECK(strstr(text, "\nd2h:max=kernel ") != NULL);
    CHECK_OK(tms_transfer_table_set(engine, 0, text));
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_transfer_table_set(engine, 0, "h2d:5=plain"));
    CHECK(strstr(tms_last_error_message(), "\"h2d:5=plain\"") != NULL);
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_transfer_table_set(engine, -1, "h2d:max=plain"));
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_transfer_table_get(engine, 99, NULL, 0, NULL));
    CHECK(strstr(tms_last_error_message(), "device") != NULL);
}

static void engines(struct world *world)
{
    tms_transfer_options_t options;
    tms_transfer_engine_t *engine = NULL;
    int32_t devices[] = {0, 99};
    memset(&options, 0, sizeof options);
    options.struct_size = (uint32_t)sizeof options;
    options.device_count = 2;
    CHECK_STATUS(TMS_ERR_NULL_POINTER, tms_transfer_engine_create(&options, &engine));
    options.devices = devices;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_transfer_engine_create(&options, &engine));
    CHECK(strstr(tms_last_error_message(), "options.devices[1]") != NULL);
    options.device_count = 1;
    options.staging_bytes = UINT64_MAX;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_transfer_engine_create(&options, &engine));
    CHECK(strstr(tms_last_error_message(), "options.staging_bytes") != NULL);
    options.staging_bytes = 1;
    options.flags = 1;
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_transfer_engine_create(&options, &engine));
    options.flags = 0;
    options.device = "toaster";
    CHECK_STATUS(TMS_ERR_INVALID_ARGUMENT, tms_transfer_engine_create(&options, &engine));
    CHECK(engine == NULL);
    options.device = NULL;
    options.threads = 1;
    /* The least that works: one thread and two slots. */
    CHECK_OK(tms_transfer_engine_create(&options, &engine));
    size_t large = 9 * SIZE;
    char *device = check_malloc(world->saver, large, "large", NULL, 5);
    char *host = malloc(large);
    CHECK(host != NULL);
    CHECK_OK(tms_memcpy_d2h(engine, host, device, large, NULL));
    CHECK_KEPT(host, large, 5);
    check_fill(host, large, 6);
    tms_op_t *op = NULL;
    CHECK_OK(tms_memcpy_h2d_async(engine, device, host, large, &op));
    int32_t freed = tms_transfer_engine_free(engine);
    CHECK(freed == TMS_OK || freed == TMS_ERR_BUSY);
    CHECK_OK(tms_op_wait(op, 60000));
    if (freed == TMS_ERR_BUSY) {
        CHECK_OK(tms_transfer_engine_free(engine));
    }
    CHECK_OK(tms_op_free(op));
    CHECK_KEPT(device, large, 6);
    free(host);
    CHECK_OK(tms_saver_free_memory(world->saver, device));
}

int main(void)
{
    check_begin();
    struct world world;
    memset(&world, 0, sizeof world);
    const tms_saver_t *standard = NULL;
    CHECK_OK(tms_saver_default(&standard));
    /* An engine of its own knows memory of the default saver. */
    world.saver = (tms_saver_t *)(uintptr_t)standard;
    CHECK_OK(tms_transfer_engine_create(NULL, &world.engine));
    world.device = check_malloc(world.saver, SIZE, "device", NULL, 1);
    world.host = malloc(SIZE);
    CHECK(world.host != NULL);
    every_direction(&world);
    batches(&world);
    rows(&world);
    refusals(&world);
    queries(&world);
    tables(world.engine);
    tables(NULL);
    engines(&world);
    CHECK_OK(tms_saver_free_memory(world.saver, world.device));
    CHECK_OK(tms_transfer_engine_free(world.engine));
    free(world.host);
    CHECK_OK(tms_shutdown());
    return 0;
}
