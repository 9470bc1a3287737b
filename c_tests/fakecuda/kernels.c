/* Models of the kernels of the library under test, so that it runs unchanged on the software
 * driver. They read and write as a kernel does: device memory with the rights of the launching
 * device, and registered host memory; anything else ends the launch as an illegal address. Written
 * from the definitions (src/device/fingerprint.rs), not from the kernels. */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* The arguments of a launch, if it has these and no others. */
static bool arguments(const struct fakecuda_launch *launch, unsigned count, const size_t *sizes, void **out) {
    if (launch->param_count != count) {
        return false;
    }
    for (unsigned i = 0; i < count; i++) {
        if (launch->param_sizes[i] != sizes[i]) {
            return false;
        }
        memcpy(out[i], launch->params[i], sizes[i]);
    }
    return true;
}

/* A launch that the kernel is not written for touches nothing it may touch. */
static void refuse(const struct fakecuda_launch *launch) {
    fakecuda_kernel_write(launch, 0, "", 1);
}

/* ---- tms_copy_pieces(const Piece *list, u32 count) ---- */

struct piece {
    uint64_t destination, source, bytes;
};

static bool copy_piece(const struct fakecuda_launch *launch, const struct piece *piece, char *buffer, size_t capacity) {
    for (uint64_t done = 0; done < piece->bytes;) {
        size_t part = piece->bytes - done < capacity ? (size_t)(piece->bytes - done) : capacity;
        if (fakecuda_kernel_read(launch, piece->source + done, buffer, part) ||
            fakecuda_kernel_write(launch, piece->destination + done, buffer, part)) {
            return false;
        }
        done += part;
    }
    return true;
}

/* Pieces have no order among each other: the last comes first. */
void copy_pieces_kernel(const struct fakecuda_launch *launch) {
    enum { CAPACITY = 1 << 20 };
    uint64_t list;
    uint32_t count;
    if (!arguments(launch, 2, (size_t[]){sizeof list, sizeof count}, (void *[]){&list, &count}) || launch->block[0] != 256) {
        refuse(launch);
        return;
    }
    char *buffer = malloc(CAPACITY);
    for (uint32_t i = count; buffer && i-- > 0;) {
        struct piece piece;
        if (fakecuda_kernel_read(launch, list + i * sizeof piece, &piece, sizeof piece) ||
            !copy_piece(launch, &piece, buffer, CAPACITY)) {
            break;
        }
    }
    free(buffer);
}

/* ---- tms_fingerprint(Key key, const Block *blocks, Print *prints, u32 count) ---- */

enum { STEP = 16384, CHUNKS = STEP / 64 };
static const uint64_t P = ((uint64_t)1 << 61) - 1;

struct key {
    uint32_t nh[2][16];
    uint64_t powers[2][10];
};

struct block {
    uint64_t address, bytes;
};

static uint64_t times_plus(uint64_t value, uint64_t point, uint64_t added) {
    unsigned __int128 sum = (unsigned __int128)value * point + added;
    uint64_t folded = ((uint64_t)sum & P) + (uint64_t)(sum >> 61); /* 2^61 is 1 */
    return folded >= P ? folded - P : folded;
}

/* NH of chunk `chunk` of a step. */
static uint64_t nh(const uint32_t *key, const unsigned char *step, unsigned chunk) {
    const unsigned char *first = step + chunk / 32 * 2048 + chunk % 32 * 16;
    uint32_t words[16];
    for (unsigned row = 0; row < 4; row++) {
        memcpy(words + row * 4, first + row * 512, 16);
    }
    uint64_t sum = 0;
    for (unsigned pair = 0; pair < 8; pair++) {
        unsigned one = pair / 4 * 8 + pair % 4, other = one + 4;
        sum += (uint64_t)(uint32_t)(words[one] + key[one]) * (uint32_t)(words[other] + key[other]);
    }
    return sum;
}

/* The coefficients one by one, `bytes` padded to whole steps. */
static void print_of(const struct key *key, const unsigned char *bytes, size_t length, uint64_t *print) {
    for (unsigned lane = 0; lane < 2; lane++) {
        uint64_t point = key->powers[lane][0], value = 0;
        for (size_t step = 0; step < length; step += STEP) {
            for (unsigned chunk = 0; chunk < CHUNKS; chunk++) {
                uint64_t sum = nh(key->nh[lane], bytes + step, chunk);
                value = times_plus(value, point, sum >> 32);
                value = times_plus(value, point, sum & 0xffffffff);
            }
        }
        print[lane] = times_plus(value, point, length);
    }
}

static bool fingerprint_block(const struct fakecuda_launch *launch, const struct key *key, const struct block *block, uint64_t *print) {
    size_t padded = (block->bytes + STEP - 1) / STEP * STEP;
    unsigned char *bytes = calloc(1, padded + 1);
    bool read = bytes && block->address % 16 == 0 && fakecuda_kernel_read(launch, block->address, bytes, block->bytes) == 0;
    if (read) {
        print_of(key, bytes, block->bytes, print);
    }
    free(bytes);
    return read;
}

void fingerprint_kernel(const struct fakecuda_launch *launch) {
    struct key key;
    uint64_t blocks, prints;
    uint32_t count;
    const size_t sizes[] = {sizeof key, sizeof blocks, sizeof prints, sizeof count};
    if (!arguments(launch, 4, sizes, (void *[]){&key, &blocks, &prints, &count}) || launch->block[0] != 256) {
        refuse(launch);
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        struct block block;
        uint64_t print[2];
        if (fakecuda_kernel_read(launch, blocks + i * sizeof block, &block, sizeof block)) {
            return;
        }
        if (!fingerprint_block(launch, &key, &block, print)) {
            refuse(launch);
            return;
        }
        if (fakecuda_kernel_write(launch, prints + i * sizeof print, print, sizeof print)) {
            return;
        }
    }
}
