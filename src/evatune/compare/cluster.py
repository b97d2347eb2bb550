"""The engine on a Ray cluster: runs are Ray's tasks, and Ray decides where they run.

All machines see the folder of the results, the data and the models under the same paths, as on a shared file system.
"""

from __future__ import annotations

from typing import Any

from evatune.compare.engine import Job, Outcome
from evatune.compare.worker import attempt
from evatune.errors import EvaError
from evatune.settings import EngineSettings


class RayEngine:
    """Tasks of a Ray cluster; see `evatune.compare.engine.Engine`.

    Args:
        settings: how runs are done; the processes of a run are all on one machine.

    Raises:
        EvaError: Ray is not installed, or the cluster has no room for a single run.
    """

    def __init__(self, settings: EngineSettings) -> None:
        try:
            import ray
        except ImportError:
            raise EvaError("--engine ray needs the Python package ray; run: pip install 'evatune[ray]'.") from None
        self._ray: Any = ray
        self._is_ours = not ray.is_initialized()
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        resources = ray.cluster_resources()
        threads, gpus = settings.threads or 1, settings.gpus
        processors = threads * settings.processes
        room = int(resources.get("CPU", 0) // processors)
        if gpus:
            room = min(room, int(resources.get("GPU", 0) // gpus))
        if room < 1:
            has = f"{resources.get('CPU', 0):g} processors and {resources.get('GPU', 0):g} GPUs"
            raise EvaError(
                f"the Ray cluster has {has}, and a run needs {processors} and {gpus}; give fewer --threads, or start "
                "more nodes."
            )
        self.slots, self.threads, self._processes = min(settings.workers or room, room), threads, settings.processes
        # A task that dies is started again by the sweep, which counts how often.
        self._task: Any = ray.remote(num_cpus=processors, num_gpus=gpus, max_retries=0)(attempt)
        self._running: dict[Any, Job] = {}

    def start(self, job: Job) -> None:
        """Hand a job to the cluster."""
        self._running[self._task.remote(job.recipe, processes=self._processes)] = job

    def finished(self) -> list[tuple[Job, Outcome]]:
        """Wait until a task is done or its process dead, and return what became of its job."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        found = []
        for reference in ready:
            job = self._running.pop(reference)
            try:
                state, reason = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                state, reason = "died", f"Ray lost its process ({type(error).__name__})"
            found.append((job, Outcome(state=state, reason=reason)))
        return found

    def close(self) -> None:
        """Cancel what is running; a cluster that this engine started ends, another one stays."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        if self._is_ours:
            self._ray.shutdown()
