/* GGML's block types: what lies in a block, and its weights. linear/block_types.py says the same in NumPy;
 * docs/block-types.md says how to add a type.
 *
 * A type has three things here: its size, what its groups are multiplied by (`scales_of`), and the codes of 32 of
 * its weights (`codes_of`). `weights_of` makes weights of them: scale * code + minimum.
 */

#ifndef TPILITE_BLOCK_TYPES_H
#define TPILITE_BLOCK_TYPES_H

#include "piece.h"
#include "vectors.h"

/* Of a block, and of a type whose blocks have a minimum beside each scale. */
typedef struct {
    int n_weights, n_bytes, has_minimum;
} BlockType;

/* The compiler knows the type wherever speed matters. */
INLINE BlockType block_type(int64_t type) {
    switch (type) {
    case Q4_0: return (BlockType){32, 18, 0};
    case Q4_1: return (BlockType){32, 20, 1};
    case Q5_0: return (BlockType){32, 22, 0};
    case Q5_1: return (BlockType){32, 24, 1};
    case Q8_0: return (BlockType){32, 34, 0};
    case IQ4_NL: return (BlockType){32, 18, 0};
    case Q4_K: return (BlockType){256, 144, 1};
    case Q5_K: return (BlockType){256, 176, 1};
    case Q6_K: return (BlockType){256, 210, 0};
    default: return (BlockType){256, 136, 0}; /* IQ4_XS */
    }
}

typedef uint32_t FourWords __attribute__((vector_size(16)));

/* ---- codes ---- */

/* The codes of 32 weights: signed bytes. */
typedef struct {
    Bytes half[2];
} Codes;

/* All bytes `n` bits to the right, or -n to the left, with bits of neighbours in the places that become free: there
 * are no such instructions for single bytes. */
INLINE Bytes moved(Bytes bytes, int n) {
    typedef uint16_t Shorts __attribute__((vector_size(16)));
    return n > 0 ? (Bytes)((Shorts)bytes >> n) : (Bytes)((Shorts)bytes << -n);
}

/* The lower halves of the 16 bytes, then the upper ones. */
INLINE Codes halves(const uint8_t *p) {
    Bytes bytes = load_bytes(p);
    return (Codes){{bytes & 15, moved(bytes, 4) & 15}};
}

/* The lower halves of the 32 bytes, or the upper ones. */
INLINE Codes one_half(const uint8_t *p, int upper) {
    Bytes first = load_bytes(p), second = load_bytes(p + 16);
    if (upper) first = moved(first, 4), second = moved(second, 4);
    return (Codes){{first & 15, second & 15}};
}

/* `value` in the bytes whose bits under the mask are not zero. */
INLINE Bytes where(Bytes bytes, Bytes mask, int value) { return (Bytes)((bytes & mask) == mask) & (uint8_t)value; }

/* Adds 16 to each code whose bit in the 32 at p is set. */
INLINE Codes add_fifth_bits(Codes codes, const uint8_t *p) {
    const Bytes bits = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const Bytes first = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    uint32_t four;
    memcpy(&four, p, sizeof four);
    Bytes fifth = (Bytes)(FourWords){four};
    codes.half[0] |= where(LOOK_UP(fifth, first), bits, 16);
    codes.half[1] |= where(LOOK_UP(fifth, first + 2), bits, 16);
    return codes;
}

INLINE Codes less(Codes codes, int n) {
    return (Codes){{codes.half[0] - (uint8_t)n, codes.half[1] - (uint8_t)n}};
}

INLINE Codes from_table(Codes places) {
    const Bytes table = {(uint8_t)-127, (uint8_t)-104, (uint8_t)-83, (uint8_t)-65, (uint8_t)-49, (uint8_t)-35,
                         (uint8_t)-22,  (uint8_t)-10,  1,            13,           25,           38,
                         53,            69,            89,           113};
    return (Codes){{LOOK_UP(table, places.half[0]), LOOK_UP(table, places.half[1])}};
}

INLINE Codes q5_k_codes(const uint8_t *block, int group) {
    Codes codes = one_half(block + 48 + group / 2 * 32, group % 2);
    Bytes bit = (Bytes){0} + (uint8_t)(1 << group);
    codes.half[0] |= where(load_bytes(block + 16), bit, 16);
    codes.half[1] |= where(load_bytes(block + 32), bit, 16);
    return codes;
}

INLINE Codes q6_k_codes(const uint8_t *block, int group) {
    const uint8_t *upper = block + 128 + group / 4 * 32;
    Codes codes = one_half(block + group / 4 * 64 + group % 2 * 32, group % 4 / 2);
    for (int i = 0; i < 2; i++) /* two bits into places 4 and 5 */
        codes.half[i] |= moved(load_bytes(upper + 16 * i), group % 4 * 2 - 4) & 48;
    return less(codes, 32);
}

/* Of the weights of a group of 32, the first of the block if it has no others. */
INLINE Codes codes_of(int64_t type, const uint8_t *block, int group) {
    switch (type) {
    case Q4_0: return less(halves(block + 2), 8);
    case Q4_1: return halves(block + 4);
    case Q5_0: return less(add_fifth_bits(halves(block + 6), block + 2), 16);
    case Q5_1: return add_fifth_bits(halves(block + 8), block + 4);
    case Q8_0: return (Codes){{load_bytes(block + 2), load_bytes(block + 18)}};
    case IQ4_NL: return from_table(halves(block + 2));
    case Q4_K: return one_half(block + 16 + group / 2 * 32, group % 2);
    case Q5_K: return q5_k_codes(block, group);
    case Q6_K: return q6_k_codes(block, group);
    default: return from_table(halves(block + 8 + group * 16)); /* IQ4_XS */
    }
}

/* ---- scales ---- */

/* What the codes of each 32 weights are multiplied by, from of[0] on, and what is added then, from of[8] on. Q6_K has
 * 16 of the former, for 16 weights each. */
typedef struct {
    float of[16];
} Scales;

/* Of signed bytes, the first eight times `first`, the last eight times `last`. */
INLINE void multiply_bytes(Bytes bytes, float first, float last, Scales *scales) {
    Floats floats[16 / LANES];
    widen_bytes(bytes, floats);
    for (int v = 0; v < 16 / LANES; v++) {
        Words is_first;
        for (int i = 0; i < LANES; i++) is_first[i] = v * LANES + i < 8 ? 0xffffffff : 0;
        Words factors = ((Words)ALL(first) & is_first) | ((Words)ALL(last) & ~is_first);
        store(scales->of + v * LANES, floats[v] * (Floats)factors);
    }
}

INLINE void q4_k_scales(const uint8_t *block, Scales *scales) {
    uint32_t first, second, both; /* four of six bits in each; groups 4 to 7 have theirs in two places */
    memcpy(&first, block + 4, 4), memcpy(&second, block + 8, 4), memcpy(&both, block + 12, 4);
    FourWords codes = {first & 0x3f3f3f3f, (both & 0x0f0f0f0f) | (first >> 2 & 0x30303030), second & 0x3f3f3f3f,
                       (both >> 4 & 0x0f0f0f0f) | (second >> 2 & 0x30303030)};
    multiply_bytes((Bytes)codes, half_at(block), -half_at(block + 2), scales);
}

INLINE void q6_k_scales(const uint8_t *block, Scales *scales) {
    float scale = half_at(block + 208);
    multiply_bytes(load_bytes(block + 192), scale, scale, scales);
}

INLINE void iq4_xs_scales(const uint8_t *block, Scales *scales) {
    float scale = half_at(block);
    int upper = block[2] | block[3] << 8;
    for (int i = 0; i < 8; i++) {
        int lower = block[4 + i / 2] >> i % 2 * 4 & 15;
        scales->of[i] = scale * ((lower | (upper >> 2 * i & 3) << 4) - 32);
    }
}

INLINE void scales_of(int64_t type, const uint8_t *block, Scales *scales) {
    if (block_type(type).n_weights == 32) {
        scales->of[0] = half_at(block);
        if (block_type(type).has_minimum) scales->of[8] = half_at(block + 2);
        return;
    }
    switch (type) {
    case Q4_K:
    case Q5_K: q4_k_scales(block, scales); break;
    case Q6_K: q6_k_scales(block, scales); break;
    case IQ4_XS: iq4_xs_scales(block, scales); break;
    }
    /* In memory, from where one instruction brings one of them into all lanes. In a register it takes three. */
    __asm__ volatile("" : "+m"(*scales));
}

/* ---- weights ---- */

/* Those of a group of 32. Each is rounded in the same way wherever this is called. */
INLINE void weights_of(int64_t type, const uint8_t *block, const Scales *scales, int group,
                       Floats out[32 / LANES]) {
    Codes codes = codes_of(type, block, group);
    for (int i = 0; i < 2; i++) {
        float scale = scales->of[type == Q6_K ? 2 * group + i : group];
        Floats *half = out + i * 16 / LANES;
        widen_bytes(codes.half[i], half);
        for (int v = 0; v < 16 / LANES; v++)
            half[v] = block_type(type).has_minimum
                          ? MULTIPLY_ADD(half[v], ALL(scale), ALL(scales->of[8 + group]))
                          : half[v] * ALL(scale);
    }
}

#endif
