/* Control functions that have no better place: accounts, settings, and the test's own access to
 * device memory. */
#include "internal.h"

static uint64_t per_device(const uint64_t *values, int device) {
    state_lock();
    uint64_t value = device >= 0 && device < MAX_DEVICES ? values[device] : 0;
    state_unlock();
    return value;
}

uint64_t fakecuda_live_handles(int device) {
    return per_device(settings.allocations, device);
}

uint64_t fakecuda_live_bytes(int device) {
    return per_device(settings.used, device);
}

uint64_t fakecuda_reserved_bytes(void) {
    state_lock();
    uint64_t bytes = 0;
    for (size_t i = 0; i < reservations.count; i++) {
        const struct reservation *reservation = (struct reservation *)reservations.items[i];
        bytes += reservation->plain ? 0 : reservation->range.size;
    }
    state_unlock();
    return bytes;
}

uint64_t fakecuda_mapped_bytes(int device) {
    state_lock();
    uint64_t bytes = 0;
    for (size_t i = 0; i < mappings.count; i++) {
        const struct mapping *mapping = (struct mapping *)mappings.items[i];
        bytes += mapping->physical->device == device ? mapping->range.size : 0;
    }
    state_unlock();
    return bytes;
}

static uint64_t live(enum object_kind kind) {
    state_lock();
    uint64_t count = object_count(kind);
    state_unlock();
    return count;
}

uint64_t fakecuda_live_events(void) {
    return live(OBJECT_EVENT);
}

uint64_t fakecuda_live_modules(void) {
    return live(OBJECT_MODULE);
}

/* The legacy and per-thread streams are nobody's to destroy, so they do not count. */
uint64_t fakecuda_live_streams(void) {
    state_lock();
    uint64_t count = 0;
    for (int device = 0; device < MAX_DEVICES; device++) {
        for (const struct stream *stream = contexts[device].streams; stream; stream = stream->next) {
            count += !stream->is_legacy && !stream->per_thread && !stream->destroyed;
        }
    }
    state_unlock();
    return count;
}

uint64_t fakecuda_pending_work(void) {
    state_lock();
    uint64_t count = 0;
    for (int device = 0; device < MAX_DEVICES; device++) {
        for (const struct stream *stream = contexts[device].streams; stream; stream = stream->next) {
            for (const struct op *op = stream->head; op; op = op->next) {
                count++;
            }
        }
    }
    state_unlock();
    return count;
}

int fakecuda_peek(const void *device_pointer, void *out, size_t size) {
    struct side side = {.kind = SIDE_DEVICE, .address = (uintptr_t)device_pointer, .device = ANY_DEVICE};
    state_lock();
    int rc = side_read(&side, out, size);
    state_unlock();
    return rc != 0;
}

int fakecuda_poke(void *device_pointer, const void *in, size_t size) {
    struct side side = {.kind = SIDE_DEVICE, .address = (uintptr_t)device_pointer, .device = ANY_DEVICE};
    state_lock();
    int rc = side_write(&side, in, size);
    state_unlock();
    return rc != 0;
}

void fakecuda_hold_streams(int on) {
    state_lock();
    settings.held = on != 0;
    worker_needed();
    state_unlock();
}

void fakecuda_set_late(int on) {
    state_lock();
    settings.late_us = on <= 0 ? 0 : on == 1 ? settings.late_us_default : (unsigned)on;
    state_unlock();
}

void fakecuda_set_host_unreadable(int on) {
    state_lock();
    settings.host_unreadable = on != 0;
    for (size_t i = 0; i < mappings.count; i++) {
        mapping_protect((struct mapping *)mappings.items[i]);
    }
    state_unlock();
}

void fakecuda_set_memory(int device, uint64_t bytes) {
    state_lock();
    if (device >= 0 && device < MAX_DEVICES) {
        settings.memory[device] = bytes;
    }
    state_unlock();
}

void fakecuda_set_external_use(int device, uint64_t bytes) {
    state_lock();
    if (device >= 0 && device < MAX_DEVICES) {
        settings.external[device] = bytes;
    }
    state_unlock();
}

void fakecuda_set_version(int version) {
    state_lock();
    settings.version = version;
    state_unlock();
}

void fakecuda_set_init(int code) {
    state_lock();
    settings.init_code = code;
    state_unlock();
}
