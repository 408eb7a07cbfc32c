"""What processes of ours share, whoever starts them: the machine's cores, and the end of their parent."""

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess


def usable_cores() -> int:
    """Cores that this process may use; where the system does not tell (macOS), all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def one_thread_for_libraries() -> None:
    """Keep the thread pool of HF's `tokenizers` to one thread, in this process and those it starts.

    To be called before that library's first batch: its pool asks the C environment, once. (TOKENIZERS_PARALLELISM=false
    does it too, but batches of small texts then take half as long again.)
    """
    os.putenv("RAYON_NUM_THREADS", "1")


def end_with_parent() -> None:
    """From now on this process ends when the Python process that started it is gone, however that came."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child process has a parent to follow"
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)  # whatever the other threads are busy with
