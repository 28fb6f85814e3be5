"""Checkpoints that are written while the training goes on."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tlcr.training.checkpoint import Contents, write_checkpoint
from tlcr.training.distributed import any_process, background_group

logger = logging.getLogger(__name__)


class BackgroundSave:
    """At most one checkpoint that a thread writes from copies in host memory. It counts once it is complete.

    All processes begin and end one together. The threads have a process group of their own, so that a checkpoint is
    completed, or fails on all, whatever the training does meanwhile.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[Path] | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint was begun that ``completed`` and ``wait`` did not return yet."""
        return self._writing is not None

    def begin(self, folder: Path, what: Contents, *, keep: int) -> None:
        """Copies the contents and begins to write them; see ``write_checkpoint``. None may be pending.

        Args:
            folder: where checkpoints are.
            what: this process's contents, which may change once this returns.
            keep: checkpoints to keep.
        """
        if self.is_pending:
            raise RuntimeError("a checkpoint is being written: wait for it before the next one")
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        copied, group = what.in_host_memory(), background_group()
        self._writing = self._thread.submit(write_checkpoint, folder, copied, keep=keep, group=group)

    def completed(self) -> Path | None:
        """Looks, without waiting, whether the checkpoint that was begun is complete. Every process calls it.

        Returns:
            Its folder, once it is complete on every process; None before, or where there is none.

        Raises:
            CheckpointError: it could not be written; on every process.
        """
        if self._writing is None or any_process(not self._writing.done()):
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """Waits for the checkpoint that was begun. It does not communicate, so a process may call it alone.

        Returns:
            Its folder; None where there is none.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._writing is None:
            return None
        writing = self._writing
        writing.exception()  # waits; where it is interrupted, the checkpoint stays pending
        self._writing = None
        return writing.result()

    def wait_after(self, error: BaseException) -> None:
        """Waits where the training has failed: its error is the one to raise, and that of the checkpoint is logged.

        Args:
            error: why the training ends.
        """
        if self._writing is None:
            return
        failure, self._writing = self._writing.exception(), None
        if failure is not None:
            logger.error("%s; the training had ended by itself (%s)", failure, type(error).__name__)
