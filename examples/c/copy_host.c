/* A C program that copies by tms_memcpy and its kin:
 *
 *     cc copy_host.c $(pkg-config --cflags --libs tms-memcache) -o copy_host
 *
 * Sends numbers from pageable memory to the device and back, in every form: waiting, from pinned
 * memory, as an operation, in the order of a stream, as many pieces, and as rows with gaps. Works on
 * any device: no byte of device memory is looked at but by a copy. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tms.h>

#define BYTES ((size_t)16 << 20)
#define PIECES 1000
#define ROWS 200
#define WIDTH 300

static void expect(int32_t status, const char *what)
{
    if (status != TMS_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, tms_status_str(status), tms_last_error_message());
        exit(1);
    }
}

static void same(const unsigned char *a, const unsigned char *b, size_t bytes, const char *what)
{
    if (memcmp(a, b, bytes) != 0) {
        fprintf(stderr, "%s: the bytes differ\n", what);
        exit(1);
    }
    printf("%-30s %zu bytes are right\n", what, bytes);
}

static const char *kind_of(const tms_transfer_engine_t *engine, const void *pointer)
{
    static const char *const names[] = {"pageable", "pinned", "managed", "device"};
    tms_pointer_info_t info = {0};
    info.struct_size = sizeof info;
    expect(tms_pointer_query(engine, pointer, &info), "asking what a pointer is");
    return names[info.kind];
}

int main(void)
{
    /* NULL instead of an engine is the one of the process; this one has threads, staging memory and
     * a table of methods of its own. */
    tms_transfer_options_t options = {0};
    options.struct_size = sizeof options;
    options.threads = 2;
    options.staging_bytes = (uint64_t)8 << 20;
    tms_transfer_engine_t *engine = NULL;
    expect(tms_transfer_engine_create(&options, &engine), "creating an engine");

    const tms_saver_t *saver = NULL;
    expect(tms_saver_default(&saver), "opening the saver");
    void *memory = NULL;
    tms_region_options_t region = {0};
    region.struct_size = sizeof region;
    region.backup = "pinned";
    expect(tms_saver_malloc(saver, BYTES, -1, &region, &memory), "allocating");
    unsigned char *device = memory;

    unsigned char *sent = malloc(BYTES), *received = malloc(BYTES);
    if (sent == NULL || received == NULL) {
        fprintf(stderr, "out of memory\n");
        return 1;
    }
    for (size_t i = 0; i < BYTES; i++) {
        sent[i] = (unsigned char)(i * 2654435761u >> 13);
    }
    printf("from %s to %s memory\n", kind_of(engine, sent), kind_of(engine, device));

    /* The direction follows from the pointers; _h2d, _d2h and _d2d insist on one. */
    uint64_t certain = 0;
    expect(tms_memcpy(engine, device, sent, BYTES, &certain), "copying to the device");
    expect(tms_memcpy_d2h(engine, received, device, BYTES, NULL), "copying to the host");
    same(sent, received, (size_t)certain, "waiting");

    /* An operation of the library's threads. The memory must live until it has ended. */
    memset(received, 0, BYTES);
    tms_op_t *op = NULL;
    tms_result_t result = {0};
    result.struct_size = sizeof result;
    expect(tms_memcpy_async(engine, received, device, BYTES, &op), "starting a copy");
    expect(tms_op_wait(op, TMS_WAIT_FOREVER), "copying");
    expect(tms_op_result(op, &result), "asking for the result");
    expect(tms_op_free(op), "freeing the operation");
    same(sent, received, (size_t)result.copied_bytes, "as an operation");

    /* After the work that a stream has, before what it gets later. NULL is CUDA's default stream. A
     * pageable destination is there on return; for pinned memory, synchronise the stream first. */
    memset(received, 0, BYTES);
    expect(tms_memcpy_on_stream(engine, received, device, BYTES, NULL), "copying on a stream");
    same(sent, received, BYTES, "on a stream");

    /* Many pieces of any sizes and directions in one call: here every second stretch of 100 bytes. */
    static tms_copy_t pieces[PIECES];
    memset(received, 0, BYTES);
    for (size_t i = 0; i < PIECES; i++) {
        pieces[i].dst = received + 200 * i;
        pieces[i].src = device + 200 * i;
        pieces[i].bytes = 100;
    }
    expect(tms_memcpy_batch(engine, pieces, PIECES, &certain), "copying pieces");
    for (size_t i = 0; i < PIECES * 200; i++) {
        if (received[i] != (i % 200 < 100 ? sent[i] : 0)) {
            fprintf(stderr, "pieces: byte %zu is wrong\n", i);
            return 1;
        }
    }
    printf("%-30s %" PRIu64 " bytes are right\n", "many pieces", certain);

    /* Rows: a column of a matrix with rows of 1024 bytes becomes a matrix without gaps. */
    expect(tms_memcpy_2d(engine, received, WIDTH, device + 512, 1024, WIDTH, ROWS, NULL),
           "copying rows");
    for (size_t row = 0; row < ROWS; row++) {
        if (memcmp(received + row * WIDTH, sent + 512 + row * 1024, WIDTH) != 0) {
            fprintf(stderr, "rows: row %zu is wrong\n", row);
            return 1;
        }
    }
    printf("%-30s %d bytes are right\n", "rows", ROWS * WIDTH);

    /* Pinned memory is copied without staging. The backup of paused memory is pinned memory, and as
     * good a source as any. */
    void *backup = NULL, *other = NULL;
    expect(tms_saver_pause(saver, NULL, NULL), "pausing");
    expect(tms_saver_backup_pointer(saver, device, BYTES, &backup), "asking for the backup");
    printf("from %s memory\n", kind_of(engine, backup));
    expect(tms_saver_malloc(saver, BYTES, -1, NULL, &other), "allocating");
    expect(tms_memcpy_h2d(engine, other, backup, BYTES, NULL), "copying from pinned memory");
    memset(received, 0, BYTES);
    expect(tms_memcpy_d2h(engine, received, other, BYTES, NULL), "copying to the host");
    same(sent, received, BYTES, "from pinned memory");

    /* What an error looks like: paused memory is none. */
    int32_t status = tms_memcpy(engine, device, sent, BYTES, &certain);
    printf("copying to paused memory: %s: %s\n", tms_status_str(status), tms_last_error_message());
    if (status != TMS_ERR_INVALID_ARGUMENT || certain != 0) {
        return 1;
    }

    expect(tms_transfer_engine_free(engine), "freeing the engine");
    expect(tms_saver_free_memory(saver, other), "freeing");
    expect(tms_saver_free_memory(saver, device), "freeing");
    free(sent);
    free(received);
    return 0;
}
