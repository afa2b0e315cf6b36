"""Two processes that stay up for many tests and are killed when one of them fails or hangs."""

import datetime
import multiprocessing
import tempfile
import time
import traceback

TIMEOUT = 60  # seconds for one task, which takes one; its first import may take many on a busy machine


class Processes:
    """``call(function, **arguments)`` runs ``function(rank, **arguments)`` in every process and returns their results.

    They form the default process group, over gloo. The functions must be importable by name. Starting a process takes
    seconds, most of them to import torch, so they are kept until a task fails: then they may be in the middle of a
    collective operation, and the next call starts others.
    """

    def __init__(self, number=2):
        self.number = number
        self._running = []

    def call(self, function, /, **arguments):
        if not self._running:
            self._start()
        for _, connection in self._running:
            connection.send((function, arguments))
        results, failures = self._receive(TIMEOUT)
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return results

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="processes-")
        for rank in range(self.number):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.number, f"file://{self._folder.name}/group"), daemon=True
            )
            process.start()
            theirs.close()
            self._running.append((process, ours))
        _, failures = self._receive(2 * TIMEOUT)
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))

    def _receive(self, seconds):
        """The results by rank, and the first failure: the other processes may wait in vain for the one that failed."""
        deadline = time.monotonic() + seconds
        results, failures = {}, []
        while len(results) < self.number and not failures:
            for rank, (process, connection) in enumerate(self._running):
                if rank in results:
                    continue
                try:
                    if connection.poll(0.01):
                        done, value = connection.recv()
                        results[rank] = value
                        if not done:
                            failures.append(f"rank {rank}:\n{value}")
                except (EOFError, ConnectionError):
                    process.join(1)
                    failures.append(f"rank {rank} died with exit code {process.exitcode}")
            if time.monotonic() > deadline:
                waiting = [rank for rank in range(self.number) if rank not in results]
                failures.append(f"no answer from rank {waiting} within {seconds} seconds")
        return [results[rank] for rank in sorted(results)], failures

    def close(self):
        for process, connection in self._running:
            connection.close()
            process.kill()
        for process, _ in self._running:
            process.join(10)
        if self._running:
            self._folder.cleanup()
        self._running = []


def _serve(connection, rank, number, address):
    """The life of one process: tasks in, results out, until the other end closes."""
    import torch

    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=address,
            rank=rank,
            world_size=number,
            timeout=datetime.timedelta(seconds=TIMEOUT),
        )
        answer = (True, None)
    except Exception:
        answer = (False, traceback.format_exc())
    while True:
        try:
            connection.send(answer)
            function, arguments = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            torch.manual_seed(0)
            answer = (True, function(rank, **arguments))
        except BaseException:  # what pytest.raises and pytest.fail raise is no Exception
            answer = (False, traceback.format_exc())
