"""Workers as processes on loopback."""

SECONDS = 180


def end(workers):
    """Exit status, output and errors of each."""
    try:
        results = [w.communicate(timeout=SECONDS) for w in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [
        (worker.returncode, *result)
        for worker, result in zip(workers, results, strict=True)
    ]
