"""The parts of the kernels that can be called alone: exp2, the random numbers of dropout, the limits
of the machine."""

import numpy as np
import pytest
from problems import BFLOAT16, INF, NAN
from tolerance import WIDER_THAN_DOUBLE, everything

from cattn import _kernels
from cattn.reference import dropout_keep

LEAST = {np.float32: -127, np.float64: -1023}  # the argument from which on 2**x counts as 0


@pytest.fixture(params=[np.float32, np.float64])
def precision(request):
    return request.param


def exp2(x):
    """2**x of any number of float32 or float64."""
    module = _kernels.f32 if x.dtype == np.float32 else _kernels.f64()
    padded = np.concatenate([x.ravel(), np.zeros(-x.size % 16, x.dtype)])  # whole vectors
    out = np.full_like(padded, NAN)
    module.exp2_of(padded, out)
    return out[: x.size].reshape(x.shape)


@pytest.mark.parametrize(("dtype", "kind", "nan"), [(np.float16, 2, 0x7E00), (BFLOAT16, 3, 0x7FC0)], ids=str)
def test_rounding_to_16_bits(isa, dtype, kind, nan):
    """To nearest even, as NumPy and ml_dtypes: every number of the kind, the middle to the next, and on both sides of
    these. float16 keeps the sign of a NaN alone; vectors and what is behind the last one have the same bits."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    steps = np.arange(-1, 2, dtype=np.int32)
    middles = (numbers.astype(np.float64) + numbers * 2.0 ** -(11 if kind == 2 else 8)).astype(np.float32)
    tiny = np.arange(-1025, 1026, dtype=np.float32) * np.float32(2.0**-25 if kind == 2 else 2.0**-134)
    near = np.concatenate([numbers, middles, tiny]).view(np.int32)[:, None] + steps
    near = near.view(np.float32)
    x = np.concatenate([near[np.isfinite(near)], [INF, -INF, 65519.9, 65520, 3.4e38, -3.4e38]]).astype(np.float32)
    out = np.empty(x.shape, np.uint16)
    _kernels.f32.stored_of(x, out, kind)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out, x.astype(dtype).view(np.uint16))
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC12345], np.uint32)
    for length in range(1, 40):
        x, out = np.resize(nans, length).view(np.float32), np.empty(length, np.uint16)
        _kernels.f32.stored_of(x, out, kind)
        assert (out & nan == nan).all()
        np.testing.assert_array_equal(out >> 15, np.signbit(x))
        if kind == 2:
            assert (out & 0x7FFF == nan).all()
        else:
            np.testing.assert_array_equal(out, x.view(np.uint32) >> 16 | 64)


def test_exp2_sweep(isa, precision):
    """Largest relative error found: in float32 1.552e-7 with FMA and 1.711e-7 without, over every number from -126 to
    127; in float64 1.37e-16 and 1.81e-16, sampled."""
    if precision == np.float64 and not WIDER_THAN_DOUBLE:
        pytest.skip("nothing more exact than double to compare with")
    bound, wide = (1.72e-7, np.float64) if precision == np.float32 else (2e-16, np.longdouble)
    low = LEAST[precision] + 1
    rng = np.random.default_rng(0)
    # Densely around 0, where the scores of one row are, and near whole and half numbers, where the rounding of x turns.
    turns = np.arange(low, 1 - low, 0.5)
    sweep = [
        np.linspace(low, -low, 1_000_003), np.linspace(-1, 1, 500_001), np.linspace(-30, 0, 500_001),
        rng.standard_normal(100_000) * 1e-5,
        *(turns + sign * 2.0**power for power in range(-40, -2) for sign in (-1, 1)),
    ]
    for part in sweep:
        x = part.astype(precision)
        x = x[(x >= low) & (x <= 1 - low)]
        exact = np.exp2(x.astype(wide))
        worst = np.abs(exp2(x).astype(wide) / exact - 1).max()
        assert worst < bound, f"{float(worst):.4g}"


def test_exp2_of_whole_numbers_is_exact(isa, precision):
    whole = np.arange(LEAST[precision] + 1, -LEAST[precision] + 1)
    np.testing.assert_array_equal(exp2(whole.astype(precision)), np.ldexp(precision(1), whole))
    np.testing.assert_array_equal(exp2(np.array([0.0, -0.0], precision)), 1)


def test_exp2_is_exactly_zero_far_below(isa, precision):
    """What makes a masked key's weight 0, and no subnormal number slow."""
    least = LEAST[precision]
    x = np.concatenate([np.linspace(least, 1e4 * least, 10_001), [least, -1e30, np.finfo(precision).min, -INF]])
    out = exp2(x.astype(precision))
    assert not out.any() and not np.signbit(out).any()
    assert (exp2(np.linspace(least, least + 1, 1001).astype(precision)) >= 0).all()


def test_exp2_of_nan_is_nan(isa, precision):
    """Whatever its sign and payload."""
    unsigned, fraction = (np.uint32, 23) if precision == np.float32 else (np.uint64, 52)
    payloads = np.random.default_rng(0).integers(1, 2**fraction, 10_000, dtype=unsigned)
    payloads[:4] = 1, 2, 2 ** (fraction - 1), 2**fraction - 1
    infinity = np.array(INF, precision).view(unsigned)
    for sign in (0, 1 << (8 * np.dtype(unsigned).itemsize - 1)):
        x = (payloads | infinity | unsigned(sign)).view(precision)
        assert np.isnan(exp2(x)).all()


def test_exp2_between_other_numbers(isa, precision):
    """No lane looks at another."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(4096).astype(precision)
    expected = exp2(x)
    special = rng.choice([NAN, INF, -INF, -1e30], x.shape)
    place = rng.random(x.shape) < 0.5
    np.testing.assert_array_equal(exp2(np.where(place, special, x).astype(precision))[~place], expected[~place])


@pytest.mark.parametrize("seed", [0, 1, 0xFFFFFFFF, 2**32, 0x0123456789ABCDEF, 2**64 - 1])
@pytest.mark.parametrize(("seq_len_q", "seq_len_kv"), [(1, 1), (1, 1031), (3, 70), (50, 259), (200, 5)])
def test_philox(isa, precision, seed, seq_len_q, seq_len_kv):
    """All scores alike: the weights are the random numbers, over a threshold."""
    query, key = np.zeros((2, 4, seq_len_q, 3), precision), np.zeros((2, 2, seq_len_kv, 3), precision)
    for dropout_p in (0.25, 0.7):
        weights = everything(query, key, key, dropout_p=dropout_p, seed=seed)[1]
        keep = dropout_keep(seed, dropout_p, 2, 4, seq_len_q, seq_len_kv)
        np.testing.assert_array_equal(weights != 0, keep)
        np.testing.assert_allclose(weights[keep], 1 / ((1 - dropout_p) * seq_len_kv), rtol=4 * np.finfo(precision).eps)


def test_philox_threshold(isa):
    """The first key is kept exactly from the threshold on: dropout_p by one step of 2**-32 more or less."""
    x = np.zeros((1, 1))
    for seed in range(5):
        steps = 2**31
        for bit in reversed(range(31)):  # bisects the random word
            steps += 2**bit if dropout_keep(seed, steps / 2**32, 1, 1, 1, 1).all() else -(2**bit)
        for step in range(steps - 2, steps + 3):
            kept = everything(x, x, x, dropout_p=step / 2**32, seed=seed)[1].item() != 0
            assert kept == dropout_keep(seed, step / 2**32, 1, 1, 1, 1).item()


def test_fma_flops(isa):
    """A multiple of 2 operations in each of 12 vectors of at least 4 floats, for each round and thread."""
    one = _kernels.f32.fma_flops(1, 1)
    assert one / 24 in (4, 8, 16)
    assert _kernels.f32.fma_flops(1000, 1) == 1000 * one
    assert _kernels.f32.fma_flops(1000, 3) == 3000 * one


def test_nops():
    assert [_kernels.cpu.nops(rounds) for rounds in (0, 1, 1000)] == [0, 100, 100_000]


def test_read_bytes(isa):
    array = np.ones(12_000, np.float32)
    for num_threads in (1, 2, 3):
        assert _kernels.f32.read_bytes(array, num_threads) == array.nbytes
    assert _kernels.f32.read_bytes(array[:10], 3) == 36  # equal parts
