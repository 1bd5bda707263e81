"""Arguments: what is checked of them, and the words of the errors, for the doors, the reference and the pictures.

An error names the argument, the rule, what came, and the expression that cures it where there is one. A check returns
its argument as the code behind it takes it.
"""

import math
import numbers
import operator
import os
import sys
import warnings

import numpy as np

F32, F64, F16, BF16, BOOL, I8 = range(6)  # as in _kernels/base/tensor.pxi
# bfloat16 joins when it is first met.
KINDS = {np.dtype(np.float32): F32, np.dtype(np.float64): F64, np.dtype(np.float16): F16}
SCALE_DIMS = 32  # int8 numbers of a row of weights that share a scale; the same number as in _kernels/base/tile.pxi
UNBOUNDED = -1
# What a weight may be kept in, beside the dtype of its layer.
STORED_KINDS = {"float16": F16, "bfloat16": BF16, "int8": I8}
FAR = 2**60  # offsets and windows beyond any key; sums of three of them still fit an int64
_MAX_HEAD_DIM = 2**31 - 1
_MAX_NUMBERS = 2**48  # in value, by strides of 0: beyond, the size of the scratch would not fit an index
# Of scale and softcap: a quarter of the largest number, as for a bias, fits after * log2(e) as well.
F32_RANGE, F64_RANGE = ((float(x.smallest_normal), float(x.max) / 4) for x in map(np.finfo, (np.float32, np.float64)))
_MAX_AXES = 32  # numpy broadcasts no more
# Of numpy.shares_memory. They take up to 75 ms; of random arrays 1 in 20,000 takes more, with 5 axes, and none with 4.
_MAX_STEPS = 1_000_000
# Of a float mask, that are looked at in each call. 64 rows of tril(ones(64, 64)), or one of 4096: it takes 1.7 us, and
# a single number 1.1. (All of 512 x 512 would take 26 us.)
_FIRST_NUMBERS = 4096
# The bits of 1. As arrays of no axes: compared with twice as fast as scalars.
_ONE = {F32: np.ones((), np.float32).view(np.uint32), F64: np.ones((), np.float64).view(np.uint64),
        F16: np.ones((), np.float16).view(np.uint16), BF16: np.array(0x3F80, np.uint16)}
_PACKAGE = __name__.partition(".")[0]


def shown(value):
    """`value` in the words of an error, shortened: str() refuses integers of thousands of digits, and what others write
    may raise.

    Two others keep words of their own: `_kernels.shown` tells the length of a variable of the environment, and works
    without NumPy; `_threads.checked` tells the type or the bits of what should be a small int.
    """
    try:
        text = str(value) if isinstance(value, numbers.Number) else repr(value)
    except Exception:
        return (f"an int of {value.bit_length()} bits" if isinstance(value, int)
                else f"a {type(value).__name__} that cannot be shown")
    return text if len(text) <= 200 else f"{text[:200]}..."


def cast_cure(name, given, dtype):
    """How to cast what was given as `name` to `dtype`, which is text as well; a list has no astype."""
    return f"{name}.astype({dtype})" if isinstance(given, np.ndarray) else f"np.asarray({name}, {dtype})"


def _warn(message):
    """A UserWarning at the line that called the library, through however many functions of its own: what is shown once
    per place is shown once for each such line. So the text has no numbers, which change from token to token."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_of_package(str(frame.f_globals.get("__name__"))):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def _is_of_package(module):
    """Or stands between two functions of it, as what keeps torch.compile from looking into the second does."""
    return module.partition(".")[0] == _PACKAGE or module == "torch._dynamo.eval_frame"


# Arrays and their dtypes.


def as_array(name, x, what=""):
    """The array that numpy.asarray makes of x, as a view of its own: another thread may set the shape of the caller's.

    An argument that makes none, in whatever way, is named; so is a masked array, since asarray drops the mask.
    """
    if type(x) is not np.ndarray:
        given = x
        if given is None:
            cure = "; for self-attention pass the same array as all three" if name in ("key", "value") else ""
            raise TypeError(f"{name}: expected an array{what}, got None{cure}")
        try:
            x = np.asanyarray(given)
        except MemoryError:
            raise
        except ValueError as error:  # such as rows of different lengths
            raise ValueError(f"{name}: expected an array{what}, got a {type(given).__name__} that makes none: "
                             f"{error}") from None
        except Exception as error:  # __array__ is foreign code
            raise TypeError(f"{name}: expected an array{what}, got "
                            f"{_torch_text(given) or f'a {type(given).__name__} that makes none: {error}'}") from error
        if x.dtype == object and x.ndim == 0 and not isinstance(given, (np.ndarray, np.generic, numbers.Number)):
            cure = "; np.from_dlpack(...) of it is one" if _is_on_cpu(given) else ""
            raise TypeError(f"{name}: expected an array{what}, got a {type(given).__name__}, which NumPy does not read "
                            f"as one{cure}")
        if _is_masked(x):
            raise TypeError(f"{name}: expected a plain array{what}, got a masked array, whose mask would be ignored; "
                            f"use .filled(...)")
        x = np.asarray(x)
    return x[...]


def _is_masked(x):
    """Of numpy.ma, which this does not import: without it there are none."""
    return issubclass(type(x), getattr(sys.modules.get("numpy.ma"), "MaskedArray", ()))


def _is_torch(x):
    """A tensor of torch, which this does not import: a class of it has a base from there, a Parameter too."""
    return any(str(base.__module__).partition(".")[0] == "torch" for base in type(x).__mro__)


def _torch_text(x):
    """What of a torch tensor keeps NumPy from reading it, or of the first in a list, and the calls that change that;
    "" for anything else."""
    what = "a torch tensor"
    if isinstance(x, (list, tuple)) and x:
        what, x = f"a {type(x).__name__} with a torch tensor", x[0]
    if not _is_torch(x):
        return ""
    device, dtype = str(getattr(x, "device", "cpu")), str(getattr(x, "dtype", ""))
    if device == "meta":  # where there are no numbers
        return ""
    reasons, calls = [], ""
    if getattr(x, "requires_grad", False) is True:
        reasons, calls = [*reasons, "requires grad"], calls + ".detach()"
    if device.partition(":")[0] != "cpu":
        reasons, calls = [*reasons, f"is on {device}"], calls + ".cpu()"
    bits = ""
    if dtype.startswith(("torch.bfloat16", "torch.float8")):
        reasons.append(f"is {dtype.partition('.')[2]}, which NumPy has not")
        if dtype == "torch.bfloat16":
            bits = f", or with ml_dtypes {calls}.view(torch.int16).numpy().view(ml_dtypes.bfloat16)"
        calls += ".float()"
    return f"{what} that {' and '.join(reasons)}; pass its {calls}{bits}" if reasons else ""


def of_torch(x):
    """A torch tensor on the CPU as one that NumPy reads: without gradient, of bfloat16 as float32; anything else as it
    is."""
    if not _is_torch(x) or str(getattr(x, "device", "")) != "cpu":
        return x
    x = x.detach()
    return x.float() if str(x.dtype) == "torch.bfloat16" else x


def _is_on_cpu(x):
    """Whether x offers its memory by DLPack, and NumPy could read it: 1 is the device "CPU" of DLPack's header."""
    try:
        return hasattr(x, "__dlpack__") and x.__dlpack_device__()[0] == 1
    except Exception:  # foreign code
        return False


def is_number(dtype):
    return dtype.kind in "iu" or is_float(dtype)


def is_float(dtype):
    return dtype.kind == "f" or _is_bfloat16(dtype)


def _is_bfloat16(dtype):
    """In native byte order: ml_dtypes reads the other one wrong, without a word."""
    return dtype.name == "bfloat16" and dtype.isnative


def cast(array, dtype):
    """`array` in this dtype, itself where it has it already. What overflows is infinite, in silence, whatever the
    caller's numpy.errstate."""
    return array if array.dtype == dtype else copy(array, dtype)


def copy(array, dtype):
    """A copy in this dtype, made in pieces: between two of them Python runs the handlers of signals."""
    result = np.empty(array.shape, dtype)
    with np.errstate(all="ignore"):
        for piece in pieces(array.shape):
            result[piece] = array[piece]
    return result


def pieces(shape):
    """Slices, one for each axis, that cut an array of this shape into pieces of at most 2**18 elements: these take
    0.1 ms, 10 ms with dropout; between two of them Python runs the handlers of signals. Columns are cut at multiples
    of 4, as many as share a counter of the random numbers."""

    def halves(piece):
        sizes = [part.stop - part.start for part in piece]
        if math.prod(sizes) <= 2**18:
            yield piece
            return
        axis = next(axis for axis, size in enumerate(sizes) if size > 1)
        start, stop = piece[axis].start, piece[axis].stop
        middle = start + sizes[axis] // 2
        if axis == len(sizes) - 1:
            middle -= middle % 4
        yield from halves((*piece[:axis], slice(start, middle), *piece[axis + 1 :]))
        yield from halves((*piece[:axis], slice(middle, stop), *piece[axis + 1 :]))

    return halves(tuple(slice(0, size) for size in shape))


# Numbers, flags, dtypes.


def check_bool(name, value):
    if value is not True and value is not False and not isinstance(value, np.bool_):
        raise TypeError(f"{name}: expected a bool, got {shown(value)}")
    return bool(value)


def check_text(name, value):
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {shown(value)}")


def check_int(name, value, minimum=None):
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {shown(value)}") from None
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}: expected an int >= {minimum}, got {shown(value)}")
    return value


def check_number(name, value, smallest, largest):
    if not isinstance(value, (float, numbers.Real)):  # float first: the test of an abstract class takes long
        cure = ""
        if isinstance(value, np.ndarray) and is_number(value.dtype):
            if value.size == 1:
                cure = f"; {name}.item() is one"
            elif name == "scale":
                cure = "; for one per head multiply query by it and pass scale=1"
        elif _is_torch(value) and getattr(value, "ndim", None) == 0:
            cure = f"; {name}.item() is one"
        raise TypeError(f"{name}: expected a number, got {shown(value)}{cure}")
    try:
        number = float(value)
    except OverflowError:  # an int
        number = math.inf
    if not (smallest <= number <= largest or number == 0):
        raise ValueError(f"{name}: expected 0 or a number from {smallest:.3g} to {largest:.3g}, got {shown(value)}")
    return number


def check_dropout(name, value):
    if not isinstance(value, (float, numbers.Real)):  # float first: the test of an abstract class takes long
        cure = "; 0.0 is off" if value is None else ""
        raise TypeError(f"{name}: expected a float in [0, 1), got {shown(value)}{cure}")
    if not 0 <= value < 1 or float(value) == 1:  # a Fraction or a long double may round to 1
        raise ValueError(f"{name}: expected a float in [0, 1), got {shown(value)}")
    return float(value)


def check_seed(seed):
    if hasattr(seed, "integers"):  # a numpy.random.Generator
        raise TypeError(f"seed: expected an int, got a {type(seed).__name__}; int(seed.integers(2**63)) draws one")
    seed = int.from_bytes(os.urandom(8), "little") if seed is None else check_int("seed", seed, 0)
    if seed >= 2**64:
        raise ValueError(f"seed: expected an int below 2**64, got {shown(seed)}")
    return seed


def check_dtype(dtype, names=None):
    """numpy.dtype(dtype), if it is a float dtype and one of these names."""
    expected = "a float dtype" if names is None else "one of " + ", ".join(names)
    try:
        result = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError):
        cure = f"; as text: {str(dtype).partition('.')[2]!r}" if _is_torch(dtype) else ""
        raise TypeError(f"dtype: expected {expected}, got {shown(dtype)}{cure}") from None
    allowed = is_float(result) if names is None else result.name in names
    if dtype is None or not allowed or not result.isnative:
        raise TypeError(f"dtype: expected {expected}, got {shown(dtype)}")
    return result


def check_table_dtype(dtype, names=None):
    """What a table is stored as, and its kind: "bfloat16", where no package has made NumPy know it, as uint16."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            np.dtype(dtype)
        except TypeError:
            return np.dtype(np.uint16), BF16
    dtype = check_dtype(dtype, names)
    return dtype, KINDS.get(dtype, BF16)


def check_weight_dtype(dtype):
    """The name of what the weights of a layer are kept in; None: in its own dtype."""
    if dtype is None:
        return None
    name = dtype
    if name != "bfloat16":  # which NumPy alone has no dtype for
        try:
            name = np.dtype(dtype).name
        except (TypeError, ValueError, SyntaxError):
            name = None
    if name not in STORED_KINDS:
        raise TypeError(f"weight_dtype: expected None, float16, bfloat16 or int8, got {shown(dtype)}")
    return str(name)


# Kinds: dtypes as the kernels number them.


def check_kind(name, array, given=None, kinds=KINDS):
    """The number of its dtype in `kinds`; `given`, what the array was made of, tells how to cast it."""
    kind = kinds.get(array.dtype)
    if kind is None:
        if not _is_bfloat16(array.dtype):
            cure = ""
            if array.dtype.kind in "iuf":
                wide = array.dtype.kind == "f" and array.dtype.itemsize >= 8
                cure = f"; {cast_cure(name, given, 'np.float64' if wide else 'np.float32')} casts"
            elif array.dtype.kind in "US":
                cure = "; tokens are looked up in an embedding first"
            raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16 in native byte order, "
                            f"got dtype {array.dtype}{cure}")
        kind = kinds[array.dtype] = BF16
    return kind


def check_kinds(query, key, value, given, names=("query", "key", "value"), kinds=KINDS):
    """The query's, and that of key and value; `given` are the three that they were made of."""
    _, key_name, value_name = names
    q_kind, kv_kind = check_kind("query", query, given[0], kinds), check_kind(key_name, key, given[1], kinds)
    if value.dtype != key.dtype:
        cure = ""
        if value.dtype == query.dtype:
            cure = f"; {cast_cure(key_name, given[1], 'query.dtype')} casts"
        elif is_number(value.dtype):
            cure = f"; {cast_cure(value_name, given[2], f'{key_name}.dtype')} casts"
        raise TypeError(f"{value_name}: expected the dtype of {key_name}, {key.dtype}, got {value.dtype}{cure}")
    if q_kind != kv_kind and not (q_kind == F32 and kv_kind in (F16, BF16)):
        raise TypeError(f"{key_name}: expected dtype {query.dtype}, as query has (or a 16-bit one under a float32 "
                        f"query), got {key.dtype}; {cast_cure(key_name, given[1], 'query.dtype')} casts")
    return q_kind, kv_kind


# Attention.


def check_shapes(query, key, value):
    """The leading axes of the result, broadcast."""
    if query.ndim < 2:
        cure = "; for one query: np.atleast_2d(query)" if query.size and query.ndim else ""
        raise ValueError(f"query: expected 2 axes (seq_len_q, head_dim) or more, got shape {query.shape}{cure}")
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim > _MAX_AXES:
            raise ValueError(f"{name}: expected at most {_MAX_AXES} axes, got {array.ndim}")
    for name, array in (("key", key), ("value", value)):
        if array.ndim != query.ndim and min(array.ndim, query.ndim) < 4:
            raise ValueError(f"{name}: expected {query.ndim} axes, as query has, got shape {array.shape}")
    core = 2 if query.ndim < 4 else 3
    leading = query.shape[:-core]
    for name, array in (("key", key), ("value", value)):
        try:
            leading = np.broadcast_shapes(leading, array.shape[:-core])
        except ValueError:
            cure = ""
            if query.ndim == 3 and array.shape[0] and query.shape[0] % array.shape[0] == 0:
                cure = "; 3 axes are (batch, seq, head_dim); for heads pass 4, x[None] of each"
            raise ValueError(f"{name}: expected {_shape_text(leading, core, name, query, key)}, "
                             f"got shape {array.shape}{cure}") from None
    head_dim = query.shape[-1]
    if not 1 <= head_dim <= _MAX_HEAD_DIM:
        raise ValueError(f"query: expected a head_dim from 1 to {_MAX_HEAD_DIM}, got shape {query.shape}")
    if key.shape[-1] != head_dim:
        cure = "; keys come untransposed: key.swapaxes(-1, -2)" if key.shape[-2] == head_dim else ""
        raise ValueError(f"key: expected {_shape_text(leading, core, 'key', query, key)}, got shape {key.shape}{cure}")
    if core == 3 and (key.shape[-3] == 0 or query.shape[-3] % key.shape[-3]):
        cure = "; axes are (batch, heads, seq, head_dim)"
        if key.shape[-2] and query.shape[-2] % key.shape[-2] == 0:
            cure += ", for arrays (batch, seq, heads, head_dim) pass x.swapaxes(-3, -2) of each"
        raise ValueError(f"key: expected a num_kv_heads that divides query's {query.shape[-3]} heads, "
                         f"got shape {key.shape}{cure}")
    if value.shape[-core:-1] != key.shape[-core:-1] or not 1 <= value.shape[-1] <= _MAX_HEAD_DIM:
        raise ValueError(f"value: expected {_shape_text(leading, core, 'value', query, key)}, got shape {value.shape}")
    kv_numbers = math.prod(leading) * math.prod(key.shape[-core:-1]) * max(head_dim, value.shape[-1])
    if value.size > _MAX_NUMBERS or kv_numbers > sys.maxsize // 8:
        raise ValueError(f"value: expected at most {_MAX_NUMBERS} numbers, and key and value broadcast to {leading} "
                         f"that fit an index, got shape {value.shape}")
    return leading


def _shape_text(leading, core, name, query, key):
    heads = () if core == 2 else ("num_kv_heads",) if name == "key" else (str(key.shape[-3]),)
    last = ("seq_len_kv", str(query.shape[-1])) if name == "key" else (str(key.shape[-2]), "head_dim_v")
    return f"({', '.join([*map(str, leading), *heads, *last])})"


def check_result(rows_shape, width):
    """Rows of `width` numbers each, which have to fit an index."""
    if math.prod(rows_shape) * width > sys.maxsize // 8:
        raise ValueError(f"query: expected a result that fits in memory, got rows {rows_shape} of {width}")


def check_window(window):
    sides = window
    if not isinstance(window, (tuple, list)):
        array = as_array("window", window) if hasattr(window, "__array__") else None
        sides = () if array is None or array.ndim != 1 else list(array)
    if len(sides) != 2:
        got, is_int = shown(window), isinstance(window, numbers.Integral) and not isinstance(window, bool)
        cure = f"; for that many keys on each side: ({got}, {got})" if is_int else ""
        raise ValueError(f"window: expected None or (left, right), got {got}{cure}")
    sides = [UNBOUNDED if side is None else check_int("window", side) for side in sides]
    if min(sides) < UNBOUNDED:
        raise ValueError("window: expected keys to the left and right >= 0, or -1 or None for all, "
                         f"got {shown(window)}")
    return (min(side, FAR) for side in sides)


def check_lengths(name, lengths, leading):
    """A flat int64 array, one number per batch row; far-away ones clipped."""
    if type(lengths) is not int:  # which numpy has no dtype for, where it is far away
        given, lengths = lengths, as_array(name, lengths)
        if lengths.dtype.kind not in "iu":
            cure = ""
            if name == "kv_lens" and lengths.dtype == bool:
                cure = "; of a right-padded mask they are mask.sum(-1)"
            elif lengths.dtype.kind == "f":
                cure = f"; {cast_cure(name, given, 'int')} casts"
            raise TypeError(f"{name}: expected integers, got dtype {lengths.dtype}{cure}")
        if lengths.ndim and lengths.shape != leading:
            expected = f"an int, or shape {leading}, one per batch row" if leading else "an int"
            raise ValueError(f"{name}: expected {expected}, got shape {lengths.shape}")
        if lengths.ndim:
            return np.array([max(-FAR, min(FAR, length)) for length in lengths.ravel().tolist()], np.int64)
        lengths = lengths.item()
    return np.full(math.prod(leading), max(-FAR, min(FAR, lengths)), np.int64)


def check_kv_lens(kv_lens, leading, seq_len_kv, name="kv_lens"):
    given, kv_lens = kv_lens, check_lengths(name, kv_lens, leading)
    if kv_lens.size and not 0 <= kv_lens.min() <= kv_lens.max() <= seq_len_kv:
        got = given if isinstance(given, numbers.Integral) else kv_lens.tolist()
        raise ValueError(f"{name}: expected lengths from 0 to seq_len_kv = {seq_len_kv}, got {shown(got)}")
    return kv_lens


def check_vector(name, vector, shapes, dtype):
    vector = as_array(name, vector)
    if not is_number(vector.dtype):
        raise TypeError(f"{name}: expected a float or int array, got dtype {vector.dtype}")
    if vector.shape not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got shape {vector.shape}")
    vector = np.ascontiguousarray(cast(vector, dtype))  # infinity does what a number beyond the range would
    return vector if vector.flags.aligned else vector.copy()


def raise_mask_dtype(attn_mask, given):
    """The TypeError of a mask that is neither bool nor of a float dtype; `given` is what the array was made of."""
    cure = ""
    if attn_mask.dtype.kind in "iu":
        cure = f"; for 1 = attend: {cast_cure('attn_mask', given, 'bool')}"
    elif attn_mask.dtype.kind == "f":
        cure = f"; {cast_cure('attn_mask', given, 'np.float32')} casts"
    raise TypeError(f"attn_mask: expected bool (True = attend) or a float dtype (added), got {attn_mask.dtype}{cure}")


def check_mask(attn_mask, given, shape, leading, kinds=KINDS):
    """A view of this shape, and its kind; `given` is what the array was made of."""
    if given is True or given is False:  # is_causal, in the place of attn_mask
        raise TypeError(f"attn_mask: expected an array, got {given}; for the causal mask: is_causal={given}")
    if attn_mask.dtype == bool:
        kind = BOOL
    elif attn_mask.dtype in kinds or _is_bfloat16(attn_mask.dtype):
        kind = check_kind("attn_mask", attn_mask, kinds=kinds)
    else:
        raise_mask_dtype(attn_mask, given)
    try:
        return np.broadcast_to(attn_mask, shape), kind
    except ValueError:
        cure = ""
        if attn_mask.shape == (*leading, shape[-1]):
            axes = ", ".join([":"] * len(leading) + ["None"] * (len(shape) - 1 - len(leading)) + [":"])
            cure = f"; for a padding mask: mask[{axes}], or kv_lens"
        elif len(leading) == 1 and len(shape) == 4 and attn_mask.shape == (*leading, *shape[-2:]):
            cure = "; for one mask per batch row: mask[:, None]"
        elif len(shape) == 4 and attn_mask.shape == (math.prod(shape[:2]), *shape[2:]):
            cure = f"; for one mask per batch row and head: mask.reshape{shape}"
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {shape}, "
                         f"got shape {attn_mask.shape}{cure}") from None


def warn_of_0_and_1(mask, kind):
    if _is_0_and_1(mask, kind):
        _warn("attn_mask: a float mask that holds only 0 and 1 and is added to the scores; for True = attend pass "
              "attn_mask.astype(bool)")


def _is_0_and_1(mask, kind):
    """Whether both are there and nothing else; False as well where a large mask begins with many of the same."""
    if mask.size <= _FIRST_NUMBERS:
        return _holds_0_and_1(mask, kind)
    part = mask
    for axis in range(mask.ndim):
        if part.size > _FIRST_NUMBERS:
            part = part[(slice(None),) * axis + (slice(max(1, _FIRST_NUMBERS * part.shape[axis] // part.size)),)]
    once = tuple(slice(None) if stride else slice(1) for stride in mask.strides)
    return _holds_0_and_1(part, kind) and _holds_0_and_1(mask[once], kind)


def _holds_0_and_1(numbers, kind):
    one = _ONE[kind]
    ones = np.count_nonzero(numbers.view(one.dtype) == one)  # by their bits: numpy.errstate has no say in this
    return 0 < ones < numbers.size and np.count_nonzero(numbers) == ones


def warn_of_first_keys(seq_len_q, kv_lens):
    if kv_lens is None:
        _warn("is_causal with fewer queries than keys and no q_offset: query i sees keys 0 to i; for queries that are "
              "the last tokens pass q_offset=seq_len_kv - seq_len_q, else q_offset=0")
    elif seq_len_q < kv_lens.max(initial=0):
        _warn("is_causal with fewer queries than kv_lens and no q_offset: query i sees keys 0 to i; for queries that "
              "are the last tokens pass q_offset=kv_lens - seq_len_q, else q_offset=0")


# Sequences of different lengths.


def check_wanted(wanted, given):
    """Whose gradients are wanted, and exist, as a set of names: `given` are the inputs that may be None."""
    names = "query", "key", "value", *given
    try:
        if isinstance(wanted, str):
            raise TypeError
        wanted = set(wanted)
    except TypeError:
        cure = f"; wanted=({wanted!r},) wants one" if isinstance(wanted, str) and wanted in names else ""
        raise TypeError(f"wanted: expected a collection of names, got {shown(wanted)}{cure}") from None
    unknown = wanted.difference(names)
    if unknown:
        unknown = min(unknown, key=str)
        raise ValueError(f"wanted: expected names out of {', '.join(names)}, got {shown(unknown)}")
    return {name for name in wanted if name not in given or given[name] is not None}


def check_seed_of_forward(seed, dropout_p):
    if seed is None and check_dropout("dropout_p", dropout_p):
        raise ValueError(f"seed: expected the seed that the forward call had, with dropout_p = {shown(dropout_p)}, got "
                         "None; draw one for both")
    return seed


def check_form(name, given, shape, dtype, which, dtype_text):
    """`given` as an array, of this shape and dtype: in an error, `which` says what dtype that is, dtype_text writes
    it."""
    array = as_array(name, given)
    if array.dtype != dtype:
        cure = f"; {cast_cure(name, given, dtype_text)} casts" if is_number(array.dtype) else ""
        raise TypeError(f"{name}: expected the {which}, {dtype}, got {array.dtype}{cure}")
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got shape {array.shape}")
    return array


def check_of_forward(grad_out, out, logsumexp, grad_logsumexp, rows_shape, head_dim_v, dtype, compute_dtype):
    """The four as arrays, of the forward's result for rows_shape; the last two flat, and None for None."""
    arrays = []
    for name, given, shape, expected in (
            ("grad_out", grad_out, (*rows_shape, head_dim_v), dtype), ("out", out, (*rows_shape, head_dim_v), dtype),
            ("logsumexp", logsumexp, rows_shape, np.dtype(compute_dtype)),
            ("grad_logsumexp", grad_logsumexp, rows_shape, np.dtype(compute_dtype))):
        if given is None and name == "grad_logsumexp":
            arrays.append(None)
            continue
        array = check_form(name, given, shape, expected, *(
            ("dtype computed in", f"np.{expected}") if shape is rows_shape else ("dtype of query", "query.dtype")))
        if shape is rows_shape:
            array = np.ascontiguousarray(array).reshape(-1)
            array = array if array.flags.aligned else array.copy()
        arrays.append(array)
    return arrays


def check_packed_shapes(query, key, value, names=("query", "key", "value")):
    """Of query (total_q, num_heads, head_dim), key and value (..., num_kv_heads, head_dim or head_dim_v); pages have an
    axis more."""
    axes = "num_pages, page_size" if "pages" in names[1] else "total_kv"
    if query.ndim != 3 or not 1 <= query.shape[-1] <= _MAX_HEAD_DIM:
        raise ValueError(f"query: expected (total_q, num_heads, head_dim), got shape {query.shape}")
    if (key.ndim != 3 + ("," in axes) or key.shape[-1] != query.shape[-1] or not key.shape[-2]
            or query.shape[-2] % key.shape[-2]):
        raise ValueError(f"{names[1]}: expected ({axes}, num_kv_heads, {query.shape[-1]}) with a num_kv_heads that "
                         f"divides query's {query.shape[-2]} heads, got shape {key.shape}")
    if value.shape[:-1] != key.shape[:-1] or not 1 <= value.shape[-1] <= _MAX_HEAD_DIM:
        raise ValueError(f"{names[2]}: expected ({', '.join(map(str, key.shape[:-1]))}, head_dim_v), "
                         f"got shape {value.shape}")
    if max(value.size, key.size) > _MAX_NUMBERS:
        raise ValueError(f"{names[2]}: expected at most {_MAX_NUMBERS} numbers, got shape {value.shape}")


def check_page_kinds(query, pages, scales, given):
    """The kinds of query and pages; `pages`, `scales`: of keys and of values; `given`: what all five were made of."""
    names = "query", "key_pages", "value_pages"
    if np.int8 not in (pages[0].dtype, pages[1].dtype):
        for name, array in zip(("key_scales", "value_scales"), scales, strict=True):
            if array is not None:
                raise ValueError(f"{name}: expected None, as key_pages is {pages[0].dtype}, got an array; they scale "
                                 f"int8")
        return check_kinds(query, *pages, given[:3], names)
    q_kind = check_kind("query", query, given[0])
    if q_kind == F64:
        raise TypeError(f"query: expected float32 or 16 bits over int8 pages, got dtype {query.dtype}; "
                        f"{cast_cure('query', given[0], 'np.float32')} casts")
    for name, array in zip(names[1:], pages, strict=True):
        if array.dtype != np.int8:
            raise TypeError(f"{name}: expected int8, as the other pages are, got dtype {array.dtype}")
    return q_kind, I8


def check_page_scales(name, scales, pages_name, pages, given):
    if scales is None:
        raise TypeError(f"{name}: expected a float32 array, as {pages_name} is int8, got None")
    check_scales(name, scales, pages.shape[:-1], f"row of {pages_name}", given)


def check_scales(name, scales, shape, each, given):
    """Scales of int8 numbers; `given` is what they were made of."""
    if scales.dtype != np.float32:
        cure = f"; {cast_cure(name, given, 'np.float32')} casts" if is_number(scales.dtype) else ""
        raise TypeError(f"{name}: expected float32, got dtype {scales.dtype}{cure}")
    if scales.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, one for each {each}, got shape {scales.shape}")


def check_ints(name, array, shape_text, num_axes):
    """A new contiguous int64 array of so many axes: nobody changes it after it was looked at."""
    given, array = array, as_array(name, array)
    if array.dtype.kind not in "iu" and array.size:
        cure = f"; {cast_cure(name, given, 'int')} casts" if array.dtype.kind == "f" else ""
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype}{cure}")
    if array.ndim != num_axes:
        raise ValueError(f"{name}: expected shape {shape_text}, got shape {array.shape}")
    if array.dtype == np.uint64:
        array = np.minimum(array, np.uint64(FAR))
    return np.array(array, np.int64, order="C")


def check_cu_seqlens(name, cu_seqlens, rows, batch=None):
    """Where sequences begin among so many rows, and end: one number more than there are sequences."""
    cu_seqlens = check_ints(name, cu_seqlens, "(batch + 1,)", 1)
    if not len(cu_seqlens):
        raise ValueError(f"{name}: expected one number or more, got none")
    if batch is not None and len(cu_seqlens) != batch + 1:
        raise ValueError(f"{name}: expected {batch + 1} numbers, one more than there are sequences, "
                         f"got {len(cu_seqlens)}")
    if cu_seqlens[0] != 0:
        raise ValueError(f"{name}: expected a start of 0, got {cu_seqlens[0]}")
    falls = np.flatnonzero(cu_seqlens[1:] < cu_seqlens[:-1])
    if len(falls):
        raise ValueError(f"{name}: expected numbers that never decrease, got {cu_seqlens[falls[0]]} before "
                         f"{cu_seqlens[falls[0] + 1]}")
    if cu_seqlens[-1] != rows:
        raise ValueError(f"{name}: expected an end of {rows}, the number of rows, got {cu_seqlens[-1]}")
    return cu_seqlens


def check_block_table(block_table, kv_lens, num_pages, page_size):
    """A contiguous int64 array (batch, max_pages), 0 where no key is; and kv_lens."""
    table = check_ints("block_table", block_table, "(batch, max_pages)", 2)
    kv_lens = check_ints("kv_lens", kv_lens, "(batch,)", 1)
    if len(kv_lens) != len(table):
        raise ValueError(f"kv_lens: expected one length for each of {len(table)} rows of block_table, "
                         f"got shape {kv_lens.shape}")
    longest = table.shape[1] * page_size
    if kv_lens.size and not 0 <= kv_lens.min() <= kv_lens.max() <= longest:
        raise ValueError(f"kv_lens: expected lengths from 0 to max_pages * page_size = {longest}, "
                         f"got {shown(kv_lens.tolist())}")
    used = np.arange(table.shape[1]) * max(1, page_size) < kv_lens[:, None]
    pages = table[used]
    if pages.size and not 0 <= pages.min() <= pages.max() < num_pages:
        wrong = pages.min() if pages.min() < 0 else pages.max()
        raise ValueError(f"block_table: expected pages from 0 to below num_pages = {num_pages} where keys are, "
                         f"got {wrong}")
    return np.where(used, table, 0), kv_lens


# Partial results.


def check_states(outputs, logsumexps):
    """Two lists of as many arrays, and the kind of the outputs."""
    outputs, name_of, given = _check_list("outputs", outputs, "n arrays (..., head_dim_v)", 2)
    if not outputs:
        raise ValueError("outputs: expected one array or more, got none")
    first, kind = outputs[0], check_kind(name_of(0), outputs[0], given(0))
    if not 1 <= first.ndim <= _MAX_AXES:
        raise ValueError(f"outputs[0]: expected 1 to {_MAX_AXES} axes (..., head_dim_v), got shape {first.shape}")
    for i, x in enumerate(outputs):
        if x.dtype != first.dtype:
            cure = f"; {cast_cure(name_of(i), given(i), first.dtype)} casts" if is_number(x.dtype) else ""
            raise TypeError(f"{name_of(i)}: expected the dtype of outputs[0], {first.dtype}, got {x.dtype}{cure}")
        if x.shape != first.shape:
            raise ValueError(f"outputs[{i}]: expected the shape of outputs[0], {first.shape}, got shape {x.shape}")
    logsumexps, name_of, given = _check_list("logsumexps", logsumexps, "n arrays (...), as many as outputs", 1)
    if len(logsumexps) != len(outputs):
        raise ValueError(f"logsumexps: expected as many as outputs, {len(outputs)}, got {len(logsumexps)}")
    dtype, shape = np.dtype(np.float64 if kind == F64 else np.float32), first.shape[:-1]
    for i, x in enumerate(logsumexps):
        if x.dtype != dtype:
            cure = f"; {cast_cure(name_of(i), given(i), dtype)} casts" if is_number(x.dtype) else ""
            raise TypeError(f"{name_of(i)}: expected {dtype}, as return_logsumexp=True gives it beside outputs of "
                            f"{first.dtype}, got {x.dtype}{cure}")
        if x.shape != shape:
            cure = ""
            if x.shape == (*shape, 1):
                cure = f"; logsumexps[{i}][..., 0] has it"
            elif x.ndim >= 2 and x.swapaxes(-1, -2).shape == shape:
                cure = f"; logsumexps[{i}].swapaxes(-1, -2) has it"
            raise ValueError(f"logsumexps[{i}]: expected shape {shape}, that of outputs[0] without the last axis, "
                             f"got shape {x.shape}{cure}")
    return outputs, logsumexps, kind


def _check_list(name, given, what, num_axes):
    """The arrays of a list, a tuple, or of one array with at least so many axes, whose first goes over them; and, as
    functions of i, what errors of dtypes call the array and what it was made of."""
    if isinstance(given, (list, tuple)):
        return [as_array(f"{name}[{i}]", x) for i, x in enumerate(given)], f"{name}[{{}}]".format, given.__getitem__
    array = as_array(name, given, f" or a list of {what}")
    if array.ndim < num_axes:
        raise ValueError(f"{name}: expected {what}, or one with a first axis of n, got shape {array.shape}")
    return [array[i, ...] for i in range(len(array))], lambda i: name, lambda i: given


def check_state_sinks(sinks, shape, dtype):
    """A view of this shape and dtype."""
    sinks = as_array("sinks", sinks)
    if not is_number(sinks.dtype):
        raise TypeError(f"sinks: expected a float or int array, got dtype {sinks.dtype}")
    try:
        return np.broadcast_to(cast(sinks, dtype), shape)
    except ValueError:
        cure = "; for one per head: sinks[:, None]" if sinks.shape == shape[-2:-1] else ""
        raise ValueError(f"sinks: expected a shape that broadcasts to that of the logsumexps, {shape}, "
                         f"got shape {sinks.shape}{cure}") from None


# Results.


def out_or_new(out, shape, dtype, inputs, itself=None):
    """What a function returns, a new array where `out` is None; and a view of it that is safe to write."""
    if out is None:
        out = np.empty(shape, dtype)
        return out, out
    return out, check_out(out, shape, dtype, inputs, itself)


def check_out(out, shape, dtype, inputs, itself=None):
    """A view of `out` as a plain array: what a subclass says of its shape and strides need not be true, and another
    thread may set them. `itself`: the input that it may be, element on element."""
    if not isinstance(out, np.ndarray):
        cure = "; its .numpy() shares its memory" if _is_torch(out) else ""
        raise TypeError(f"out: expected a numpy.ndarray, got {type(out).__name__}{cure}")
    if _is_masked(out):
        raise TypeError("out: expected a plain array, got a masked array, whose mask would be ignored; use its .data")
    out = np.asarray(out)[...]
    if out.dtype != dtype:
        raise TypeError(f"out: expected dtype {dtype}, got {out.dtype}; out[...] = result casts")
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got shape {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writeable array, got a read-only one")
    try:
        if _overlaps_itself(out):
            raise ValueError(f"out: expected elements that do not overlap each other, got strides {out.strides}")
    except np.exceptions.TooHardError:
        raise ValueError(f"out: expected elements that do not overlap each other, or strides of which that can be seen "
                         f"in {_MAX_STEPS} steps, got strides {out.strides}") from None
    for name, array in inputs.items():
        if array is None or (name == itself and _is_same_memory(out, array)):
            continue
        expected = f"{itself} itself, or memory of its own" if name == itself else "memory of its own"
        try:
            if np.may_share_memory(out, array) and np.shares_memory(out, array, max_work=_MAX_STEPS):
                raise ValueError(f"out: expected {expected}, got an array that overlaps {name}")
        except np.exceptions.TooHardError:
            raise ValueError(f"out: expected {expected}, or strides of which that can be seen in {_MAX_STEPS} steps, "
                             f"got an array that may overlap {name}") from None
    return out


def _is_same_memory(a, b):
    """Whether two arrays of one shape and dtype have each element in the same place."""
    starts = (array.__array_interface__["data"][0] for array in (a, b))
    return next(starts) == next(starts) and a.strides == b.strides


def _overlaps_itself(out):
    """Whether two elements share a byte. TooHardError where that is no matter of few steps."""
    axes = sorted((abs(stride), length, axis)
                  for axis, (stride, length) in enumerate(zip(out.strides, out.shape, strict=True)) if length > 1)
    extent = out.itemsize  # bytes from the first to the end of the last element, over the axes of smaller strides
    for stride, length, _ in axes:
        if stride < extent:
            break
        extent += stride * (length - 1)
    else:
        return False
    if not out.size:
        return False
    # Axes that interleave. Two elements that share a byte differ along a first axis of these: moved together, one is at
    # index 0 of it and the other is not, both at 0 of the axes before and anywhere along those after.
    here = [slice(None)] * out.ndim
    for _, _, axis in reversed(axes):
        there = here.copy()
        here[axis], there[axis] = slice(1), slice(1, None)
        if np.shares_memory(out[tuple(here)], out[tuple(there)], max_work=_MAX_STEPS):
            return True
    return False


# Tables of positions.


def check_table(length, dim, base, offset, layout, endpoint, positions=None):
    """The numbers as such, and `positions` as a new array."""
    length, dim = check_int("length", length, 0), check_int("dim", dim, 1)
    offset = check_int("offset", offset)
    if max(length, 1) * dim > 2**58:
        raise ValueError("length: expected at most 2**58 elements in the table, "
                         f"got {shown(length)} * {shown(dim)}")
    if not -(2**53) <= offset <= 2**53 - length:
        raise ValueError(f"offset: expected positions within +-2**53, got {shown(offset)} and length {length}")
    if not isinstance(base, numbers.Real):
        raise TypeError(f"base: expected a finite float >= 1, got {shown(base)}")
    try:
        number = float(base)
    except OverflowError:  # an int
        number = math.inf
    if not 1 <= number < math.inf:  # below 1, angles and their errors would outgrow the positions
        raise ValueError(f"base: expected a finite float >= 1, got {shown(base)}")
    if not (isinstance(layout, str) and layout in ("interleaved", "concatenated", "cosines_first")):
        raise ValueError(f"layout: expected 'interleaved', 'concatenated' or 'cosines_first', got {shown(layout)}")
    endpoint = check_bool("endpoint", endpoint)
    if endpoint and (dim % 2 or dim < 4):
        raise ValueError("dim: expected an even number >= 4 with endpoint=True, where dim / 2 - 1 steps lead from "
                         f"frequency 1 to 1 / base, got {shown(dim)}")
    if positions is not None:
        if offset:
            raise ValueError(f"offset: expected 0 with positions, got {shown(offset)}")
        positions = _check_positions(positions, length)
    return length, dim, base, offset, endpoint, positions


@np.errstate(all="ignore")
def _check_positions(positions, length):
    positions = as_array("positions", positions)
    if not is_number(positions.dtype):
        raise TypeError(f"positions: expected a float or int array, got dtype {positions.dtype}")
    if positions.shape != (length,):
        raise ValueError(f"positions: expected one for each row, shape ({length},), got shape {positions.shape}")
    if positions.dtype.kind in "iu":  # wide enough for the bound, and exact at it
        checked = positions.astype(np.uint64 if positions.dtype.kind == "u" else np.int64)
    else:
        checked = positions.astype(np.result_type(positions.dtype, np.float64))
    if length:
        for worst in (checked.min(), checked.max()):  # NaN, if there is one
            if not -(2**53) <= worst.item() <= 2**53:
                raise ValueError(f"positions: expected finite numbers within +-2**53, got {worst}")
    return checked


def check_rows(offset, positions, shape):
    """Of rows of this shape: the offset, an int array of positions or None, and the end of the table that has them."""
    offset = check_int("offset", offset, 0)
    seq = shape[-1]
    if positions is None:
        if offset + seq > 2**53:
            raise ValueError(f"offset: expected positions within 2**53, got {shown(offset)} and {seq} rows")
        offset = offset if math.prod(shape) else 0
        return offset, None, offset + seq
    if offset:
        raise ValueError(f"offset: expected 0 with positions, got {shown(offset)}")
    given, positions = positions, as_array("positions", positions)
    if positions.dtype.kind not in "iu":
        cure = f"; {cast_cure('positions', given, 'int')} casts" if positions.dtype.kind == "f" else ""
        raise TypeError(f"positions: expected integers, got dtype {positions.dtype}{cure}")
    try:
        broadcast = np.broadcast_to(positions, shape)
    except ValueError:
        raise ValueError(f"positions: expected one for each row, shape {shape} or axes that broadcast to it, "
                         f"got shape {positions.shape}") from None
    smallest, largest = (positions.min().item(), positions.max().item()) if broadcast.size else (0, -1)
    if smallest < 0 or largest >= 2**53:
        raise ValueError("positions: expected ints from 0 to below 2**53, got "
                         f"{shown(smallest if smallest < 0 else largest)}")
    return 0, broadcast.astype(np.int64), largest + 1


# Rotary positions.


def check_rotary_table(length, dim, base, offset, frequencies):
    """The numbers as such, and `frequencies` as a new float64 array."""
    length, dim, base, offset, _, _ = check_table(length, dim, base, offset, "cosines_first", False)
    if dim % 2:
        raise ValueError(f"dim: expected an even number (a pair of columns turns together), got {shown(dim)}")
    if frequencies is not None:
        frequencies = as_array("frequencies", frequencies)
        if not is_number(frequencies.dtype):
            raise TypeError(f"frequencies: expected a float or int array, got dtype {frequencies.dtype}")
        if frequencies.shape != (dim // 2,):
            raise ValueError(f"frequencies: expected one for each pair of columns, shape ({dim // 2},), "
                             f"got shape {frequencies.shape}")
        with np.errstate(all="ignore"):  # a long double may be too large for a double, or too small
            frequencies = np.array(frequencies, np.float64)
        for worst in (frequencies.min(), frequencies.max()):  # NaN, if there is one
            if not -(2**53) <= worst <= 2**53:
                raise ValueError(f"frequencies: expected finite numbers within +-2**53, got {worst}")
    return length, dim, base, offset, frequencies


def check_table_kind(x, cos, sin, given):
    """That of cos and sin; `given` are the three arrays' origins."""
    if cos.dtype != np.float32 and cos.dtype != x.dtype:
        expected = "float32" if x.dtype == np.float32 else f"float32, or {x.dtype} as x has"
        cure = f"; {cast_cure('cos', given[1], 'np.float32')} casts" if is_number(cos.dtype) else ""
        raise TypeError(f"cos: expected {expected}, got dtype {cos.dtype}{cure}")
    if sin.dtype != cos.dtype:
        cure = f"; {cast_cure('sin', given[2], 'cos.dtype')} casts" if is_number(sin.dtype) else ""
        raise TypeError(f"sin: expected the dtype of cos, {cos.dtype}, got {sin.dtype}{cure}")
    return check_kind("cos", cos)


def check_rotary(x, cos, sin, positions):
    """What is rotated, by which rows: positions as a new int64 array, or None."""
    if not x.ndim:
        raise ValueError("x: expected (..., dim), got shape ()")
    if not cos.ndim:
        raise ValueError("cos: expected (rows, columns), got shape ()")
    if sin.shape != cos.shape:
        raise ValueError(f"sin: expected the shape of cos, {cos.shape}, got shape {sin.shape}")
    columns, dim = cos.shape[-1], x.shape[-1]
    if 2 * columns > dim:
        cure = ""
        if columns == dim and dim % 2 == 0:
            cure = f"; of tables with each column twice, first all, then all again: cos[..., :{dim // 2}], sin likewise"
        raise ValueError(f"cos: expected a column for each pair of x's dim of {dim}, {dim // 2} or fewer, "
                         f"got shape {cos.shape}{cure}")
    if positions is not None:
        return _check_rotary_positions(x, cos, positions)
    leading = x.shape[:-1]
    if cos.ndim == x.ndim:
        if any(n not in (1, m) for n, m in zip(cos.shape[:-1], leading, strict=True)):
            raise ValueError(f"cos: expected rows for x's {leading} (axes of 1 broadcast), got shape {cos.shape}; or "
                             f"pass positions, for cos of 2 axes")
    elif cos.ndim == 2 and x.ndim == 3:
        raise ValueError("cos: expected 3 axes, or positions with it, since x of 3 axes may be (batch, seq, dim) or "
                         f"(total, heads, dim), got shape {cos.shape}; for the first pass cos[None] and sin[None], for "
                         f"the second cos[:, None] and sin[:, None]")
    elif cos.ndim == 2 and x.ndim > 3:
        if cos.shape[0] != leading[-1]:
            raise ValueError(f"cos: expected {leading[-1]} rows, one for each of x's axis -2, got shape {cos.shape}; "
                             f"or pass positions, which say which rows")
    else:
        cure = ""
        if x.ndim == 4 and cos.shape[:-1] == (x.shape[0], x.shape[2]):
            cure = "; for the same rows for each head: cos[:, None] and sin[:, None]"
        raise ValueError(f"cos: expected (rows, columns), or {x.ndim} axes, as x has, got shape {cos.shape}{cure}")
    return None


def _check_rotary_positions(x, cos, positions):
    given, positions = positions, as_array("positions", positions)
    if positions.dtype.kind not in "iu":
        cure = f"; {cast_cure('positions', given, 'int')} casts" if positions.dtype.kind == "f" else ""
        raise TypeError(f"positions: expected integers, got dtype {positions.dtype}{cure}")
    if cos.ndim != 2:
        raise ValueError(f"cos: expected (rows, columns) with positions, got shape {cos.shape}")
    leading, shape = x.shape[:-1], positions.shape
    if len(shape) != len(leading) or any(n not in (1, m) for n, m in zip(shape, leading, strict=True)):
        cures = []
        if len(leading) == 2 and len(shape) == 1:
            cures = ["for x of (batch, seq, dim) positions[None]"] if shape[0] == leading[1] else []
            cures += ["for x of (total, heads, dim) positions[:, None]"] if shape[0] == leading[0] else []
        elif len(leading) == 3 and shape == (leading[0], leading[2]):
            cures = ["for the same of each head: positions[:, None]"]
        elif len(leading) == 3 and shape == (leading[2],):
            cures = ["for the same of each head: positions[None, None]"]
        elif len(leading) == 3 and shape == (leading[0],) and leading[2] == 1:
            cures = ["for one of each batch row: positions[:, None, None]"]
        raise ValueError(f"positions: expected {len(leading)} axes, those of x but the last, that are or broadcast to "
                         f"{leading}, got shape {shape}{'; ' if cures else ''}{', '.join(cures)}")
    checked = positions.astype(np.int64)  # a copy, which nobody changes behind the check
    if checked.size and checked.view(np.uint64).max() >= len(cos):  # those below 0 are huge there
        smallest, largest = positions.min().item(), positions.max().item()
        raise ValueError(f"positions: expected ints from 0 to below {len(cos)}, the rows of cos, got "
                         f"{shown(smallest if smallest < 0 else largest)}")
    return checked


# Linear.


def check_linear(x, weight, scales, given):
    """The kinds of x and weight; `given` are the three that these were made of. scales: None but for int8."""
    x_kind = check_kind("x", x, given[0])
    kind = I8 if weight.dtype == np.int8 else KINDS.get(weight.dtype)
    if kind is None and _is_bfloat16(weight.dtype):
        kind = check_kind("weight", weight)
    if kind not in (x_kind, F16, BF16, I8):
        others = "".join(f"{name}, " for name in ("float16", "bfloat16") if name != x.dtype.name)
        cure = f"; {cast_cure('weight', given[1], 'x.dtype')} casts" if is_number(weight.dtype) else ""
        raise TypeError(f"weight: expected {x.dtype}, as x has, {others}or int8 with weight_scales, got dtype "
                        f"{weight.dtype}{cure}")
    if not x.ndim:
        raise ValueError("x: expected 1 axis (in_features,) or more, got shape ()")
    in_features = x.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != in_features:
        cure = "; weight.T has it" if weight.ndim == 2 and weight.shape[0] == in_features else ""
        raise ValueError(f"weight: expected shape (out_features, {in_features}), got shape {weight.shape}{cure}")
    if in_features > _MAX_NUMBERS or math.prod(x.shape[:-1]) * len(weight) > sys.maxsize // 8:
        raise ValueError(f"x: expected at most {_MAX_NUMBERS} in_features and a result that fits in memory, got shape "
                         f"{x.shape} for a weight of shape {weight.shape}")
    if scales is None:
        if kind == I8:
            raise TypeError("weight_scales: expected a float32 array, as weight is int8, got None; "
                            f"{cast_cure('weight', given[1], 'x.dtype')} is a weight without")
        return x_kind, kind
    if kind != I8:
        raise ValueError(f"weight_scales: expected None, as weight is {weight.dtype}, got an array; they scale int8")
    check_scales("weight_scales", scales, (len(weight), -(-in_features // SCALE_DIMS)),
                 f"{SCALE_DIMS} numbers of a row of weight", given[2])
    return x_kind, kind


# Layers.


def check_parameter(name, value, shape, dtype):
    """`value` as a C-contiguous, aligned array of this shape and dtype; None where there is no bias."""
    if value is None and len(shape) == 1:
        return None
    array = as_array(name, value)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got shape {array.shape}")
    if array.dtype != dtype:
        if not is_number(array.dtype):
            raise TypeError(f"{name}: expected a float or int array, got dtype {array.dtype}")
        array = cast(array, dtype)
    return array if array.flags.c_contiguous and array.flags.aligned else copy(array, dtype)


def check_layer_inputs(layer, query, key, value):
    """The same array for two of them stays one: they are projected together."""
    given_query, given_key, given_value = query, key, value
    query = as_array("query", query)
    key = query if key is None or key is given_query else as_array("key", key)
    value = (key if value is None or value is given_key else query if value is given_query
             else as_array("value", value))
    dim = layer.input_dim
    for name, x, given, size in (("query", query, given_query, dim), ("key", key, given_key, layer.kdim),
                                 ("value", value, given_value, layer.vdim)):
        if x.dtype != layer.dtype:
            raise_layer_dtype(name, x, given, layer.dtype, "layer.dtype", size)
    if query.ndim not in (2, 3) or query.shape[-1] != dim:
        cure = ""
        if query.shape == (dim,):
            cure = "; for one query: np.atleast_2d(query)"
        elif query.shape[-1:] == (layer.head_dim,) and query.ndim == 4:
            cure = "; the layer makes the heads itself"
        elif query.ndim in (2, 3) and query.shape[-1]:
            cure = f"; a layer with input_dim={query.shape[-1]} takes it"
        raise ValueError(f"query: expected (batch, seq_len_q, {dim}) or (seq_len_q, {dim}), "
                         f"got shape {query.shape}{cure}")
    if key.ndim != query.ndim or key.shape[:-2] != query.shape[:-2] or key.shape[-1] != layer.kdim:
        expected = ", ".join(map(str, (*query.shape[:-2], "seq_len_kv", layer.kdim)))
        cure = ""
        if given_key is None:
            cure = ", the query's, since key is None"
        elif key.ndim == query.ndim and key.shape[:-2] == query.shape[:-2] and key.shape[-1]:
            cure = f"; a layer with kdim={key.shape[-1]} takes it"
        raise ValueError(f"key: expected ({expected}), got shape {key.shape}{cure}")
    if value.shape != (*key.shape[:-1], layer.vdim):
        expected = "the shape of key, " if layer.vdim == layer.kdim else ""
        cure = ""
        if given_value is None:
            cure = ", the key's, since value is None"
        elif value.shape[:-1] == key.shape[:-1] and value.shape[-1]:
            cure = f"; a layer with vdim={value.shape[-1]} takes it"
        raise ValueError(f"value: expected {expected}{(*key.shape[:-1], layer.vdim)}, got shape {value.shape}{cure}")
    return query, key, value


def check_key_mask(key_mask, key):
    """A bool array (batch, seq_len_kv) for a key of 2 or 3 axes."""
    given, key_mask = key_mask, as_array("key_mask", key_mask)
    if key_mask.dtype != bool:
        cure = ""
        if key_mask.dtype.kind in "iu":
            cure = f"; for 1 = attend: {cast_cure('key_mask', given, 'bool')}"
        elif is_number(key_mask.dtype):
            cure = "; what is added to the scores is attn_mask"
        raise TypeError(f"key_mask: expected bool (True = attend), got dtype {key_mask.dtype}{cure}")
    if key_mask.shape != key.shape[:-1]:
        text = "(batch, seq_len_kv)" if key.ndim == 3 else "(seq_len_kv,)"
        cure = "; a mask of queries and keys is attn_mask" if key_mask.ndim > 1 and len(key_mask) != 1 else ""
        raise ValueError(f"key_mask: expected shape {text} = {key.shape[:-1]}, got shape {key_mask.shape}{cure}")
    return key_mask if key.ndim == 3 else key_mask[None]


def check_layer_mask(layer, attn_mask, query, key):
    """A view of 2 or 4 axes."""
    attn_mask = as_array("attn_mask", attn_mask)
    batch, rows = len(query) if query.ndim == 3 else 1, (query.shape[-2], key.shape[-2])
    allowed = {2: rows, 3: (batch, *rows), 4: (batch, layer.num_heads, *rows)}
    expected = allowed.get(attn_mask.ndim)
    if expected is None or any(n not in (1, m) for n, m in zip(attn_mask.shape, expected, strict=True)):
        cure = ""
        if attn_mask.shape in ((rows[1],), (batch, rows[1])):
            cure = "; for a padding mask: key_mask, or kv_lens"
        elif attn_mask.shape == (batch * layer.num_heads, *rows):
            cure = f"; for one mask per batch row and head: mask.reshape{allowed[4]}"
        raise ValueError(f"attn_mask: expected {allowed[2]}, {allowed[3]} or {allowed[4]} (axes of 1 broadcast), "
                         f"got shape {attn_mask.shape}{cure}")
    return attn_mask[:, None] if attn_mask.ndim == 3 else attn_mask


def raise_layer_dtype(name, array, given, dtype, dtype_text, dim):
    """The TypeError of an input that has not the layer's dtype; `dim` is the length that its last axis should have."""
    cure = ""
    if array.dtype.kind in "iu" and array.shape[-1:] != (dim,):
        cure = "; token numbers are looked up in an embedding first"
    elif array.dtype.kind in "US":
        cure = "; tokens are looked up in an embedding first"
    elif is_number(array.dtype):
        cure = f"; {cast_cure(name, given, dtype_text)} casts"
    raise TypeError(f"{name}: expected the dtype of the layer, {dtype}, got {array.dtype}{cure}")


def layer_text(layer, own, defaults):
    """The call that makes such a layer: which of `own` are not these defaults. A layer may be half made, as a debugger
    shows it, and its attributes may be anything."""
    texts = []
    for name, default in defaults.items():
        value = own.get(name, default)
        comparable = all(isinstance(x, (numbers.Number, str, np.bool_, np.dtype)) for x in (value, default))
        if not (value is default or (comparable and value == default)):
            texts.append(f"{name}={value.name if isinstance(value, np.dtype) else shown(value)}")
    return f"{type(layer).__name__}({', '.join(texts)})"
