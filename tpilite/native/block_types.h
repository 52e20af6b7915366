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
enum { PARTS = 32 / CODES };
typedef struct {
    CodeBytes part[PARTS];
} Codes;

/* The first 16 codes, or the last. */
INLINE Bytes half_of(Codes codes, int half) {
#if CODES == 32
    __m256i all = (__m256i)codes.part[0];
    return (Bytes)(half ? _mm256_extracti128_si256(all, 1) : _mm256_castsi256_si128(all));
#else
    return codes.part[half];
#endif
}

INLINE Codes from_halves(Bytes first, Bytes last) {
#if CODES == 32
    return (Codes){{(CodeBytes)_mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)first), (__m128i)last, 1)}};
#else
    return (Codes){{first, last}};
#endif
}

/* All bytes `n` bits to the right, or -n to the left, with bits of neighbours in the places that become free: there
 * are no such instructions for single bytes. */
INLINE CodeBytes moved(CodeBytes bytes, int n) {
    typedef uint16_t Shorts __attribute__((vector_size(CODES)));
    return n > 0 ? (CodeBytes)((Shorts)bytes >> n) : (CodeBytes)((Shorts)bytes << -n);
}

/* Where 32 codes of four bits lie: in the lower halves of 32 bytes, in the upper ones, or in both of 16 bytes. */
typedef struct {
    const uint8_t *bytes;
    enum { LOWER, UPPER, BOTH } halves;
} Nibbles;

INLINE Nibbles both_halves(const uint8_t *p) { return (Nibbles){p, BOTH}; }

INLINE Nibbles one_half(const uint8_t *p, int upper) { return (Nibbles){p, upper ? UPPER : LOWER}; }

/* Four bits of each code, of all types but Q8_0. */
INLINE Nibbles nibbles_of(int64_t type, const uint8_t *block, int group) {
    switch (type) {
    case Q4_1: return both_halves(block + 4);
    case Q5_0: return both_halves(block + 6);
    case Q5_1: return both_halves(block + 8);
    case Q4_K: return one_half(block + 16 + group / 2 * 32, group % 2);
    case Q5_K: return one_half(block + 48 + group / 2 * 32, group % 2);
    case Q6_K: return one_half(block + group / 4 * 64 + group % 2 * 32, group % 4 / 2);
    case IQ4_XS: return both_halves(block + 8 + group * 16);
    default: return both_halves(block + 2);
    }
}

INLINE Codes read_nibbles(Nibbles nibbles) {
    Codes codes;
    if (nibbles.halves == BOTH) {
        typedef uint16_t Shorts __attribute__((vector_size(16)));
        Bytes bytes = load_bytes(nibbles.bytes);
        codes = from_halves(bytes, (Bytes)((Shorts)bytes >> 4));
        for (int i = 0; i < PARTS; i++) codes.part[i] &= 15;
    } else {
        for (int i = 0; i < PARTS; i++) {
            CodeBytes bytes = load_codes(nibbles.bytes + CODES * i);
            codes.part[i] = (nibbles.halves == UPPER ? moved(bytes, 4) : bytes) & 15;
        }
    }
    return codes;
}

/* 16 in the bytes whose bits under the mask are set. */
INLINE CodeBytes fifth_bit(CodeBytes bytes, CodeBytes mask) { return (CodeBytes)((bytes & mask) == mask) & 16; }

/* Adds 16 to each code whose bit in the 32 at p is set. */
INLINE Codes add_fifth_bits(Codes codes, const uint8_t *p) {
    typedef uint32_t CodeWords __attribute__((vector_size(CODES)));
    const CodeBytes bits = REPEATED(1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128);
#if CODES == 32
    CodeBytes places = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3};
#else
    CodeBytes places = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
#endif
    uint32_t four;
    memcpy(&four, p, sizeof four);
    for (int i = 0; i < PARTS; i++, places += 2)
        codes.part[i] |= fifth_bit(LOOK_UP_CODES((CodeBytes)((CodeWords){0} + four), places), bits);
    return codes;
}

/* Of the 32 bytes each has the bits of one code in all groups: adds 16 to codes whose bit of this group is set. */
INLINE Codes add_fifth_bits_of_group(Codes codes, const uint8_t *bytes, int group) {
    for (int i = 0; i < PARTS; i++) codes.part[i] |= moved(load_codes(bytes + CODES * i), group - 4) & 16;
    return codes;
}

/* Two bits each into places 4 and 5. */
INLINE Codes add_upper_bits(Codes codes, const uint8_t *block, int group) {
    const uint8_t *upper = block + 128 + group / 4 * 32;
    for (int i = 0; i < PARTS; i++) codes.part[i] |= moved(load_codes(upper + CODES * i), group % 4 * 2 - 4) & 48;
    return codes;
}

INLINE Codes less(Codes codes, int n) {
    for (int i = 0; i < PARTS; i++) codes.part[i] -= (uint8_t)n;
    return codes;
}

#define IQ4_VALUES -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113

INLINE Codes from_table(Codes places) {
    typedef int8_t SignedBytes __attribute__((vector_size(CODES)));
    const SignedBytes table = REPEATED(IQ4_VALUES);
    for (int i = 0; i < PARTS; i++) places.part[i] = LOOK_UP_CODES(table, places.part[i]);
    return places;
}

/* Of the weights of a group of 32, the first of the block if it has no others; for all types but Q8_0, whose codes lie
 * there as they are. */
INLINE Codes codes_of(int64_t type, const uint8_t *block, int group) {
    Codes codes = read_nibbles(nibbles_of(type, block, group));
    switch (type) {
    case Q4_0: return less(codes, 8);
    case Q5_0: return less(add_fifth_bits(codes, block + 2), 16);
    case Q5_1: return add_fifth_bits(codes, block + 4);
    case Q5_K: return add_fifth_bits_of_group(codes, block + 16, group);
    case Q6_K: return less(add_upper_bits(codes, block, group), 32);
    case IQ4_NL:
    case IQ4_XS: return from_table(codes);
    default: return codes;
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

/* Codes of six bits: of groups 0 to 3 in bytes 4 to 7, and their minima in 8 to 11; of groups 4 to 7 four bits are in
 * the halves of bytes 12 to 15, and the upper two in the bytes before. */
INLINE void q4_k_scales(const uint8_t *block, Scales *scales) {
    const Bytes lower = {4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15};
    const Bytes upper = {128, 128, 128, 128, 4, 5, 6, 7, 128, 128, 128, 128, 8, 9, 10, 11}; /* 128: zero */
    const FourWords places = {0, 0, 0, 4}, bits = {0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f};
    Bytes bytes = load_bytes(block);
    FourWords codes = (FourWords)LOOK_UP(bytes, lower) >> places & bits;
    codes |= (FourWords)LOOK_UP(bytes, upper) >> 2 & 0x30303030;
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

/* scale * code + minimum, if the type has one. */
INLINE Floats scaled(int64_t type, Floats codes, const Scales *scales, int group, int half) {
    float scale = scales->of[type == Q6_K ? 2 * group + half : group];
    return block_type(type).has_minimum ? MULTIPLY_ADD(codes, ALL(scale), ALL(scales->of[8 + group]))
                                        : codes * ALL(scale);
}

#if VECTOR == 64
/* The types that have no more than 16 different codes in a group: a register holds the weights of all of them, from
 * which one instruction takes 16. */
INLINE int has_16_codes(int64_t type) {
    return type == Q4_0 || type == Q4_1 || type == Q4_K || type == IQ4_NL || type == IQ4_XS;
}

INLINE void look_up_weights(int64_t type, const uint8_t *block, const Scales *scales, int group, Floats out[2]) {
    const Floats counted = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, iq4 = {IQ4_VALUES};
    Floats codes = type == IQ4_NL || type == IQ4_XS ? iq4 : type == Q4_0 ? counted - ALL(8) : counted;
    Floats weights = scaled(type, codes, scales, group, 0);
    Nibbles nibbles = nibbles_of(type, block, group);
    for (int i = 0; i < 2; i++) {
        const uint8_t *bytes = nibbles.bytes + (nibbles.halves == BOTH ? 0 : 16 * i);
        __m512i places = _mm512_cvtepu8_epi32((__m128i)load_bytes(bytes));
        if (nibbles.halves == UPPER || (nibbles.halves == BOTH && i)) places = _mm512_srli_epi32(places, 4);
        out[i] = (Floats)_mm512_permutexvar_ps(places, (__m512)weights); /* by the last four bits of a place */
    }
}
#endif

/* Those of a group of 32. Each is rounded in the same way wherever this is called. */
INLINE void weights_of(int64_t type, const uint8_t *block, const Scales *scales, int group,
                       Floats out[32 / LANES]) {
#if VECTOR == 64
    if (has_16_codes(type)) {
        look_up_weights(type, block, scales, group, out);
        return;
    }
#endif
    Codes codes = codes_of(type, block, group);
    for (int i = 0; i < 2; i++) {
        Floats *half = out + i * 16 / LANES;
        widen_bytes(type == Q8_0 ? load_bytes(block + 2 + 16 * i) : half_of(codes, i), half);
        for (int v = 0; v < 16 / LANES; v++) half[v] = scaled(type, half[v], scales, group, i);
    }
}

#endif
