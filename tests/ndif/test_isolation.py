"""A block that tries to get out of its process: it fails, and the next one is served."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from nnsight import LanguageModel
from nnsight_ndif import Limits, Local, launch
from nnsight_ndif.errors import IsolationError, RunnerError, RunnerTimeoutError


@pytest.fixture(scope="module", autouse=True)
def _isolated():
    """Skip, and say why, where the system cannot isolate."""
    waived = os.environ.get("NNSIGHT_ALLOW_MISSING")
    if waived:
        pytest.skip(f"this system cannot isolate a block, or need not: {waived} may be missing")
    try:
        launch.zygote()
    except IsolationError as error:
        pytest.skip(f"this system cannot isolate a block: {error}")


@pytest.fixture(autouse=True)
def _serves_the_next(net, x):
    yield
    with net.trace(x, remote="local"):
        result = net.output.save()
    assert torch.equal(result, net._module(x))


def test_files_cannot_be_read_written_or_listed(net, x, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    paths = [str(secret), "/etc/passwd", "/proc/self/environ", "/proc/1/maps"]
    target, folder = str(tmp_path / "new.txt"), str(tmp_path)
    with net.trace(x, remote="local"):
        import os

        refused = [].save()
        for path in paths:
            try:
                with open(path) as file:
                    file.read()
            except OSError as error:
                refused.append(error.errno)
        for attempt in (
            lambda: os.open(target, os.O_WRONLY | os.O_CREAT),
            lambda: os.listdir(folder), lambda: os.listdir("/"), lambda: os.unlink(paths[0]),
            lambda: os.mkdir(folder + "/a"), lambda: os.symlink("/etc", folder + "/b"),
        ):  # fmt: skip
            try:
                attempt()
            except OSError as error:
                refused.append(error.errno)
    assert refused == [13] * 10
    assert not (tmp_path / "new.txt").exists()
    assert secret.read_text() == "secret"


def test_error_of_a_file_is_what_it_is_here(net, x):
    with pytest.raises(PermissionError, match="'/etc/passwd'") as caught:
        with net.trace(x, remote="local"):
            with open("/etc/passwd"):
                pass
    assert caught.value.filename == "/etc/passwd"


def test_environment_folder_and_processes_are_not_to_be_seen(net, x):
    with net.trace(x, remote="local"):
        import os

        seen = [dict(os.environ), os.getcwd(), os.getpid(), os.getppid(), os.getuid()].save()
    assert seen == [{}, "/", 1, 0, 65534]


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET"])
def test_sockets_cannot_be_made(net, x, family):
    with pytest.raises(PermissionError):
        with net.trace(x, remote="local"):
            import socket

            socket.socket(getattr(socket, family), socket.SOCK_DGRAM)


def test_processes_cannot_be_started(net, x):
    with net.trace(x, remote="local"):
        import os
        import subprocess

        refused = [].save()
        for attempt in (
            os.fork, lambda: subprocess.run(["/bin/true"]), lambda: os.execv("/bin/true", ["true"]),
            lambda: os.posix_spawn("/bin/true", ["true"], {}),
        ):  # fmt: skip
            try:
                attempt()
            except OSError as error:
                refused.append(error.errno)
    assert refused == [1, 1, 1, 1]


def test_signals_reach_nobody_outside(net, x):
    parent = os.getpid()
    with net.trace(x, remote="local"):
        import os as system

        reached = [].save()
        for number in [parent, *range(2, 3000)]:
            try:
                system.kill(number, 0)
                reached.append(number)
            except OSError:
                pass
        system.kill(0, 15)
    assert reached == []


@pytest.mark.parametrize("name", ["ptrace", "mount", "bpf", "keyctl", "io_uring_setup", "perf_event_open",
                                  "userfaultfd", "unshare", "setns", "process_vm_readv", "clone3"])  # fmt: skip
def test_system_call_is_denied(net, x, name):
    from nnsight_ndif.seccomp import _CALLS, _MACHINES

    column = _MACHINES[os.uname().machine][1]
    number = _CALLS[name][column] if name != "clone3" else 435
    with net.trace(x, remote="local"):
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        outcome = (libc.syscall(number, 0, 0, 0, 0, 0, 0), ctypes.get_errno()).save()
    assert outcome == (-1, 38 if name == "clone3" else 1)


def test_memory_is_limited(net, x):
    limits = Limits(memory=256 << 20, window=64 << 20)
    with pytest.raises(MemoryError):
        with net.trace(x, backend=Local(limits)):
            bytearray(1 << 30)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        with net.trace(x, backend=Local(limits)):
            kept = []
            while True:
                kept.append(torch.ones(1 << 22))


def test_threads_are_limited(net, x):
    with net.trace(x, backend=Local(Limits(memory=256 << 20, window=64 << 20))):
        import threading
        import time

        count = 0
        try:
            while count < 100_000:
                threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
                count += 1
        except RuntimeError:
            pass
        count = count.save()
    assert 0 < count < 1000


def test_endless_loop_is_killed_at_its_deadline(net, x):
    start = time.monotonic()
    with pytest.raises(RunnerTimeoutError, match="longer than it may"):
        with net.trace(x, backend=Local(Limits(seconds=1))):
            net[0].output
            while True:
                pass
    assert time.monotonic() - start < 5


def test_endless_generation_is_ended_at_the_deadline():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=1, vocab_size=16, n_positions=60_000, bos_token_id=1, eos_token_id=2
    )
    model = LanguageModel(GPT2LMHeadModel(config).eval())
    with model.trace(torch.tensor([[3]]), remote="local"):
        model.lm_head.output  # the process that runners of such models are forked from is there now
    start = time.monotonic()
    with pytest.raises(RunnerTimeoutError, match="longer than it may"):
        with model.generate(
            torch.tensor([[3]]), max_new_tokens=50_000, min_new_tokens=50_000, do_sample=False, pad_token_id=0,
            backend=Local(Limits(seconds=2)),
        ):  # fmt: skip
            model.lm_head.output
    assert time.monotonic() - start < 10


def test_endless_talk_is_ended(net, x):
    with pytest.raises(RunnerError, match="more messages than it may"):
        with net.trace(x, backend=Local(Limits(turns=200))):
            while True:
                net[0].in_features
    with pytest.raises(RunnerError, match="printed more than it may"):
        with net.trace(x, backend=Local(Limits(printed=10_000))):
            while True:
                print("x" * 1000)


def test_death_of_the_process_is_told(net, x):
    with pytest.raises(RunnerError, match="signal 11"):
        with net.trace(x, remote="local"):
            net[0].output
            import ctypes

            ctypes.string_at(0)
    with pytest.raises(RunnerError, match="has ended"):
        with net.trace(x, remote="local"):
            import os

            os._exit(0)


def test_nothing_is_left_of_a_job(net, x):
    this = psutil.Process()
    with net.trace(x, remote="local"):
        net[0].output
    opened = this.num_fds()
    for _ in range(5):
        with net.trace(x, remote="local"):
            net[0].output
        with pytest.raises(RunnerTimeoutError):
            with net.trace(x, backend=Local(Limits(seconds=0.3))):
                while True:
                    pass
    deadline = time.monotonic() + 5
    while len(this.children(recursive=True)) > len(launch._zygotes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert this.num_fds() == opened
    assert len(this.children(recursive=True)) == len(launch._zygotes)


def test_several_jobs_at_once_have_a_process_each(net, x):
    def job(number):
        with net.trace(x * number, remote="local"):
            import os

            found = [net.output, os.getpid()].save()
        return found

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(job, range(8)))
    for number, (result, process) in enumerate(results):
        assert torch.equal(result, net._module(x * number)) and process == 1


def test_runners_end_with_the_process_that_started_them(net, x):
    zygote = launch.Zygote()
    runner = zygote.start(Limits())
    (process,) = psutil.Process(zygote._process.pid).children()
    zygote.close()
    process.wait(10)
    runner.close()


def test_reason_why_no_runner_can_be_started_is_told():
    program = (
        "import sys; from nnsight_ndif import isolation, zygote\n"
        "isolation.missing = lambda waived: {}\n"
        "def fail(): raise OSError('no more users')\n"
        "isolation.enter_namespaces = fail\n"
        "zygote.main(sys.argv[1:])"
    )
    made = launch.Zygote.__new__(launch.Zygote)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", program, str(theirs.fileno()), "", ""]
    made._orders, made._lock, made._owner = ours, threading.Lock(), os.getpid()
    made._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    assert ours.recv(100) == b"{}"
    try:
        for _ in range(2):
            with pytest.raises(RunnerError, match="No runner could be started: OSError: no more users"):
                made.start(Limits())
    finally:
        made.close()


def test_jobs_know_nothing_of_each_other(net, x):
    with net.trace(x, remote="local"):
        import builtins

        builtins.planted = 1
        net[0].output
    with net.trace(x, remote="local"):
        import builtins as names

        found = hasattr(names, "planted").save()
    assert found is False


def test_missing_measure_is_named_and_refused():
    program = (
        "import sys; from nnsight_ndif import isolation, zygote\n"
        "def fail(*_): raise OSError('not on this kernel')\n"
        "isolation._landlock = isolation._try_landlock = fail\n"
        "print(isolation.missing(), isolation.missing(['landlock']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "{'landlock': 'not on this kernel'} {}\n"
    with pytest.raises(IsolationError, match="There is no measure locks; there are: namespaces"):
        launch.Zygote(waived=["locks"])
