"""No child process remains after its parent is killed."""

import subprocess
import sys
import time

import pytest

MAIN = """
import multiprocessing, sys, threading, time

def work(pids):
    import os
    from llava_fast.orphans import end_with_parent
    end_with_parent()
    end_with_parent()
    pids.put((os.getpid(), threading.active_count()))
    time.sleep(60)

def start(kind, pids):
    for _ in range(2):  # siblings hold the ends of each other's pipes
        multiprocessing.get_context(kind).Process(target=work, args=(pids,)).start()

if __name__ == "__main__":
    kind = sys.argv[1]
    pids = multiprocessing.get_context(kind).Queue()
    thread = threading.Thread(target=start, args=(kind, pids))
    thread.start()
    thread.join()  # a worker outlives the thread that started it
    print(*(number for _ in range(2) for number in pids.get()), flush=True)
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("kind", ["fork", "forkserver", "spawn"])
def test_workers_end_with_the_process_that_started_them(tmp_path, kind):
    (tmp_path / "main.py").write_text(MAIN)
    command = [sys.executable, str(tmp_path / "main.py"), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as main:
        try:
            first, threads, second, _ = map(int, main.stdout.readline().split())
            time.sleep(0.2)
            assert alive(first)
            assert alive(second)
            assert threads == 2
        finally:
            main.kill()
    killed = time.monotonic()
    while alive(first) or alive(second):
        assert time.monotonic() < killed + 10
        time.sleep(0.02)
