// The keyed 128-bit fingerprint that src/device/fingerprint.rs defines: one thread block for each
// block of memory. Compiled by compile.py beside this file (the command is there):
//
//     src/device/cuda/kernels/compile.py nvidia/cuda_nvrtc/lib/libnvrtc.so.12
//
// Thread t takes chunk t of every step of 16 KiB and evaluates the polynomial of its chunks at
// r^512; then neighbours are joined, the left one times the power of r that stands between them.

typedef unsigned long long u64;

struct Key {
    unsigned nh[2][16];
    u64 powers[2][10]; // r^1, r^2, r^4, ... r^512
};

struct Block {
    u64 address, bytes;
};

struct Print {
    u64 lanes[2];
};

enum { THREADS = 256, WARP = 32, ROWS = 4, STEP = THREADS * ROWS * 16 };
#define ALL 0xffffffffu
#define P ((1ull << 61) - 1)

struct Chunk {
    uint4 rows[ROWS];
};

// A number below 2^61 + 8 that is equal mod P to 2^64 high + low, which is below 2^124.
static __device__ u64 fold(u64 high, u64 low) {
    u64 folded = (low & P) + (high << 3 | low >> 61);
    return (folded & P) + (folded >> 61);
}

// value * point + added mod P, for numbers below 2^61 + 8.
static __device__ u64 times_plus(u64 value, u64 point, u64 added) {
    u64 low = value * point, high = __umul64hi(value, point);
    low += added;
    high += low < added;
    return fold(high, low);
}

static __device__ u64 pair(uint4 one, uint4 other, const unsigned *key) {
    return u64(one.x + key[0]) * u64(other.x + key[4]) + u64(one.y + key[1]) * u64(other.y + key[5]) +
           u64(one.z + key[2]) * u64(other.z + key[6]) + u64(one.w + key[3]) * u64(other.w + key[7]);
}

// sum * r^512 + upper half of NH * r + lower half of NH.
static __device__ u64 add_chunk(u64 sum, const Chunk &chunk, const unsigned *nh, const u64 *powers) {
    u64 value = pair(chunk.rows[0], chunk.rows[1], nh) + pair(chunk.rows[2], chunk.rows[3], nh + 8);
    u64 upper = value >> 32, lower = value & 0xffffffffu;
    u64 low = upper * powers[0] + lower;
    u64 high = __umul64hi(upper, powers[0]) + (low < lower);
    u64 product = sum * powers[9];
    low += product;
    high += __umul64hi(sum, powers[9]) + (low < product);
    return fold(high, low);
}

// Of a step that is there as a whole.
static __device__ Chunk load(const uint4 *from) {
    Chunk chunk;
#pragma unroll
    for (unsigned row = 0; row < ROWS; row++) {
        chunk.rows[row] = __ldcs(from + row * WARP);
    }
    return chunk;
}

// 16 bytes of which `left` are there, zero bytes behind them.
static __device__ uint4 load_end(const uint4 *from, long long left) {
    if (left >= 16) {
        return __ldcs(from);
    }
    unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
    for (unsigned at = 0; at < 16; at++) {
        if (at < left) {
            unsigned byte = __ldcs(reinterpret_cast<const unsigned char *>(from) + at);
            words[at / 4] |= byte << at % 4 * 8;
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

static __device__ Chunk load_rest(const uint4 *from, long long left) {
    Chunk chunk;
#pragma unroll
    for (unsigned row = 0; row < ROWS; row++) {
        chunk.rows[row] = load_end(from + row * WARP, left - (long long)(row * WARP * 16));
    }
    return chunk;
}

// Joins the sums of `width` neighbouring lanes into the first one's. They stand `distance` times
// 2 powers of r apart, and `powers` begins with r^(2 * distance).
static __device__ u64 joined(u64 sum, unsigned width, const u64 *powers) {
#pragma unroll
    for (unsigned step = 1; step < width; step *= 2, powers++) {
        u64 right = __shfl_down_sync(ALL, sum, step);
        sum = times_plus(sum, *powers, right);
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(256, 4)
    tms_fingerprint(const __grid_constant__ Key key, const Block *blocks, Print *prints, unsigned count) {
    __shared__ u64 of_warps[2][THREADS / WARP];
    unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (u64 at = blockIdx.x; at < count; at += gridDim.x) {
        u64 address = blocks[at].address, bytes = blocks[at].bytes;
        u64 start = warp * WARP * ROWS * 16 + lane * 16;
        const uint4 *from = reinterpret_cast<const uint4 *>(address + start);
        u64 sums[2] = {0, 0};
        u64 left = bytes;
        for (; left >= 2 * STEP; left -= 2 * STEP, from += 2 * STEP / 16) {
            Chunk one = load(from), two = load(from + STEP / 16);
#pragma unroll
            for (unsigned i = 0; i < 2; i++) {
                sums[i] = add_chunk(sums[i], one, key.nh[i], key.powers[i]);
                sums[i] = add_chunk(sums[i], two, key.nh[i], key.powers[i]);
            }
        }
        while (left > 0) {
            Chunk chunk = load_rest(from, (long long)left - (long long)start);
#pragma unroll
            for (unsigned i = 0; i < 2; i++) {
                sums[i] = add_chunk(sums[i], chunk, key.nh[i], key.powers[i]);
            }
            left -= left < STEP ? left : STEP;
            from += STEP / 16;
        }
#pragma unroll
        for (unsigned i = 0; i < 2; i++) {
            u64 sum = joined(sums[i], WARP, key.powers[i] + 1);
            if (lane == 0) {
                of_warps[i][warp] = sum;
            }
        }
        __syncthreads();
        if (warp == 0) {
#pragma unroll
            for (unsigned i = 0; i < 2; i++) {
                u64 sum = joined(of_warps[i][lane % (THREADS / WARP)], THREADS / WARP, key.powers[i] + 6);
                sum = times_plus(sum, key.powers[i][0], bytes);
                if (lane == 0) {
                    prints[at].lanes[i] = sum < P ? sum : sum - P;
                }
            }
        }
        __syncthreads();
    }
}
