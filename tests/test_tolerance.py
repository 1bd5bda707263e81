"""The judges of tolerance.py let right results pass, and each notices an error in out, weights or logsumexp alone, or
in one of the gradients."""

import numpy as np
import pytest
from problems import FLOATS, NAN, assert_same_bits, normal, problem
from tolerance import assert_close, assert_gradients_close, assert_possible, assert_within, check, everything

import cattn
from cattn import reference

NAMES = "out", "weights", "logsumexp"
NUM_KEYS = 40
BOOL_MASK = np.arange(NUM_KEYS) % 3 > 0
FLOAT_MASK = normal(NUM_KEYS)

# (options, other options): as if a kernel took the others for those.
WRONG_CALLS = {
    "a key less": ({}, {"kv_lens": NUM_KEYS - 1}),
    "a key more": ({"kv_lens": NUM_KEYS - 1}, {}),
    "diagonal moved by one": ({"is_causal": True, "q_offset": 15}, {"is_causal": True, "q_offset": 16}),
    "wider window": ({"window": (9, 9), "q_offset": 15}, {"window": (10, 9), "q_offset": 15}),
    "bool mask moved by one": ({"attn_mask": BOOL_MASK}, {"attn_mask": np.roll(BOOL_MASK, 1)}),
    "float mask moved by one": ({"attn_mask": FLOAT_MASK}, {"attn_mask": np.roll(FLOAT_MASK, 1)}),
    "no ALiBi": ({"alibi_slopes": [0.1, 0.5]}, {}),
    "no softcap": ({"softcap": 2.0}, {}),
    "no scale": ({}, {"scale": 1}),
    "no sinks": ({"sinks": [1, 2]}, {}),
    "other dropout": ({"dropout_p": 0.2, "seed": 3}, {"dropout_p": 0.2, "seed": 4}),
}
OF_WEIGHTS = {"sinks", "dropout_p"}  # they leave logsumexp as it is


def nan_in_a_row(x):
    x = x.copy()
    x[(-1,) * min(3, x.ndim)] = NAN
    return x


WRONG_NUMBERS = {
    "1 % too large": lambda x: (x * np.float64(1.01)).astype(x.dtype),
    "moved by one": lambda x: np.roll(x, 1),
    "a row of NaN": nan_in_a_row,
    "infinite": lambda x: np.full_like(x, np.inf),
    "zeros": np.zeros_like,
}
WRONG_ARRAYS = {
    "other dtype": lambda x: x.astype("float32" if x.dtype == "float16" else "float16"),
    "an axis more": lambda x: x[None],
    "a batch less": lambda x: x[:1],
}

judges = pytest.mark.parametrize(
    ("judge", "dtype"),
    [*((judge, dtype) for judge in (assert_close, assert_possible) for dtype in FLOATS), (assert_within, FLOATS[0])],
    ids=lambda x: x.__name__ if callable(x) else str(x))
rows = pytest.mark.parametrize("seq_len_q", [20, 1], ids=["prefill", "one row"])
every_result = pytest.mark.parametrize("number", range(3), ids=NAMES)


def judged_with(wrong, number, results, judge, arrays, options):
    """`judge` finds the error where `wrong` takes the place of this one of the results."""
    results = list(results)
    results[number] = wrong
    with pytest.raises(AssertionError, match=f"^{NAMES[number]}"):
        judge(results, *arrays, **options)


@judges
@rows
@pytest.mark.parametrize("options", [x for x, _ in WRONG_CALLS.values()], ids=WRONG_CALLS)
def test_right_results_pass(options, seq_len_q, judge, dtype):
    arrays = problem(seq_len_q, NUM_KEYS, dtype=dtype)
    judge(everything(*arrays, **options), *arrays, **options)


@judges
@rows
@pytest.mark.parametrize(("options", "others"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls_are_found(options, others, seq_len_q, judge, dtype):
    arrays = problem(seq_len_q, NUM_KEYS, dtype=dtype)
    right, wrong = everything(*arrays, **options), everything(*arrays, **others)
    for number in range(2 if OF_WEIGHTS & set(options) else 3):
        judged_with(wrong[number], number, right, judge, arrays, options)


@judges
@rows
@every_result
@pytest.mark.parametrize("spoil", WRONG_NUMBERS.values(), ids=WRONG_NUMBERS)
def test_wrong_numbers_are_found(spoil, number, seq_len_q, judge, dtype):
    arrays = problem(seq_len_q, NUM_KEYS, dtype=dtype)
    results = everything(*arrays)
    judged_with(spoil(results[number]), number, results, judge, arrays, {})


@judges
@every_result
@pytest.mark.parametrize("spoil", WRONG_ARRAYS.values(), ids=WRONG_ARRAYS)
def test_wrong_arrays_are_found(spoil, number, judge, dtype):
    arrays = problem(dtype=dtype)
    results = everything(*arrays)
    judged_with(spoil(results[number]), number, results, judge, arrays, {})


def test_everything():
    arrays = problem()
    out, weights = cattn.scaled_dot_product_attention(*arrays, return_weights=True)
    _, logsumexp = cattn.scaled_dot_product_attention(*arrays, return_logsumexp=True)
    assert_same_bits(everything(*arrays), (out, weights, logsumexp))
    assert_same_bits(check(*arrays), (out, weights, logsumexp))


@every_result
def test_check_judges_what_attention_gives(number, monkeypatch):
    def wrong(*arrays, **options):
        results = list(cattn.scaled_dot_product_attention(*arrays, **options))
        results[number] = results[number] * np.float32(1.01)
        return results

    monkeypatch.setitem(everything.__kwdefaults__, "attention", wrong)
    with pytest.raises(AssertionError, match=f"^{NAMES[number]}"):
        check(*problem())


def gradients(dtype, **others):
    """All of them, and what they are judged by; as if `others` had been taken for the options."""
    arrays = problem(20, NUM_KEYS, dtype=dtype)
    options = {"attn_mask": normal(2, 1, 20, NUM_KEYS, dtype=dtype), "alibi_slopes": np.array([0.1, 0.5]),
               "sinks": np.array([1.0, 2.0]), "softcap": 2.0, "dropout_p": 0.2, "seed": 3, "kv_lens": NUM_KEYS - 1}
    out, logsumexp = cattn.scaled_dot_product_attention(*arrays, **options, return_logsumexp=True)
    grad_out, grad_logsumexp = normal(*out.shape, dtype=dtype, seed=5), normal(*logsumexp.shape).astype(logsumexp.dtype)
    given = grad_out, *arrays, out, logsumexp
    options["grad_logsumexp"] = grad_logsumexp
    found = reference.scaled_dot_product_attention_backward(
        *given, **options | others, wanted=reference.Gradients._fields)
    return found, given, options


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("others", [
    {"kv_lens": NUM_KEYS}, {"alibi_slopes": np.array([0.1, 0.4])}, {"softcap": 2.1}, {"scale": 0.3}, {"seed": 4},
    {"sinks": np.array([1.0, 2.1])}, {"grad_logsumexp": None}, {"dropout_p": 0.1},
], ids=str)
def test_gradients_of_other_calls_are_found(others, dtype):
    wrong, given, options = gradients(dtype, **others)
    right, _, _ = gradients(dtype)
    assert_gradients_close(right, *given, **options)
    for name in "query", "key", "attn_mask", "alibi_slopes":
        with pytest.raises(AssertionError, match=f"^{name}"):
            assert_gradients_close(right._replace(**{name: getattr(wrong, name)}), *given, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", reference.Gradients._fields)
def test_wrong_gradients_are_found(name, dtype):
    right, given, options = gradients(dtype)
    for spoil in (*WRONG_NUMBERS.values(), *WRONG_ARRAYS.values()):
        with pytest.raises(AssertionError, match=f"^{name}"):
            assert_gradients_close(right._replace(**{name: spoil(getattr(right, name))}), *given, **options)
    assert_gradients_close(right._replace(**{name: None}), *given, **options)
