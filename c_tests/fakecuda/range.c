/* A set of disjoint address ranges, as a sorted array. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* Index of the first range that ends above the address. */
static size_t first_ending_above(const struct range_table *table, uintptr_t address) {
    size_t low = 0, high = table->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct range *range = table->items[middle];
        if (range->base + range->size > address) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

void *range_overlapping(const struct range_table *table, uintptr_t base, size_t size) {
    size_t index = first_ending_above(table, base);
    if (index == table->count || size == 0) {
        return NULL;
    }
    struct range *range = table->items[index];
    return range->base <= base || range->base - base < size ? range : NULL;
}

void *range_containing(const struct range_table *table, uintptr_t address) {
    return range_overlapping(table, address, 1);
}

bool range_insert(struct range_table *table, struct range *range) {
    if (table->count == table->capacity) {
        size_t capacity = table->capacity ? table->capacity * 2 : 64;
        struct range **items = realloc(table->items, capacity * sizeof *items);
        if (!items) {
            return false;
        }
        table->items = items;
        table->capacity = capacity;
    }
    size_t index = first_ending_above(table, range->base);
    memmove(&table->items[index + 1], &table->items[index], (table->count - index) * sizeof *table->items);
    table->items[index] = range;
    table->count++;
    return true;
}

void range_remove(struct range_table *table, struct range *range) {
    size_t index = first_ending_above(table, range->base);
    if (index < table->count && table->items[index] == range) {
        table->count--;
        memmove(&table->items[index], &table->items[index + 1], (table->count - index) * sizeof *table->items);
    }
}
