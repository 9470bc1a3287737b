// Copies a list of pieces between any memory that the device can reach: one warp for each piece,
// warps take pieces in turn. Compiled by compile.py beside this file (the command is there):
//
//     src/device/cuda/kernels/compile.py nvidia/cuda_nvrtc/lib/libnvrtc.so.12
//
// Over the bus what counts is the number of bytes asked for at once: a thread has eight loads of 16
// bytes in flight, a warp 4 KiB. The list lies in pinned host memory, so that a launch needs no copy
// before it; each warp reads its next entry while it copies the one before.

typedef unsigned long long u64;

struct Piece {
    u64 destination, source, bytes;
};

enum { WARP = 32, LOADS = 8 };
#define ALL 0xffffffffu

// The `lane`th number of an entry; 0 for other lanes and beyond the end.
static __device__ u64 field(const Piece *list, u64 at, unsigned count, unsigned lane) {
    return lane < 3 && at < count ? __ldcs(reinterpret_cast<const u64 *>(list + at) + lane) : 0;
}

static __device__ void copy_aligned(uint4 *to, const uint4 *from, u64 vectors, unsigned lane) {
    to += lane;
    from += lane;
    u64 left = vectors;
    for (; left >= WARP * LOADS; left -= WARP * LOADS, to += WARP * LOADS, from += WARP * LOADS) {
        uint4 loaded[LOADS];
#pragma unroll
        for (unsigned i = 0; i < LOADS; i++) {
            loaded[i] = __ldcs(from + i * WARP);
        }
#pragma unroll
        for (unsigned i = 0; i < LOADS; i++) {
            __stcs(to + i * WARP, loaded[i]);
        }
    }
    uint4 loaded[LOADS];
#pragma unroll
    for (unsigned i = 0; i < LOADS; i++) {
        if (lane + i * WARP < left) {
            loaded[i] = __ldcs(from + i * WARP);
        }
    }
#pragma unroll
    for (unsigned i = 0; i < LOADS; i++) {
        if (lane + i * WARP < left) {
            __stcs(to + i * WARP, loaded[i]);
        }
    }
}

// The 16 bytes that begin `shift` bytes into two neighbouring vectors.
static __device__ uint4 joined(uint4 low, uint4 high, unsigned shift) {
    unsigned words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    if (shift & 8) {
#pragma unroll
        for (unsigned i = 0; i < 6; i++) {
            words[i] = words[i + 2];
        }
    }
    if (shift & 4) {
#pragma unroll
        for (unsigned i = 0; i < 5; i++) {
            words[i] = words[i + 1];
        }
    }
    unsigned bits = shift % 4 * 8;
    return make_uint4(__funnelshift_r(words[0], words[1], bits), __funnelshift_r(words[1], words[2], bits),
                      __funnelshift_r(words[2], words[3], bits), __funnelshift_r(words[3], words[4], bits));
}

static __device__ uint4 from_lane(uint4 value, unsigned lane) {
    return make_uint4(__shfl_sync(ALL, value.x, lane), __shfl_sync(ALL, value.y, lane), __shfl_sync(ALL, value.z, lane),
                      __shfl_sync(ALL, value.w, lane));
}

// Vector i of the destination is made of the vectors i and i + 1 at `from`, of which there are one
// more than `vectors`. Each is loaded once, by one lane, and handed to the lane before.
static __device__ void copy_shifted(uint4 *to, const uint4 *from, u64 vectors, unsigned shift, unsigned lane) {
    for (u64 start = 0; start < vectors; start += WARP * LOADS) {
        uint4 loaded[LOADS + 1];
#pragma unroll
        for (unsigned i = 0; i <= LOADS; i++) {
            u64 at = start + i * WARP + lane;
            loaded[i] = make_uint4(0, 0, 0, 0);
            // Of the last row only its first vector is needed.
            if (at <= vectors && (i < LOADS || lane == 0)) {
                loaded[i] = __ldcs(from + at);
            }
        }
#pragma unroll
        for (unsigned i = 0; i < LOADS; i++) {
            u64 at = start + i * WARP + lane;
            uint4 next = from_lane(lane == 0 ? loaded[i + 1] : loaded[i], (lane + 1) % WARP);
            if (at < vectors) {
                __stcs(to + at, joined(loaded[i], next, shift));
            }
        }
    }
}

// Whole vectors of the destination by vectors, up to 31 bytes before and behind them one by one.
static __device__ void copy_piece(u64 destination, u64 source, u64 bytes, unsigned lane) {
    u64 head = -destination % 16;
    unsigned shift = (source + head) % 16;
    // The first vector at the source must not begin before it.
    if (head < shift) {
        head += 16;
    }
    u64 vectors = 0;
    if (head > bytes) {
        head = bytes;
    } else if (shift == 0) {
        vectors = (bytes - head) / 16;
    } else if (bytes - head + shift >= 16) {
        vectors = (bytes - head + shift) / 16 - 1;
    }
    u64 tail = bytes - head - vectors * 16;
    const unsigned char *first = reinterpret_cast<const unsigned char *>(source);
    unsigned char *target = reinterpret_cast<unsigned char *>(destination);
    unsigned char before = 0, behind = 0;
    if (lane < head) {
        before = __ldcs(first + lane);
    }
    if (lane < tail) {
        behind = __ldcs(first + bytes - tail + lane);
    }
    uint4 *to = reinterpret_cast<uint4 *>(destination + head);
    const uint4 *from = reinterpret_cast<const uint4 *>(source + head - shift);
    if (shift == 0) {
        copy_aligned(to, from, vectors, lane);
    } else {
        copy_shifted(to, from, vectors, shift, lane);
    }
    if (lane < head) {
        target[lane] = before;
    }
    if (lane < tail) {
        target[bytes - tail + lane] = behind;
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) tms_copy_pieces(const Piece *list, unsigned count) {
    unsigned lane = threadIdx.x % WARP;
    u64 warps = u64(gridDim.x) * (blockDim.x / WARP);
    u64 at = u64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    u64 next = field(list, at, count, lane);
    for (; at < count; at += warps) {
        u64 entry = next;
        next = field(list, at + warps, count, lane);
        copy_piece(__shfl_sync(ALL, entry, 0), __shfl_sync(ALL, entry, 1), __shfl_sync(ALL, entry, 2), lane);
    }
}
