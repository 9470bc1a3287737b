/* Handles. A handle is a number that is never given out twice, so that the use of a destroyed
 * object is always seen. */
#include "internal.h"

enum { BUCKETS = 4096 };

static struct object *buckets[BUCKETS];
static uint64_t counts[OBJECT_KINDS];
static uint64_t last_handle = 0x10000;

void object_add(struct object *object, enum object_kind kind) {
    last_handle += 16;
    object->handle = last_handle;
    object->kind = kind;
    struct object **bucket = &buckets[(object->handle / 16) % BUCKETS];
    object->next = *bucket;
    *bucket = object;
    counts[kind]++;
}

void object_remove(struct object *object) {
    struct object **link = &buckets[(object->handle / 16) % BUCKETS];
    while (*link && *link != object) {
        link = &(*link)->next;
    }
    if (*link) {
        *link = object->next;
        counts[object->kind]--;
    }
}

void *object_find(enum object_kind kind, uint64_t handle) {
    struct object *object = buckets[(handle / 16) % BUCKETS];
    while (object && object->handle != handle) {
        object = object->next;
    }
    return object && object->kind == kind ? object : NULL;
}

uint64_t object_count(enum object_kind kind) {
    return counts[kind];
}

void object_each(enum object_kind kind, void (*visit)(void *object, void *argument), void *argument) {
    for (int i = 0; i < BUCKETS; i++) {
        for (struct object *object = buckets[i], *next; object; object = next) {
            next = object->next;
            if (object->kind == kind) {
                visit(object, argument);
            }
        }
    }
}
