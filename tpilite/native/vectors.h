/* Vectors of float32, as wide as the processor has them, and the instructions that compilers do not find alone. */

#ifndef TPILITE_VECTORS_H
#define TPILITE_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#ifndef VECTOR
#define VECTOR 32
#endif
#define SHORTS(p) ((Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define HALVES(p) ((Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#if VECTOR == 64
#define ALL(number) ((Floats)_mm512_set1_ps(number))
#define MULTIPLY_ADD(a, b, c) ((Floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#else
#define ALL(number) ((Floats)_mm256_set1_ps(number))
#define MULTIPLY_ADD(a, b, c) ((Floats)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#endif
#define LOOK_UP(table, places) ((Bytes)_mm_shuffle_epi8((__m128i)(table), (__m128i)(places)))
#define CODES 32
#define REPEATED(...) {__VA_ARGS__, __VA_ARGS__} /* a table for LOOK_UP_CODES, which looks up in each 16 bytes */
#define LOOK_UP_CODES(table, places) ((CodeBytes)_mm256_shuffle_epi8((__m256i)(table), (__m256i)(places)))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define VECTOR 16
#define SHORTS(p) ((Words)vmovl_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t *)(p)))))
#define HALVES(p) ((Floats)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *)(p)))))
#define ALL(number) ((Floats)vdupq_n_f32(number))
#define MULTIPLY_ADD(a, b, c) ((Floats)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define LOOK_UP(table, places) ((Bytes)vqtbl1q_u8((uint8x16_t)(table), (uint8x16_t)(places)))
#define CODES 16
#define REPEATED(...) {__VA_ARGS__}
#define LOOK_UP_CODES LOOK_UP
#else
#error "there are no vectors for this processor here: NumPy does the products"
#endif

#define LANES (VECTOR / 4)
#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(VECTOR)));
typedef uint32_t Words __attribute__((vector_size(VECTOR)));
typedef int32_t Signed __attribute__((vector_size(VECTOR)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t CodeBytes __attribute__((vector_size(CODES)));
typedef float AnyFloats __attribute__((vector_size(VECTOR), aligned(1), may_alias));

INLINE Floats load(const void *p) { return *(const AnyFloats *)p; }

INLINE void store(float *p, Floats v) { *(AnyFloats *)p = v; }

INLINE Floats last_floats(const float *x, int64_t n_cols, int64_t at) {
    float rest[LANES] = {0};
    memcpy(rest, x + at, 4 * (n_cols - at));
    return load(rest);
}

INLINE Bytes load_bytes(const void *p) {
    Bytes bytes;
    memcpy(&bytes, p, sizeof bytes);
    return bytes;
}

INLINE CodeBytes load_codes(const void *p) {
    CodeBytes bytes;
    memcpy(&bytes, p, sizeof bytes);
    return bytes;
}

/* Sixteen signed bytes as floats. */
INLINE void widen_bytes(Bytes bytes, Floats out[16 / LANES]) {
#if VECTOR == 64
    out[0] = (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
#elif defined(__x86_64__)
    __m128i low = (__m128i)bytes;
    out[0] = (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low));
    out[1] = (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(low, low)));
#else
    int16x8_t low = vmovl_s8(vget_low_s8((int8x16_t)bytes)), high = vmovl_high_s8((int8x16_t)bytes);
    out[0] = (Floats)vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    out[1] = (Floats)vcvtq_f32_s32(vmovl_high_s16(low));
    out[2] = (Floats)vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    out[3] = (Floats)vcvtq_f32_s32(vmovl_high_s16(high));
#endif
}

/* The float16 at an address. */
INLINE float half_at(const void *p) {
#if defined(__x86_64__)
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    return _cvtsh_ss(bits);
#else
    __fp16 half;
    memcpy(&half, p, sizeof half);
    return half;
#endif
}

INLINE float total(Floats v) {
    float lanes[LANES];
    memcpy(lanes, &v, sizeof lanes);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
}

#endif
