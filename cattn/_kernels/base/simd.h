/* The vector type `vf` and its primitives. Nothing here knows a shape or an algorithm.
 *
 * `real` is float, or double when CATTN_DOUBLE is defined; `vf` is a vector of LANES reals whose width follows the
 * compiler's flags (64 bytes with AVX-512, 32 with AVX2, else 16), `vi` the signed integers of the same lane width;
 * comparisons give vi masks of 0 and -1. GCC and Clang vector extensions, intrinsics only where those have no word:
 * max, any, widening, exp2 with AVX-512, gathering by 16 bytes. Never compile with -ffast-math: vexp2 rounds by adding and subtracting a constant.
 */
#ifndef CATTN_SIMD_H
#define CATTN_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* TILE_ROWS x PANEL_VECTORS accumulators are a register tile of projections, ATTEND_ROWS x ATTEND_VECTORS of attention.
 * With AVX-512, attention by 8 x 3 is 4 % slower than by 8 x 2, whose panels fit L1, the layer's projections are equal
 * (Zen 5), or take 0.83 to 0.95 of the time (Emerald Rapids, where another hardware thread takes half of what the core
 * decodes: 35 instructions for 24 FMAs, 26 for 16); gcc 12 spills 8 x 3 with NEON's 32 registers.
 *
 * ATTEND_FUSED: exponentials of a tile are taken from the registers of its scores, K's rows are a constant apart, see
 * prefill.pxi.
 * CATTN_BROADCAST_TILE: 16 x 1, whose broadcasts are operands of the FMAs: 17 instructions for 16 FMAs, where 8 x 2 has
 * 26. On an Intel Xeon (Emerald Rapids) attention takes 0.85 to 0.9 of the time, and 0.76 to 0.82 where another hardware
 * thread takes half of what the core decodes (double, then: 0.76 to 0.84); panels of two or three such vectors, which
 * share what they read of K and V, 1 % less still. Projections would have to copy W, for rows a constant apart: up to
 * 15 % slower, where nobody else is on the core. Not measured on AMD, whose exponentials run beside the FMAs.
 * CATTN_FUSED_TILE: 8 x 2. Of the cores of Skylake, FMAs with broadcasts run at 91 % of the peak even where all comes
 * from L1, and 16 queries reuse too little of what their 32 KB of L1 have no room for: attention takes 0.76 to 0.91 of
 * the time of 16 x 1, and 0.71 to 0.85 of that of 8 x 2 whose exponentials are woven in (Cascade Lake). */
#if defined(CATTN_BROADCAST_TILE) || defined(CATTN_FUSED_TILE)
#define ATTEND_FUSED 1
#else
#define ATTEND_FUSED 0
#endif
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define REGISTERS 32
#define TILE_ROWS 8
#if ATTEND_FUSED
#define PANEL_VECTORS 3
#else
#define PANEL_VECTORS 2
#endif
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define REGISTERS 16
#elif defined(__aarch64__)
#define VECTOR_BYTES 16
#define REGISTERS 32
#else
#define VECTOR_BYTES 16
#define REGISTERS 16
#endif
#ifndef TILE_ROWS
#define TILE_ROWS 4
#define PANEL_VECTORS 3
#endif
#if defined(CATTN_BROADCAST_TILE)
#define ATTEND_ROWS 16
#define ATTEND_VECTORS 1
#elif defined(CATTN_FUSED_TILE)
#define ATTEND_ROWS 8
#define ATTEND_VECTORS 2
#else
#define ATTEND_ROWS TILE_ROWS
#define ATTEND_VECTORS PANEL_VECTORS
#endif

#ifdef CATTN_DOUBLE
typedef double real;
typedef int64_t lane_int;
typedef uint64_t lane_bits;
#define IS_DOUBLE 1
#else
typedef float real;
typedef int32_t lane_int;
typedef uint32_t lane_bits;
#define IS_DOUBLE 0
#endif

#define LANES ((int)(VECTOR_BYTES / sizeof(real)))
#define SIMD static inline __attribute__((always_inline))

typedef real vf __attribute__((vector_size(VECTOR_BYTES)));
typedef lane_int vi __attribute__((vector_size(VECTOR_BYTES)));
typedef lane_bits vu __attribute__((vector_size(VECTOR_BYTES))); /* where sums may wrap */
typedef int8_t vb __attribute__((vector_size(VECTOR_BYTES)));
typedef int8_t vb_unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
typedef real vf_unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));

/* Into L2. On Zen 4, fetches into L1 wait for its 24 buffers of misses: half the bandwidth of memory. */
SIMD void prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }
/* p as it is, whose origin the compiler does not know: what lies around it is addressed by p and a constant. */
SIMD const real *in_register(const real *p) { __asm__("" : "+r"(p)); return p; }
SIMD const char *byte_in_register(const char *p) { __asm__("" : "+r"(p)); return p; }
/* Whether the compiler knows x, once all is inlined. */
#define is_constant(x) __builtin_constant_p(x)
SIMD vf vload(const real *p) { return *(const vf_unaligned *)p; }
SIMD void vstore(real *p, vf x) { *(vf_unaligned *)p = x; }
SIMD vf vset1(real x) { return x - (vf){0}; }        /* x - 0, not x + 0: keeps the sign of a zero */
SIMD vf vfma(vf a, vf b, vf c) { return a * b + c; } /* one instruction under -ffp-contract=fast where there is FMA */
/* The same, in c's own register: left to itself, gcc 12 lets the accumulators of an unrolled loop wander from register to
 * register, 128 instructions for 64 FMAs instead of 114. */
#if defined(CATTN_FUSED_TILE) && IS_DOUBLE
SIMD vf vfma_here(vf a, vf b, vf c) { __asm__("vfmadd231pd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); return c; }
#elif defined(CATTN_FUSED_TILE)
SIMD vf vfma_here(vf a, vf b, vf c) { __asm__("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); return c; }
#else
SIMD vf vfma_here(vf a, vf b, vf c) { return vfma(a, b, c); }
#endif
SIMD vf vselect(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
SIMD vi vless(vf a, vf b) { return a < b; }
SIMD vi vequal(vf a, vf b) { return a == b; }
SIMD vi vdiffer(vf a, vf b) { return a != b; }
/* x as it is, which the compiler takes for another number: a product that goes through here is rounded before it is
 * added to, and makes no FMA. */
#if defined(__AVX512F__)
SIMD vf vrounded(vf x) { __asm__("" : "+v"(x)); return x; }
#elif defined(__x86_64__)
SIMD vf vrounded(vf x) { __asm__("" : "+x"(x)); return x; }
#elif defined(__aarch64__)
SIMD vf vrounded(vf x) { __asm__("" : "+w"(x)); return x; }
#else
SIMD vf vrounded(vf x) { volatile vf y = x; return y; }
#endif
SIMD vf vabs(vf x) { return (vf)((vi)x & ~(vi)vset1((real)-0.0)); }
SIMD vf vcopysign(vf magnitude, vf sign) { vi s = (vi)vset1((real)-0.0); return (vf)(((vi)magnitude & ~s) | ((vi)sign & s)); }

/* max(a, b); where a is NaN the result is b, where b is NaN it is NaN (x86) or NaN in both cases (NEON). */
#if defined(__AVX512F__) && IS_DOUBLE
SIMD vf vmax(vf a, vf b) { return (vf)_mm512_max_pd((__m512d)a, (__m512d)b); }
#elif defined(__AVX512F__)
SIMD vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__) && IS_DOUBLE
SIMD vf vmax(vf a, vf b) { return (vf)_mm256_max_pd((__m256d)a, (__m256d)b); }
#elif defined(__AVX2__)
SIMD vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#elif defined(__x86_64__) && IS_DOUBLE
SIMD vf vmax(vf a, vf b) { return (vf)_mm_max_pd((__m128d)a, (__m128d)b); }
#elif defined(__x86_64__)
SIMD vf vmax(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
#elif defined(__aarch64__) && IS_DOUBLE
SIMD vf vmax(vf a, vf b) { return (vf)vmaxq_f64((float64x2_t)a, (float64x2_t)b); }
#elif defined(__aarch64__)
SIMD vf vmax(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
#else
SIMD vf vmax(vf a, vf b) { return vselect(a > b, a, b); }
#endif

/* True when any lane of a comparison's mask is set. */
SIMD int vany(vi mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(__x86_64__)
    return _mm_movemask_epi8((__m128i)mask) != 0;
#else
    lane_int any = 0;
    for (int i = 0; i < LANES; i++) any |= mask[i];
    return any != 0;
#endif
}

/* 2**x for x <= 127 (1023 in double). x = n + r with integer n; p(r) = 1 + r * (minimax polynomial of (2**r - 1) / r);
 * times 2**n. Exact at 0; exactly 0 from -127 (-1023) down, hence at -inf; a NaN, whatever its payload, stays a NaN.
 * Relative error below 1.72e-7 in float, 2e-16 in double (1.61e-7, 1.4e-16 with FMA): tests/test_kernels.py sweeps it.
 *
 * With AVX-512, one instruction splits x or rounds it, and one scales p: on Zen 4 attention takes 1.5 % less than with
 * the constant and integers, in double 4 %. What would be subnormal is 0.
 */
#if IS_DOUBLE
#define POLYNOMIAL(p, r)                            \
    vf p = vset1(4.4549605981865183938e-10);        \
    p = vfma(p, r, vset1(7.0725859492692236999e-9)); \
    p = vfma(p, r, vset1(1.0178062445845773521e-7)); \
    p = vfma(p, r, vset1(1.3215442587921689653e-6)); \
    p = vfma(p, r, vset1(1.5252733829836118394e-5)); \
    p = vfma(p, r, vset1(1.5403530441736050155e-4)); \
    p = vfma(p, r, vset1(1.333355814641693531e-3)); \
    p = vfma(p, r, vset1(9.6181291076068885273e-3)); \
    p = vfma(p, r, vset1(5.5504108664821594339e-2)); \
    p = vfma(p, r, vset1(2.402265069591009822e-1)); \
    p = vfma(p, r, vset1(6.9314718055994530942e-1)); \
    p = vfma(p, r, vset1(1));
#else
/* Degree 5: degree 6 is no more exact after rounding, degree 4 costs 2.6e-6. */
#define POLYNOMIAL(p, r)                    \
    vf p = vset1(1.32745581e-3f);           \
    p = vfma(p, r, vset1(9.67195807e-3f));  \
    p = vfma(p, r, vset1(5.55067863e-2f));  \
    p = vfma(p, r, vset1(2.40222354e-1f));  \
    p = vfma(p, r, vset1(6.93147061e-1f));  \
    p = vfma(p, r, vset1(1));
#endif
#if defined(__AVX512F__) && IS_DOUBLE
SIMD vf vexp2(vf x) {
    __m512d n = _mm512_roundscale_pd((__m512d)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = x - (vf)n;
    POLYNOMIAL(p, r)
    __mmask8 normal = _mm512_cmp_pd_mask((__m512d)x, (__m512d)vset1(-1022), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_pd(normal, (__m512d)p, n);
}
#elif defined(__AVX512F__)
/* r from 0 to 1, hence other coefficients. */
SIMD vf vexp2(vf x) {
    vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vf p = vset1(1.8671301659196615e-3f);
    p = vfma(p, r, vset1(9.016970172524452e-3f));
    p = vfma(p, r, vset1(5.5799972265958786e-2f));
    p = vfma(p, r, vset1(2.4016447365283966e-1f));
    p = vfma(p, r, vset1(6.931512951850891e-1f));
    p = vfma(p, r, vset1(1));
    __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)vset1(-126), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
}
#else
/* r from -1/2 to 1/2, by adding and subtracting a constant; n goes into the exponent bits. That addition alone could turn
 * a NaN into a number. */
SIMD vf vexp2(vf x) {
#if IS_DOUBLE
    const real lowest = -1023.0, magic = 6755399441055744.0; /* 1.5 * 2**52 */
    const int shift = 52;
#else
    const real lowest = -127.0f, magic = 12582912.0f; /* 1.5 * 2**23 */
    const int shift = 23;
#endif
    vf t = vmax(vset1(lowest), x);
    vf n = t + vset1(magic);
    vf r = t - (n - vset1(magic));
    POLYNOMIAL(p, r)
    return (vf)(((vu)p + ((vu)n << shift)) | (vu)(x != x));
}
#endif

/* Transposes the LANES x LANES matrix whose rows are r[0..LANES): log2(LANES) rounds in which rows i and i + s swap
 * the lanes that differ in bit s. */
#if defined(__clang__)
#define SHUFFLE_AS(integers, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE_AS(integers, a, b, ...) __builtin_shuffle(a, b, (integers){__VA_ARGS__})
#endif
#define SHUFFLE(a, b, ...) SHUFFLE_AS(vi, a, b, __VA_ARGS__)
#define LOW(e, s) ((e) & (s) ? LANE_COUNT + (e) - (s) : (e))
#define HIGH(e, s) ((e) & (s) ? LANE_COUNT + (e) : (e) + (s))
#if VECTOR_BYTES == 64 && !IS_DOUBLE
#define LANE_COUNT 16
#define EACH(F, s) F(0, s), F(1, s), F(2, s), F(3, s), F(4, s), F(5, s), F(6, s), F(7, s), \
                   F(8, s), F(9, s), F(10, s), F(11, s), F(12, s), F(13, s), F(14, s), F(15, s)
#elif VECTOR_BYTES == 64 || (VECTOR_BYTES == 32 && !IS_DOUBLE)
#define LANE_COUNT 8
#define EACH(F, s) F(0, s), F(1, s), F(2, s), F(3, s), F(4, s), F(5, s), F(6, s), F(7, s)
#elif VECTOR_BYTES == 32 || !IS_DOUBLE
#define LANE_COUNT 4
#define EACH(F, s) F(0, s), F(1, s), F(2, s), F(3, s)
#else
#define LANE_COUNT 2
#define EACH(F, s) F(0, s), F(1, s)
#endif
#define TRANSPOSE_ROUND(s)                                   \
    for (int i = 0; i < LANE_COUNT; i++)                     \
        if (!(i & (s))) {                                    \
            vf low = SHUFFLE(r[i], r[i + (s)], EACH(LOW, s)); \
            r[i + (s)] = SHUFFLE(r[i], r[i + (s)], EACH(HIGH, s)); \
            r[i] = low;                                      \
        }
SIMD void vtranspose(vf *r) {
#if LANE_COUNT >= 16
    TRANSPOSE_ROUND(8)
#endif
#if LANE_COUNT >= 8
    TRANSPOSE_ROUND(4)
#endif
#if LANE_COUNT >= 4
    TRANSPOSE_ROUND(2)
#endif
    TRANSPOSE_ROUND(1)
}

#define QUAD (16 / (int)sizeof(real))
/* two[0] (OUT) = 16 bytes at p, p + step, ...: a vector; with AVX-512, two[1] the next 16 bytes of each. */
#if defined(__AVX512F__)
#define QUADS_AT_ONCE 2
SIMD __m512 vload_halves(const char *low, const char *high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps((const float *)low)),
                              _mm256_loadu_ps((const float *)high), 1);
}
SIMD void vload_quads(vf *two, const char *p, intptr_t step) {
    __m512 first = vload_halves(p, p + step), last = vload_halves(p + 2 * step, p + 3 * step);
    two[0] = (vf)_mm512_shuffle_f32x4(first, last, 0x88);
    two[1] = (vf)_mm512_shuffle_f32x4(first, last, 0xdd);
}
#else
#define QUADS_AT_ONCE 1
SIMD void vload_quads(vf *two, const char *p, intptr_t step) {
#if defined(__AVX2__)
    __m256 x = _mm256_castps128_ps256(_mm_loadu_ps((const float *)p));
    two[0] = (vf)_mm256_insertf128_ps(x, _mm_loadu_ps((const float *)(p + step)), 1);
#else
    (void)step;
    two[0] = vload((const real *)p);
#endif
}
#endif
/* Of the first and of the second half (s: 0, 1) of each 16 bytes of a and b: lanes in turns, or pairs of lanes. */
#define TURNS(e, s) ((e) / QUAD * QUAD + (s) * (QUAD / 2) + (e) % QUAD / 2 + (e) % 2 * LANE_COUNT)
#define PAIRS(e, s) ((e) / QUAD * QUAD + (s) * (QUAD / 2) + (e) % 2 + (e) % QUAD / 2 * LANE_COUNT)
/* columns[c][r] (OUT), c < COLUMNS, r < LANES, = number c of the row at p + r * step, at any alignment. Gathered by 16
 * bytes from memory, so that what is left to shuffle stays within 16 bytes: half the shuffles of vtranspose. */
#define COLUMNS (QUADS_AT_ONCE * QUAD)
SIMD void vload_columns(vf *columns, const char *p, intptr_t step) {
    for (int i = 0; i < QUAD; i++, p = byte_in_register(p + step)) {
        vf two[2];
        vload_quads(two, p, QUAD * step);
        for (int t = 0; t < QUADS_AT_ONCE; t++) columns[t * QUAD + i] = two[t];
    }
    for (int q = 0; q < COLUMNS; q += QUAD) {
        vf *z = columns + q;
        vf low = SHUFFLE(z[0], z[1], EACH(TURNS, 0)), high = SHUFFLE(z[0], z[1], EACH(TURNS, 1));
#if IS_DOUBLE
        z[0] = low;
        z[1] = high;
#else
        vf low2 = SHUFFLE(z[2], z[3], EACH(TURNS, 0)), high2 = SHUFFLE(z[2], z[3], EACH(TURNS, 1));
        z[0] = SHUFFLE(low, low2, EACH(PAIRS, 0));
        z[1] = SHUFFLE(low, low2, EACH(PAIRS, 1));
        z[2] = SHUFFLE(high, high2, EACH(PAIRS, 0));
        z[3] = SHUFFLE(high, high2, EACH(PAIRS, 1));
#endif
    }
}
/* The same of all LANES columns of a square. */
SIMD void vload_square(vf *columns, const char *p, intptr_t step) {
    for (int c = 0; c < LANE_COUNT; c += COLUMNS) vload_columns(columns + c, p + c * (int)sizeof(real), step);
}

/* r[0..n) (IN/OUT), as many vectors, become one run of numbers in which those of the n vectors take turns; n: a power of
 * two. */
#define WEAVE(e, s) ((e) % 2 * LANE_COUNT + (e) / 2 + (s) * (LANE_COUNT / 2))
SIMD void vweave(vf *r, int n) {
    for (int half = n / 2; half; half /= 2)
        for (int i = 0; i < n; i++)
            if (!(i & half)) {
                vf low = SHUFFLE(r[i], r[i + half], EACH(WEAVE, 0));
                r[i + half] = SHUFFLE(r[i], r[i + half], EACH(WEAVE, 1));
                r[i] = low;
            }
}

/* What vweave(two, 2) undoes: two[0] gets the numbers of even places in the run of both, two[1] those of odd ones. */
#define UNWEAVE(e, s) (2 * (e) + (s))
SIMD void vunweave(vf *two) {
    vf even = SHUFFLE(two[0], two[1], EACH(UNWEAVE, 0));
    two[1] = SHUFFLE(two[0], two[1], EACH(UNWEAVE, 1));
    two[0] = even;
}

/* tile (OUT): -1 where rows[r][first + k], r < LANES, k < VECTOR_BYTES, is 0, else 0; transposed as bytes, with a quarter
 * of the shuffles that floats take. Each round interleaves the first half of the rows with the second, within every 16
 * bytes: in the end, the byte of row r and column k is number k % 16 * LANES + r of those of its 16 columns. */
#define PAIR(i) (i), VECTOR_BYTES + (i)
#define ZIP(i) PAIR(i), PAIR(i + 1), PAIR(i + 2), PAIR(i + 3), PAIR(i + 4), PAIR(i + 5), PAIR(i + 6), PAIR(i + 7)
#if VECTOR_BYTES == 64
#define ZIPS(i) ZIP(i), ZIP(i + 16), ZIP(i + 32), ZIP(i + 48)
#elif VECTOR_BYTES == 32
#define ZIPS(i) ZIP(i), ZIP(i + 16)
#else
#define ZIPS(i) ZIP(i)
#endif
SIMD void vfalse_tile(int8_t *tile, const char *const *rows, intptr_t first) {
    vb r[LANE_COUNT], zipped[LANE_COUNT];
    for (int i = 0; i < LANE_COUNT; i++) r[i] = (vb)(*(const vb_unaligned *)(rows[i] + first) == 0);
    for (int step = 1; step < LANE_COUNT; step *= 2) {
        for (int i = 0; i < LANE_COUNT / 2; i++) {
            zipped[2 * i] = SHUFFLE_AS(vb, r[i], r[i + LANE_COUNT / 2], ZIPS(0));
            zipped[2 * i + 1] = SHUFFLE_AS(vb, r[i], r[i + LANE_COUNT / 2], ZIPS(8));
        }
        for (int i = 0; i < LANE_COUNT; i++) r[i] = zipped[i];
    }
    for (int i = 0; i < LANE_COUNT; i++) *(vb_unaligned *)(tile + i * VECTOR_BYTES) = r[i];
}
/* Column k of a tile, as a mask of lanes. */
SIMD vi vfalse(const int8_t *tile, int k) {
    const int at = k % 16 * LANE_COUNT;
    const int8_t *p = tile + at / 16 * VECTOR_BYTES + k / 16 * 16 + at % 16;
#if defined(__AVX512F__) && IS_DOUBLE
    return (vi)_mm512_cvtepi8_epi64(_mm_loadl_epi64((const __m128i *)p));
#elif defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__) && IS_DOUBLE
    int four;
    memcpy(&four, p, 4);
    return (vi)_mm256_cvtepi8_epi64(_mm_cvtsi32_si128(four));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    vi mask;
    for (int i = 0; i < LANE_COUNT; i++) mask[i] = p[i];
    return mask;
#endif
}

/* Kernels compute in a floating-point mode of their own: to nearest, subnormal numbers kept, no traps. A process may have
 * set another (flush-to-zero is common) in some of its threads. A mode is what the CPU's register holds, less the flags
 * of what has happened; writing it costs some 20 cycles, so it is written only where it changes. */
#if defined(__x86_64__)
typedef uint32_t fp_mode;
#define OWN_MODE 0x1f80u
SIMD fp_mode get_mode(void) { fp_mode r; __asm__ volatile("stmxcsr %0" : "=m"(r)); return r & 0xffc0u; }
SIMD void set_mode(fp_mode mode) {
    if (get_mode() != mode) __asm__ volatile("ldmxcsr %0" : : "m"(mode) : "memory");
}
#elif defined(__aarch64__)
typedef uint64_t fp_mode;
#define OWN_MODE 0u
SIMD fp_mode get_mode(void) { fp_mode mode; __asm__ volatile("mrs %0, fpcr" : "=r"(mode)); return mode; }
SIMD void set_mode(fp_mode mode) {
    if (get_mode() != mode) __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory");
}
#else
typedef int fp_mode;
#define OWN_MODE 0
SIMD fp_mode get_mode(void) { return OWN_MODE; }
SIMD void set_mode(fp_mode mode) { (void)mode; }
#endif
/* x, not known before the modes that have been set: what is computed from it, is in these. */
SIMD double opaque(double x) { __asm__ volatile("" : "+m"(x)); return x; }
/* Returns the mode before, for set_mode afterwards. */
SIMD fp_mode own_mode(void) { fp_mode before = get_mode(); set_mode(OWN_MODE); return before; }

/* The 16-bit formats, one number at a time, also where subnormal numbers are flushed: they are made by integers. Widening
 * is exact; narrowing, in OWN_MODE, rounds to nearest even and keeps NaN. */
SIMD float bits_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
SIMD uint32_t float_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
SIMD float widen_bf16(uint16_t h) { return bits_float((uint32_t)h << 16); }
SIMD uint16_t narrow_bf16(float f) {
    uint32_t u = float_bits(f);
    return f != f ? (uint16_t)(u >> 16 | 64) : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
SIMD float widen_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, u = (uint32_t)(h & 0x7fff) << 13;
    if ((h & 0x7c00) == 0x7c00) return bits_float(sign | 0x7f800000 | u); /* infinity or NaN */
    if ((h & 0x7c00) == 0) return bits_float(sign | float_bits((float)(h & 0x3ff) * 0x1p-24f));
    return bits_float(sign | (u + (112 << 23))); /* the exponent's other bias */
}
SIMD uint16_t narrow_f16(float f) {
    uint32_t u = float_bits(f), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* from 65520 up rounds to infinity */
    if (u < 0x38800000)                                    /* below 2**-14: adding 1/2 rounds at 2**-24 */
        return (uint16_t)(sign | (float_bits(bits_float(u) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((u + 0xfff + (u >> 13 & 1) - 0x38000000) >> 13));
}

/* A double of magnitude below 2 to a 16-bit format with so many bits of fraction and this exponent bias, rounded once,
 * to nearest even. Not by way of float: that would be a second rounding. From the smallest normal number on: the bits
 * are cut where the fraction ends, after adding all but one half of what is cut, and the other one where the last bit
 * that stays is odd; a carry into the exponent is right as it is. Below, the format has the multiples of its smallest
 * number: adding the power of two whose last bit that number is leaves the multiple in the sum's last bits, rounded by
 * the addition. Both are computed and one taken, without a branch, for loops to be vectorised. */
SIMD uint16_t narrow_f64(double x, int fraction, int bias) {
    const uint64_t drop = 52 - fraction, magic_bits = (uint64_t)(1023 + 53 - bias - fraction) << 52;
    const uint64_t smallest_bits = (uint64_t)(1023 + 1 - bias) << 52;
    uint64_t u, sign, small, normal;
    double magnitude, magic, smallest, sum;
    memcpy(&magic, &magic_bits, 8);
    memcpy(&smallest, &smallest_bits, 8);
    memcpy(&u, &x, 8);
    sign = u >> 48 & 0x8000;
    u &= 0x7fffffffffffffff;
    memcpy(&magnitude, &u, 8);
    sum = magnitude + magic;
    memcpy(&small, &sum, 8);
    small -= magic_bits;
    normal = (u + (((uint64_t)1 << (drop - 1)) - 1) + (u >> drop & 1)) >> drop;
    normal -= (uint64_t)(1023 - bias) << fraction;
    return (uint16_t)(sign | (magnitude < smallest ? small : normal));
}
SIMD uint16_t narrow_f64_to_f16(double x) { return narrow_f64(x, 10, 15); }
SIMD uint16_t narrow_f64_to_bf16(double x) { return narrow_f64(x, 7, 127); }

/* LANES consecutive numbers of 8 or 16 bits, widened inside the load where the instruction set can. */
SIMD vf vload_bf16(const uint16_t *p) {
#if !IS_DOUBLE && defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif !IS_DOUBLE && defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    real r[LANES];
    for (int i = 0; i < LANES; i++) { uint16_t h; memcpy(&h, p + i, 2); r[i] = widen_bf16(h); }
    return vload(r);
#endif
}
SIMD vf vload_f16(const uint16_t *p) {
#if !IS_DOUBLE && defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif !IS_DOUBLE && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif !IS_DOUBLE && defined(__aarch64__)
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    real r[LANES];
    for (int i = 0; i < LANES; i++) { uint16_t h; memcpy(&h, p + i, 2); r[i] = widen_f16(h); }
    return vload(r);
#endif
}
/* LANES consecutive 16-bit numbers (OUT), at any alignment = x, with the bits of narrow_f16 and narrow_bf16: the
 * instructions for float16 would keep the payload of a NaN. */
SIMD void vstore_f16(uint16_t *p, vf x) {
#if !IS_DOUBLE && (defined(__F16C__) || defined(__aarch64__))
    x = vselect(x != x, vcopysign(vset1(__builtin_nanf("")), x), x);
#endif
#if !IS_DOUBLE && defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif !IS_DOUBLE && defined(__F16C__)
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif !IS_DOUBLE && defined(__aarch64__)
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
    for (int i = 0; i < LANES; i++) { uint16_t h = narrow_f16((float)x[i]); memcpy(p + i, &h, 2); }
#endif
}
SIMD void vstore_bf16(uint16_t *p, vf x) {
#if !IS_DOUBLE && defined(__AVX2__)
    vu u = (vu)x, rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16, nan = u >> 16 | 64;
    rounded = (vu)vselect(x != x, (vf)nan, (vf)rounded);
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)rounded));
#else
    __m256i packed = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded); /* 0 to 3 twice, 4 to 7 twice */
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#endif
#else
    for (int i = 0; i < LANES; i++) { uint16_t h = narrow_bf16((float)x[i]); memcpy(p + i, &h, 2); }
#endif
}
/* two (OUT) = the first and the second 16-bit number of each lane of `pairs`, widened. */
SIMD void vsplit_bf16(vf *two, vf pairs) {
    two[0] = (vf)((vu)pairs << 16);
    two[1] = (vf)((vu)pairs >> 16 << 16);
}
SIMD void vsplit_f16(vf *two, vf pairs) {
#if !IS_DOUBLE && defined(__AVX512BW__)
    const __m512i split = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,
                                           30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    __m512i halves = _mm512_permutexvar_epi16(split, (__m512i)pairs);
    two[0] = (vf)_mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    two[1] = (vf)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
#elif !IS_DOUBLE && defined(__F16C__)
    const __m256i split = _mm256_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0,
                                          15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
    __m256i halves = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)pairs, split), 0xd8);
    two[0] = (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    two[1] = (vf)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
#elif !IS_DOUBLE && defined(__aarch64__)
    two[0] = (vf)vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32((uint32x4_t)pairs)));
    two[1] = (vf)vcvt_f32_f16(vreinterpret_f16_u16(vshrn_n_u32((uint32x4_t)pairs, 16)));
#else
    real low[LANES], high[LANES];
    for (int i = 0; i < LANES; i++) {
        low[i] = widen_f16((uint16_t)((vu)pairs)[i]);
        high[i] = widen_f16((uint16_t)(((vu)pairs)[i] >> 16));
    }
    two[0] = vload(low);
    two[1] = vload(high);
#endif
}
SIMD vf vload_i8(const int8_t *p) {
#if !IS_DOUBLE && defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif !IS_DOUBLE && defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    real r[LANES]; /* GCC 12 converts vectors of bytes one by one as well */
    for (int i = 0; i < LANES; i++) r[i] = p[i];
    return vload(r);
#endif
}
/* four (OUT) = the first to the fourth signed byte of each lane of `quads`, as numbers. */
SIMD void vsplit_i8(vf *four, vf quads) {
    const int bits = 8 * (int)sizeof(real);
    for (int i = 0; i < 4; i++) four[i] = __builtin_convertvector((vi)((vu)quads << (bits - 8 - 8 * i)) >> (bits - 8), vf);
}

#endif
