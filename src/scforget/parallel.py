"""Independent work on every core of this machine, or on a cluster: processes that work on a job each.

Several models at a time are faster here than several threads within one. A worker process that is killed is replaced
and its job done again; jobs that keep checkpoints take them up. Results are the serial run's, bit for bit.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from functools import lru_cache, partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from scforget import engine
from scforget.engine import Numerics
from scforget.errors import ConfigError, WorkerError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
Job = Callable[[Any], Any]
#: What a way of working yields: ``None`` when others begin to work, then numbers of items with pickled outcomes.
Outcomes = Generator[tuple[int, bytes] | None, None, None]

_MOST_DEATHS = 3
_FEWER, _LARGER = "set SCFORGET_WORKERS=1", "give each of the cluster's workers more memory"
_PATIENCE, _WORKERS_PATIENCE = 10.0, 30.0  # seconds for a scheduler to answer, and for it to have a worker
_alone = threading.RLock()


def workers(jobs: int) -> int:
    """How many processes to use: as many as the cores have room for, or ``SCFORGET_WORKERS``, at most one a job."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("SCFORGET_WORKERS", str(max(1, cores // engine.current().threads)))
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError("environment", "SCFORGET_WORKERS", f"found {asked!r}; wanted a whole number from 1")
    return max(1, min(int(asked), jobs))


def _apply(function: Job, numerics: Numerics, item: Any) -> Any:
    """Do one job with the arithmetic of the process that asked for it."""
    engine.use(numerics)
    with threadpool_limits(numerics.threads):  # OpenBLAS too: the last digits of its products depend on its threads
        return function(item)


def _portable(error: BaseException) -> BaseException:
    """An error with its traceback as a note; in words, if it is of a kind that does not cross between processes."""
    trace = "In a worker process:\n" + traceback.format_exc()
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(trace)
    copy.add_note(trace)
    return copy


def _outcome(function: Job, numerics: Numerics, item: Any) -> bytes:
    """Do one job in another process; pickled here, as Dask waits for ever for what it cannot unpickle itself.

    Returns
    -------
    bytes
        Of whether it was done, and its result or error.
    """
    try:
        return pickle.dumps((True, _apply(function, numerics, item)), pickle.HIGHEST_PROTOCOL)
    except BaseException as error:
        return pickle.dumps((False, _portable(error)), pickle.HIGHEST_PROTOCOL)


def _die_with(parent: int) -> None:
    """End this process when its parent is gone: an orphan would go on writing checkpoints beside the resumed run."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Deaths:
    """Workers that died since a job was last finished; ``advice`` is for a person, when there are too many."""

    def __init__(self, advice: str) -> None:
        self._advice, self._count = advice, 0

    def forget(self) -> None:
        """A job was finished."""
        self._count = 0

    def add(self) -> None:
        """One more; raises :class:`WorkerError` when it is time to give up."""
        self._count += 1
        if self._count == _MOST_DEATHS:
            raise WorkerError(self._advice)
        why = "a worker process was killed, mostly for lack of memory"
        print(f"{why}; a new one does its job again", file=sys.stderr)


def _serve(call: Callable[[Any], bytes], jobs: Sequence[Any], parent: int, link: Connection) -> None:
    """Do the jobs whose numbers come over the link, until killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    _die_with(parent)
    with suppress(EOFError, OSError):
        while True:
            outcome = call(jobs[link.recv()])
            sys.stdout.flush()
            link.send_bytes(outcome)


class _Crew:
    """Forked processes that hold the jobs in memory, and a thread for each that hands out their numbers.

    The standard library's pool breaks as a whole when one of its processes dies; here that costs one job.
    """

    def __init__(self, call: Callable[[Any], bytes], jobs: Sequence[Any], size: int) -> None:
        self.events: SimpleQueue[tuple[int, bytes] | None] = SimpleQueue()
        self._waiting = deque(range(len(jobs)))
        self._serve = partial(_serve, call, jobs, os.getpid())
        self._processes: list[multiprocessing.process.BaseProcess] = []
        links = [self._fork() for _ in range(size)]  # before any thread is started
        for link in links:
            self._attend(link)

    def _fork(self) -> Connection:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=self._serve, args=(theirs,), daemon=True)  # daemons are not waited for
        process.start()
        theirs.close()  # or its end would not be noticed
        self._processes.append(process)
        return ours

    def _attend(self, link: Connection) -> None:
        threading.Thread(target=self._hand_out, args=(link,), daemon=True).start()

    def _hand_out(self, link: Connection) -> None:
        with link, suppress(IndexError):
            while True:
                number = self._waiting.popleft()
                try:
                    link.send(number)
                    self.events.put((number, link.recv_bytes()))
                except (EOFError, OSError):
                    self._waiting.append(number)  # at the end: a job that kills each of its workers delays no other
                    self.events.put(None)
                    return

    def hire(self) -> None:
        """Replace a dead worker."""
        self._attend(self._fork())

    def end(self) -> None:
        """Leave no process behind, whatever they are doing."""
        self._waiting.clear()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _forked(function: Job, numerics: Numerics, jobs: Sequence[Any], size: int) -> Outcomes:
    """On this machine, where a fork can compute: it is there at once, with all that this process has read."""
    crew, deaths = _Crew(partial(_outcome, function, numerics), jobs, size), _Deaths(_FEWER)
    try:
        yield None
        left = len(jobs)
        while left:
            if (event := crew.events.get()) is None:
                deaths.add()
                crew.hire()
            else:
                deaths.forget()
                left -= 1
                yield event
    finally:
        crew.end()


@lru_cache(maxsize=1)
def _read(path: Path) -> Job:
    import joblib

    return joblib.load(path, mmap_mode="c")


def _stored(path: Path, numerics: Numerics, number: int, item: Any) -> tuple[int, bytes]:
    return number, _outcome(_read(path), numerics, item)


def _spawned(function: Job, numerics: Numerics, jobs: Sequence[Any], size: int) -> Outcomes:
    """On this machine, in new processes that share the function's large arrays as memory-mapped files."""
    import joblib

    left, deaths = dict(enumerate(jobs)), _Deaths(_FEWER)
    with tempfile.TemporaryDirectory(prefix="scforget-") as folder:
        path = Path(folder) / "function.joblib"
        joblib.dump(function, path)  # now: `meanwhile` may give it what does not go into a file
        options: dict[str, Any] = {"inner_max_num_threads": numerics.threads, "initializer": _die_with,
                                   "initargs": (os.getpid(),)}  # fmt: skip
        while left:
            tasks = [joblib.delayed(_stored)(path, numerics, number, job) for number, job in left.items()]
            with joblib.parallel_config("loky", n_jobs=size, **options):
                pool = joblib.Parallel(batch_size=1, pre_dispatch="all", return_as="generator_unordered")
                outcomes = pool(tasks)
            try:
                yield None
                for number, outcome in outcomes:
                    deaths.forget()
                    del left[number]
                    yield number, outcome
            except BrokenProcessPool:
                deaths.add()
            finally:
                with warnings.catch_warnings(action="ignore"):  # of jobs under way, which is why it is closed
                    outcomes.close()


def _remote(function: Job, numerics: Numerics, item: Any) -> bytes:
    with _alone:  # torch's switches and random stream belong to a whole process, which may have several threads
        return _outcome(function, numerics, item)


def _wrong_scheduler(why: str) -> ConfigError:
    return ConfigError("params.yaml", "compute.scheduler", why)


def _connect(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise _wrong_scheduler('needs another package: pip install "scforget[cluster]"') from error
    try:
        return Client(address, timeout=_PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        why = f"no Dask scheduler answers at {address}; start one (dask scheduler), or set null to compute here"
        raise _wrong_scheduler(why) from error


def _about(folder: str) -> dict[str, object]:
    """What must be the same wherever jobs are done."""
    return {"scforget": version("scforget"), "torch": version("torch"), folder: Path(folder).is_dir()}


def _check_workers(client: Any, address: str) -> None:
    """Wait for a worker, and refuse those that are not as they must be."""
    folder = str(Path.cwd())
    try:
        client.submit(os.getpid, pure=False).result(timeout=_WORKERS_PATIENCE)
        found = client.run(_about, folder)
    except TimeoutError as error:
        start = f"dask worker {address} --nthreads 1"
        raise _wrong_scheduler(f"the scheduler at {address} has no worker; start some ({start})") from error
    except Exception as error:  # of many kinds: they lack a package
        why = f"workers of {address} fail ({error}); they need this environment and this folder"
        raise _wrong_scheduler(why) from error
    wanted = _about(folder)
    for worker, its in found.items():
        if its != wanted:
            raise _wrong_scheduler(f"worker {worker} has {its}; wanted {wanted}")


def _on_cluster(function: Job, numerics: Numerics, jobs: Sequence[Any], address: str) -> Outcomes:
    """On other machines that see the same files; Dask replaces a worker and does its job again.

    Not by joblib's ``dask`` backend: that of joblib 1.6.0 waits for ever for a job that Dask has given up.
    """
    left, deaths = dict(enumerate(jobs)), _Deaths(_LARGER)
    with _connect(address) as client:
        from distributed import CancelledError, KilledWorker, as_completed

        _check_workers(client, address)
        while left:
            try:
                [held] = client.scatter([function], broadcast=True, timeout=_WORKERS_PATIENCE)
                numbers = {client.submit(_remote, held, numerics, job, pure=False): n for n, job in left.items()}
                yield None
                for future in as_completed(numbers, loop=client.loop):
                    outcome = future.result()
                    deaths.forget()
                    del left[numbers[future]]
                    yield numbers[future], outcome
            except (KilledWorker, TimeoutError) as error:  # of the latter kind: nobody is left
                raise WorkerError(_LARGER) from error
            except CancelledError as error:
                if client.status != "running":
                    why = f"the scheduler at {address} is gone; run again: finished models are kept"
                    raise _wrong_scheduler(why) from error
                deaths.add()  # of all workers at once, and the function went with them


def _forks(numerics: Numerics) -> bool:
    """Whether forked processes can compute: OpenMP's threads and a GPU's state do not survive a fork, and it hangs."""
    return sys.platform == "linux" and numerics.threads == 1 and numerics.device == "cpu"


def each(
    function: Callable[[ItemT], ResultT], items: Iterable[ItemT], done: Callable[[], None],
    meanwhile: Callable[[], None] | None = None,
) -> list[ResultT]:  # fmt: skip
    """Apply a function to every item, in processes if there are several cores, or on a cluster.

    Parameters
    ----------
    function
        Picklable where processes are not forked (several threads each, a GPU, macOS, a cluster).
    items
        What to apply it to; picklable, as results are.
    done
        Called in this process whenever an item is finished.
    meanwhile
        Called once in this process while others work: what will be needed afterwards (slow imports).

    Returns
    -------
    list
        Results in the order of the items. The first exception ends the rest and is raised here.

    Raises
    ------
    WorkerError
        If three workers in a row are killed and no job is finished in between.
    ConfigError
        If the cluster is not there.
    """
    jobs, numerics = list(items), engine.current()
    size, address = workers(len(jobs)), engine.scheduler()
    results: dict[int, ResultT] = {}
    if not jobs:
        return []
    if address is None and size == 1:
        for number, job in enumerate(jobs):
            results[number] = _apply(function, numerics, job)
            done()
        return list(results.values())
    if address is not None:
        outcomes = _on_cluster(function, numerics, jobs, address)
    else:
        start = _forked if _forks(numerics) else _spawned
        outcomes = start(function, numerics, jobs, size)
    with closing(outcomes):
        for outcome in outcomes:
            if outcome is None:
                if meanwhile is not None:
                    meanwhile()
                meanwhile = None
                continue
            number, content = outcome
            succeeded, result = pickle.loads(content)
            if not succeeded:
                raise result
            results[number] = result
            done()
    return [results[number] for number in range(len(jobs))]
