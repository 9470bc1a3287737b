/* A C program that links the library:
 *
 *     cc link_host.c $(pkg-config --cflags --libs tms-memcache) -o link_host
 *
 * Puts "weights" into device memory, pauses them, resumes them, and checks what came back. Works on
 * any device; only where device memory is host memory (TMS_DEVICE=host, or no GPU) can plain C
 * write and compare the bytes. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tms.h>

#define BYTES ((size_t)64 << 20)

static void expect(int32_t status, const char *what)
{
    if (status != TMS_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, tms_status_str(status), tms_last_error_message());
        exit(1);
    }
}

static void show(const tms_saver_t *saver, const char *when)
{
    tms_stats_t entry = {0};
    size_t count = 0;
    entry.struct_size = sizeof entry;
    expect(tms_saver_stats(saver, &entry, 1, &count), "statistics");
    printf("%-8s %s: %" PRIu64 " MiB active, %" PRIu64 " MiB paused, %" PRIu64 " MiB backed up\n",
           when, entry.tag, entry.active_bytes >> 20, entry.paused_bytes >> 20,
           entry.backed_bytes >> 20);
}

int main(void)
{
    if (tms_abi_version() != TMS_ABI_VERSION) {
        fprintf(stderr, "the header has ABI version %d, the library %u\n", TMS_ABI_VERSION,
                (unsigned)tms_abi_version());
        return 1;
    }

    tms_saver_t *saver = NULL;
    expect(tms_saver_create(NULL, &saver), "creating a saver");

    tms_device_info_t device = {0};
    device.struct_size = sizeof device;
    expect(tms_device_info(-1, &device), "describing the device");
    printf("tms-memcache %s on %s\n", tms_version(), device.name);

    tms_region_options_t region = {0};
    region.struct_size = sizeof region;
    region.tag = "weights";
    region.backup = "pinned";
    expect(tms_region_push(&region), "entering the region");
    void *weights = NULL;
    expect(tms_saver_malloc(saver, BYTES, -1, NULL, &weights), "allocating");
    expect(tms_region_pop(), "leaving the region");

    int writable = device.kind == TMS_DEVICE_HOST;
    if (writable) {
        memset(weights, 0x42, BYTES);
    }
    show(saver, "loaded");

    const char *tags[] = {"weights"};
    tms_pause_options_t pause = {0};
    pause.struct_size = sizeof pause;
    pause.tags = tags;
    pause.tag_count = 1;
    expect(tms_saver_pause(saver, &pause, NULL), "pausing");
    show(saver, "paused");

    /* Long work has a second form, which returns at once. */
    tms_resume_options_t resume = {0};
    resume.struct_size = sizeof resume;
    resume.tags = tags;
    resume.tag_count = 1;
    resume.wait_ms = 1000;
    tms_op_t *op = NULL;
    tms_result_t result = {0};
    result.struct_size = sizeof result;
    expect(tms_saver_resume_async(saver, &resume, &op), "starting the resume");
    expect(tms_op_wait(op, TMS_WAIT_FOREVER), "resuming");
    expect(tms_op_result(op, &result), "asking for the result");
    expect(tms_op_free(op), "freeing the operation");
    show(saver, "resumed");
    printf("copied   %" PRIu64 " MiB\n", result.copied_bytes >> 20);

    for (size_t i = 0; writable && i < BYTES; i++) {
        if (((unsigned char *)weights)[i] != 0x42) {
            fprintf(stderr, "byte %zu came back as %#x\n", i, ((unsigned char *)weights)[i]);
            return 1;
        }
    }
    puts(writable ? "every byte came back" : "resumed; plain C cannot look into GPU memory");

    /* What an error looks like. */
    int32_t status = tms_saver_free_memory(saver, (char *)weights + 1);
    printf("freeing a wrong pointer: %s: %s\n", tms_status_str(status), tms_last_error_message());
    if (status != TMS_ERR_NOT_FOUND) {
        return 1;
    }

    expect(tms_saver_free_memory(saver, weights), "freeing");
    expect(tms_saver_free(saver), "freeing the saver");
    return 0;
}
