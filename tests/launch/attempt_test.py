"""Real processes, small ones: how they are watched, ended and explained."""

import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.multi_worker.processes import assert_gone, children_of

SECONDS = 60

# The attempt runs in a process of its own, as it does for the user: its
# signals and its guardian are not this one's.
PROGRAM = """
import json, pathlib, sys
from launch.attempt import Attempt
from launch.guardian import Guardian
from launch.post_mortem import first_to_fail
from launch.worker_process import Start

scripts, limits = json.loads(sys.argv[1]), json.loads(sys.argv[2])
attempt = Attempt(
    Guardian(),
    **{"hang_timeout": 60, "silence_timeout": 60, "leave_timeout": 1, **limits},
)
endings = attempt.run([
    Start(i, [sys.executable, "-uc", script], {"INDEX": str(i)}, [],
          pathlib.Path(f"worker-{i}.log"))
    for i, script in enumerate(scripts)
])
first = first_to_fail(endings, attempt.hung)
print(json.dumps({
    "statuses": [e.status for e in endings],
    "killed": [e.killed for e in endings],
    "places": [e.beat.place for e in endings],
    "first": first and first.index,
    "hung": attempt.hung, "why": attempt.why, "asked": attempt.asked,
}))
"""
BEATING = """
import os, signal, sys, threading, time
from launch.heartbeat import Beat, Heart
heart = Heart()
heart.read = lambda: Beat("in the step, at step 7")
"""
FOR_EVER = "\nwith heart.beating():\n    threading.Event().wait()\n"
WAITS = """
import os, time
while not os.path.exists("{}"):
    time.sleep(0.05)
"""
FAILS = "import sys; print('oh', file=sys.stderr); sys.exit(3)"


def start(cwd, *scripts, **limits):

    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            PROGRAM,
            json.dumps(scripts),
            json.dumps(limits),
        ],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """What the program found, its other output, and its errors."""

    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    *lines, last = output.splitlines()
    return json.loads(last), lines, errors


def run(cwd, *scripts, **limits):
    return finish(start(cwd, *scripts, **limits))


def test_lines_are_shown_with_the_worker_and_kept_in_its_log(tmp_path):
    script = "import os, sys; i = os.environ['INDEX']; print('out', i); "
    script += "print('err', i, file=sys.stderr); print('no end', end='')"
    found, lines, errors = run(tmp_path, script, script)
    assert found["statuses"] == [0, 0]
    assert found["first"] is None
    assert lines == ["out 0", "no end"]
    for line in ("[worker 0] err 0", "[worker 1] out 1", "[worker 1] err 1"):
        assert line in errors.splitlines()
    log = (tmp_path / "worker-1.log").read_text().splitlines()
    assert log[0].startswith("--- ")
    assert sorted(log[1:]) == ["err 1", "no end", "out 1"]


def test_a_failure_ends_the_others(tmp_path):
    beats_twice = BEATING + textwrap.dedent("""
        def read(beats=[]):
            if beats:
                open("has beaten", "w").close()
            beats.append(Beat("in the step, at step 7"))
            return beats[0]
        heart.read = read
        """)
    fails = WAITS.format("has beaten") + FAILS
    found, _, errors = run(tmp_path, beats_twice + FOR_EVER, fails)
    assert found["statuses"] == [-signal.SIGTERM, 3]
    assert found["first"] == 1
    assert found["places"][0] == "in the step, at step 7"
    assert "[worker 1] oh" in errors


def test_one_that_stays_shows_its_stacks_and_is_killed(tmp_path):
    stubborn = BEATING + textwrap.dedent("""
        import faulthandler
        faulthandler.register(signal.SIGUSR2)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open("is deaf", "w").close()
        def stay_here():
            threading.Event().wait()
        stay_here()
        """)
    fails = WAITS.format("is deaf") + FAILS
    found, _, errors = run(tmp_path, stubborn, fails)
    assert found["statuses"] == [-signal.SIGKILL, 3]
    assert found["first"] == 1
    assert found["killed"][0].startswith("it did not leave when it was told")
    assert "in stay_here" in errors


def test_one_that_lost_another_waits_for_its_end(tmp_path):
    """The cause may end after those who noticed it."""
    late = "import time; time.sleep(1); " + FAILS
    found, *_ = run(tmp_path, "import sys; sys.exit(129)", late)
    assert found["statuses"] == [129, 3]
    assert found["first"] == 1


def test_a_silent_process_counts_as_hung(tmp_path):
    silent = "import threading; threading.Event().wait()"
    found, *_ = run(tmp_path, BEATING + FOR_EVER, silent, silence_timeout=4)
    assert (found["hung"], found["first"]) == (1, 1)
    assert found["why"].startswith("no sign of life for 4 s")


def test_the_kernel_is_asked_about_a_silent_process(tmp_path):
    stopped = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    found, *_ = run(tmp_path, BEATING + FOR_EVER, stopped, silence_timeout=4)
    assert found["why"].endswith("it is stopped, as by SIGSTOP")
    assert found["statuses"][1] == -signal.SIGKILL


def test_a_beat_that_tells_of_no_progress_counts_as_hung(tmp_path):
    stands = BEATING.replace('7")', '7", 9.0, must_end=True)')
    found, *_ = run(
        tmp_path, BEATING + FOR_EVER, stands + FOR_EVER, hang_timeout=5
    )
    assert found["hung"] == 1
    assert found["why"] == "no progress for 9 s (--collective_timeout)"


def test_a_long_phase_that_may_last_is_no_hang(tmp_path):
    compiles = BEATING.replace('7")', '7", 9.0)')
    compiles += "\nwith heart.beating():\n    time.sleep(2)\n"
    found, *_ = run(tmp_path, compiles, hang_timeout=5)
    assert (found["hung"], found["statuses"]) == (None, [0])


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
)
def test_signals_are_passed_on(tmp_path, number):
    hears = textwrap.dedent(f"""
        import signal, sys, threading
        signal.signal({int(number)}, lambda *_: sys.exit(7))
        print('ready')
        threading.Event().wait()
        """)
    process = start(tmp_path, hears)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    found, *_ = finish(process)
    assert found["statuses"] == [7]
    assert found["asked"] == number


def test_a_worker_that_missed_sigterm_hears_it_again(tmp_path):
    late = textwrap.dedent("""
        import signal, sys, threading
        def miss(*_):
            print('missed')
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        signal.signal(signal.SIGTERM, miss)
        print('ready')
        threading.Event().wait()
        """)
    process = start(tmp_path, late)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    found, lines, _ = finish(process)
    assert lines == ["missed"]
    assert found["statuses"] == [7]


PARENT = """
import subprocess, sys, threading
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid)
"""


def test_the_guardian_outlives_what_ends_a_whole_job(tmp_path):
    """As `pkill -f launch.local` or `systemctl stop` do it."""
    hears = "import signal, sys, threading\n"
    hears += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    process = start(tmp_path, PARENT + hears + "threading.Event().wait()")
    grandchild = int(process.stdout.readline())
    guardian, _ = children_of(process.pid)
    os.kill(guardian, signal.SIGTERM)
    process.kill()
    process.communicate(timeout=SECONDS)
    assert_gone(grandchild)


def test_a_launcher_that_was_stopped_blames_nobody(tmp_path):
    lives = BEATING + "print('ready')\nwith heart.beating():\n"
    process = start(tmp_path, lives + "    time.sleep(9)", silence_timeout=4)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)  # what is to be survived, not what is waited for
    process.send_signal(signal.SIGCONT)
    found, *_ = finish(process)
    assert (found["hung"], found["statuses"]) == (None, [0])


def test_output_that_nobody_reads_ends_nothing(tmp_path):
    script = "import time\nprint('first')\ntime.sleep(1)\n"
    script += "for i in range(9): print(i)\nopen('done', 'w').close()"
    process = start(tmp_path, script)
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdout = None
    process.communicate(timeout=SECONDS)
    assert (tmp_path / "done").exists()


def test_a_second_ctrl_c_ends_those_that_are_deaf(tmp_path):
    deaf = "import signal, threading\n"
    deaf += "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    process = start(tmp_path, deaf + "print('ready')\nthreading.Event().wait()")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)  # two of them, not one
    process.send_signal(signal.SIGINT)
    found, *_ = finish(process)
    assert found["statuses"][0] < 0
    assert found["asked"] == signal.SIGINT


def test_one_that_dies_of_a_signal_at_its_start_ends_the_others(tmp_path):
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    found, *_ = run(tmp_path, BEATING + FOR_EVER, dies)
    assert found["statuses"] == [-signal.SIGTERM] * 2


def test_what_a_worker_leaves_behind_is_ended_with_it(tmp_path):
    found, lines, _ = run(tmp_path, PARENT)
    assert found["statuses"] == [0]
    assert_gone(int(lines[0]))


def test_nothing_is_left_of_a_launcher_that_is_killed(tmp_path):
    process = start(tmp_path, PARENT + "threading.Event().wait()")
    grandchild = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=SECONDS)  # until nobody holds its pipes
    assert_gone(grandchild)


def test_on_a_terminal_worker_0_has_one_too(tmp_path):
    """Its progress line is rewritten; in the log each line is its last."""

    script = "import sys; print(sys.stdout.isatty()); "
    script += "print('1 of 2\\r2 of 2')"
    ours, theirs = pty.openpty()

    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps([script]), "{}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=theirs,
    )
    os.close(theirs)
    assert process.wait(timeout=SECONDS) == 0
    seen = os.read(ours, 2**16).decode()
    assert "True\r" in seen
    assert "1 of 2\r2 of 2" in seen
    log = (tmp_path / "worker-0.log").read_text().splitlines()
    assert log[1:] == ["True", "2 of 2"]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
