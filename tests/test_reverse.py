"""The model that learns to reverse sequences: its gradients, what it learns, the same in PyTorch, and its command."""

import importlib.util
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import line_of_error, python

import cattn
from bench import reverse

ROOT = Path(reverse.__file__).parents[1]
# Who sees its own digit alone knows nothing about its label: on average no loss is below log(10), whatever the model.
BLIND = math.log(reverse.DIGITS)


def step_of(model, digits):
    """(loss, gradients of the parameters)"""
    logits, pullback = model.vjp(digits)
    loss, grad = reverse.cross_entropy(logits, digits[:, ::-1])
    return loss, pullback(grad)


@pytest.mark.parametrize("attention_class", [cattn.MultiHeadAttention, cattn.reference.MultiHeadAttention],
                         ids=["public", "reference"])
def test_gradients(attention_class):
    """Along random directions, against differences of the loss."""
    rng = np.random.default_rng(0)
    model = reverse.Model(0, np.float64, attention_class)
    for parameter in model.parameters.values():
        parameter += 0.1 * rng.standard_normal(parameter.shape)  # no bias is 0, no weight of a norm 1
    digits = reverse.sequences(rng, 3)
    loss, gradients = step_of(model, digits)
    assert gradients.keys() == model.parameters.keys()
    # The loss is a mean over 48 digits, whose roundings mostly cancel: within 32 ulps, where 1 was seen. The third
    # derivative adds step**2 times a number near 1. No hidden number is so near to 0 that a step changes its sign.
    step = 1e-6
    bound = 32 * np.spacing(loss) / step
    for name, parameter in model.parameters.items():
        for _ in range(3):
            start, direction = parameter.copy(), rng.standard_normal(parameter.shape)
            losses = []
            for place in (-step, step):
                parameter[...] = start + place * direction
                losses.append(step_of(model, digits)[0])
            parameter[...] = start
            slope = np.vdot(gradients[name], direction)
            assert abs((losses[1] - losses[0]) / (2 * step) - slope) <= bound, name
            assert abs(slope) > 1000 * bound, name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_dtype(dtype):
    model = reverse.Model(0, dtype)
    digits = reverse.held_out(0)[:2]
    logits, pullback = model.vjp(digits)
    _, grad = reverse.cross_entropy(logits, digits)
    gradients = pullback(grad)
    adam = reverse.Adam(model.parameters)
    adam.step(gradients, 0.1)
    arrays = [logits, grad, model.attention_weights(digits), *gradients.values(), *model.parameters.values(),
              *adam.means.values(), *adam.squares.values()]
    assert {array.dtype for array in arrays} == {np.dtype(dtype)}


def test_adam():
    """Against the paper's lines."""
    rng = np.random.default_rng(0)
    theta = rng.standard_normal((4, 3))
    parameters = {"a": theta.copy()}
    adam = reverse.Adam(parameters)
    m = v = np.zeros_like(theta)
    for t, alpha in enumerate((0.1, 0.2, 0.05), 1):
        g = rng.standard_normal(theta.shape)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        theta = theta - alpha * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        adam.step({"a": g}, alpha)
    # Numbers near 1 after some 10 operations, of which 1 - 0.999 loses three digits.
    np.testing.assert_allclose(parameters["a"], theta, rtol=0, atol=1e-12)


def test_rates():
    rates = reverse.rates(500)
    assert len(rates) == 500
    peak = int(np.argmax(rates))
    assert peak == reverse.WARM_UP - 1 and 0.97 * reverse.RATE < rates[peak] <= reverse.RATE
    assert np.all(np.diff(rates[: peak + 1]) > 0) and np.all(np.diff(rates[peak:]) < 0)
    assert 0 < rates[0] < reverse.RATE / 40 and 0 < rates[-1] < reverse.RATE / 1000
    assert reverse.rates(1) == [reverse.RATE / reverse.WARM_UP]


def test_sequences_of_a_seed():
    def first(seed):
        return next(reverse.batches(seed, 1))

    assert first(3).shape == (reverse.BATCH_SIZE, reverse.LENGTH)
    np.testing.assert_array_equal(first(3), first(3))
    seen = np.concatenate(list(reverse.batches(3, 50)))
    assert set(seen.ravel()) == set(range(10))
    everything = [*map(tuple, seen), *map(tuple, first(4)), *map(tuple, reverse.held_out(3))]
    assert len(set(everything)) == len(everything)


SAME_BITS = """if 1:
    import cattn
    from bench import reverse
    for num_threads in 1, 2:
        cattn.set_num_threads(num_threads)
        model = reverse.Model(7)
        print(*(loss.hex() for loss, _ in reverse.train(model, 7, 12)), *map(hash, (
            array.tobytes() for array in model.parameters.values())))
"""


def test_threads_change_no_bit():
    done = python(SAME_BITS, folder=ROOT, OPENBLAS_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    one, two = (line.split() for line in done.stdout.splitlines())
    assert one == two
    assert len(set(one[:12])) == 12 and float.fromhex(one[11]) < float.fromhex(one[0])


PRODUCTS = """if 1:
    import runpy, sys
    from contextlib import suppress
    sys.argv[1:] = ["--steps", "1"]
    with suppress(SystemExit):
        runpy.run_module("bench.reverse", run_name="__main__", alter_sys=True)
    from threadpoolctl import threadpool_info
    print(*(pool["num_threads"] for pool in threadpool_info() if pool["internal_api"] == "openblas"))
"""


def test_products_have_one_thread():
    demo_packages()
    pytest.importorskip("threadpoolctl")
    done = python(PRODUCTS, folder=ROOT, without=["OPENBLAS_NUM_THREADS"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] in ("1", "")  # another BLAS is left alone


# The command.


def demo_packages():
    pytest.importorskip("tqdm")


def error_line(capsys, arguments):
    return line_of_error(capsys, reverse.main, arguments, "bench.reverse")


LEARNS = """if 1:
    import json, sys
    from bench import reverse
    from cattn import plots
    draw, learn = plots.weights, reverse.learn
    found = {}
    def keeping_losses(*arguments):
        found["losses"], found["seconds"] = learn(*arguments)
        return found["losses"], found["seconds"]
    def keeping_weights(weights, *names):
        found.update(weights=weights.tolist(), names=names)
        return draw(weights, *names)
    plots.weights, reverse.learn = keeping_weights, keeping_losses
    assert reverse.main(["--plot", "a.png"]) == 0
    print(json.dumps(found))
"""


def test_it_learns(tmp_path):
    """To reverse every sequence; and attention looks at what it has to copy."""
    demo_packages()
    pytest.importorskip("matplotlib")
    done = python(LEARNS, folder=tmp_path, without=["COLUMNS"], PYTHONPATH=str(ROOT), OPENBLAS_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    *lines, found = done.stdout.splitlines()
    assert lines[0].startswith("1000 of 1000 sequences that it has not seen are reversed, 100.00% of their digits")
    asked, answer = (part.split() for part in lines[1].split("->"))
    assert answer == asked[::-1]
    assert re.fullmatch(rf"cattn: \d+ steps/s; {cattn.isa}, \d+ threads?", lines[2])
    assert lines[3:] == [f"{tmp_path / 'a.png'}: what each digit of this sequence looks at"]

    found = json.loads(found)
    losses, weights = found["losses"], np.array(found["weights"])
    assert len(losses) == reverse.STEPS and found["seconds"] > 0
    assert losses[0] > BLIND and max(losses[-10:]) < BLIND / 100
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert found["names"] == [asked, asked]
    assert weights.shape == (1, 16, 16)
    np.testing.assert_array_equal(weights[0].argmax(axis=-1), np.arange(16)[::-1])
    assert re.search(r"500/500 .*loss 0\.\d+, 100\.0% right", done.stderr)


def test_what_is_not_learned_is_told(capsys):
    demo_packages()
    assert reverse.main(["--steps", "1", "--threads", "1", "--seed", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("0 of 1000 sequences")
    assert float(re.search(r"reversed, (.*)% of their digits", lines[0])[1]) < 20  # 10 by chance
    asked, answer = (part.split() for part in lines[1].split("->"))
    assert answer != asked[::-1]
    assert lines[2].endswith(", 1 thread")


def test_as_in_pytorch():
    """Batches, weights, rates, gradients and steps are the same."""
    demo_packages()
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    done = subprocess.run([sys.executable, "-m", "bench.reverse", "--torch", "--steps", "60", "--threads", "1"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    difference = re.fullmatch(r"torch .*: \d+ steps/s; losses of the first 20 steps agree: (.*) apart at most",
                              done.stdout.splitlines()[-1])[1]
    # Both round losses near 2.5 in float32: 4.8e-7, two ulps of these, was seen. Norms with an epsilon of 1e-6 make
    # 1e-5, and a gradient without the rows of the keys 1e-3.
    assert float(difference) <= 5e-6


def stand_in(monkeypatch, off):
    """PyTorch has these losses, and is so far off in the last but one of them."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    losses = [loss for loss, _ in reverse.train(reverse.Model(0), 0, 3)]
    losses[1] += off
    monkeypatch.setattr(reverse, "torch_learn", lambda seed, steps, num_threads: {
        "losses": losses, "seconds": 0.5, "version": "9.9"})


@pytest.mark.parametrize(("off", "status", "word"), [(9e-4, 0, "agree: 9.0e-04"), (-2e-3, 1, "DIFFER: 2.0e-03")])
def test_what_differs_from_pytorch_is_told(capsys, monkeypatch, off, status, word):
    demo_packages()
    stand_in(monkeypatch, off)
    assert reverse.main(["--torch", "--steps", "3"]) == status
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"torch 9.9: 6 steps/s; losses of the first 3 steps {word} apart at most"


def test_pytorch_fails(capsys, monkeypatch):
    demo_packages()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda args, **options: run(
        [sys.executable, "-c", "import sys; sys.exit(3)"], **options))
    assert reverse.main(["--torch", "--steps", "1"]) == 2
    assert capsys.readouterr().err.endswith("bench.reverse: PyTorch failed, as it says above\n")


@pytest.mark.parametrize(("arguments", "missing"), [
    ([], "tqdm (README.md says"), (["--torch"], "torch (pip install torch)"),
])
def test_packages_that_are_missing_are_named(capsys, monkeypatch, arguments, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else name)
    assert f"not installed: {missing}" in error_line(capsys, arguments)


def test_arguments_that_are_no_text(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert r"expected arguments in UTF-8, got ['--plot', " in error_line(capsys, ["--plot", f"{tmp_path}/\udcff.png"])


WRONG_ARGUMENTS = {
    **{
        f"{option}={value}": ([f"{option}={value}"], f"argument {option}: expected ")
        for option, values in {
            "--steps": ("0", "-1", "1.5", "many", "100001"), "--threads": ("0", "1025", "x"), "--seed": ("-1", "1e3"),
            "--plot": ("a", "a.xyz"),
        }.items() for value in values
    },
    "no directory": (["--plot", "no/such/a.png"], "argument --plot: no directory 'no/such'"),
    "a question": (["words"], "unrecognized arguments: words"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_arguments(capsys, arguments, message):
    if any("--plot" in argument for argument in arguments):
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as error:
        reverse.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_ctrl_c():
    demo_packages()
    code = ("import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
            "sys.argv[1:] = ['--steps', '100000']; runpy.run_module('bench.reverse', run_name='__main__',"
            " alter_sys=True)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = process.stderr.read(300)  # it learns
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"steps/s" in seen and not out and b"Traceback" not in err
