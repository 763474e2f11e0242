"""Several processes, each with a share of the prompts, and all that they tell one another.

``torchrun`` and ``accelerate launch`` start them; every one makes the same calls. Results are exchanged
and sums are merged in the order of the processes, so that all hold the same bits. A process that fails
says why, and the others end with its reason; one that is killed ends them too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from evenkeel.errors import ProcessError
from evenkeel.storage.digests import json_text

T = TypeVar("T")
Message = tuple[Any, dict[str, Tensor]]

_PATIENCE = 7200.0  # seconds that one may wait for the others at one place
_FOREVER = timedelta(days=30)  # torch's own limit would end a long batch; ours says what to do
_HEADER = "header"
_WHY, _COUNT = "why", "failures"
_KEPT = "What was finished is kept where a folder was given; the same command continues there."


class Processes:
    """Who computes, and the others; alone, nothing is exchanged and everything is its own.

    Attributes:
        rank, count: which one this is, of how many.

    >>> alone = Processes()
    >>> alone.main, alone.share(["a", "b", "c"])
    (True, ['a', 'b', 'c'])

    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None, store: Any = None) -> None:
        self.rank, self.count = rank, count
        self._group, self._store = group, store

    @property
    def main(self) -> bool:
        """Whether this one writes and shows."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Our part: neighbours, as many as the others have or one more or less."""
        first, end = (len(items) * r // self.count for r in (self.rank, self.rank + 1))
        return list(items[first:end])

    # ---- what is exchanged

    def barrier(self) -> None:
        """Wait for all.

        Raises:
            ProcessError: another one failed, or is gone.

        """
        self.summed(torch.zeros(1))

    def gathered(
        self, header: Any, tensors: Mapping[str, Tensor] | None = None, *, main_only: bool = False
    ) -> list[Message]:
        """What every process gives, in their order, to the bit; tensors arrive on the CPU.

        Args:
            header: what JSON can hold.
            tensors: by names of any shapes, which may differ between processes.
            main_only: the others get an empty list and hold nothing that is not theirs.

        Raises:
            ProcessError: another one failed, or is gone.

        """
        mine = {n: t.detach().cpu().contiguous() for n, t in (tensors or {}).items()}
        if self.count == 1:
            return [(json.loads(json_text(header)), mine)]
        text = torch.frombuffer(bytearray(json_text(header).encode()), dtype=torch.uint8)
        own = torch.frombuffer(bytearray(save({**mine, _HEADER: text})), dtype=torch.uint8)
        sizes = [int(s) for s in self._all(torch.tensor([len(own)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = own
        parts = self._to_main(padded) if main_only else self._all(padded)
        return [_message(part[:size]) for part, size in zip(parts, sizes, strict=False)]

    def summed(self, tensor: Tensor) -> Tensor:
        """Over all processes, on the tensor's device; all get the same bits.

        Raises:
            ProcessError: another one failed, or is gone.

        """
        if self.count == 1:
            return tensor
        found = tensor.detach().cpu().clone()
        import torch.distributed as dist

        self._wait(lambda: dist.all_reduce(found, group=self._group, async_op=True))
        return found.to(tensor.device)

    def joined(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in their order, on the tensor's device; all hold them.

        Raises:
            ProcessError: another one failed, or is gone.

        """
        if self.count == 1:
            return rows
        return torch.cat([found["rows"] for _, found in self.gathered(None, {"rows": rows})]).to(
            rows
        )

    def agree(self, what: str, found: Mapping[str, Any]) -> None:
        """Refuse processes that were asked for different things.

        Raises:
            ProcessError: they were; names what differs.

        """
        first = self.gathered(dict(found))
        for rank, (theirs, _) in enumerate(first):
            differing = [k for k in theirs if json_text(theirs[k]) != json_text(first[0][0].get(k))]
            if differing:
                raise ProcessError(
                    f"process {rank} was asked for another {what} than process 0: they differ in "
                    f"{', '.join(differing)}. All processes must make the same call."
                )

    # ---- what goes wrong

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Inside, an error of this process is told to the others, which end with it."""
        try:
            yield
        except BaseException as error:
            self.tell(error)
            raise

    def tell(self, error: BaseException) -> bool:
        """Say why this process fails; whether it is the first one to say so."""
        if self.count == 1:
            return True
        if hasattr(error, "told"):
            return bool(error.told)
        try:
            first = self._store.add(_COUNT, 1) == 1
            if first:
                text = f"{type(error).__name__}: {error}"
                self._store.set(_WHY, f"process {self.rank} of {self.count} failed: {text}")
        except RuntimeError:  # the process that keeps the store is gone
            first = True
        error.told = first  # type: ignore[attr-defined]
        return bool(first)

    def check(self) -> None:
        """End where another process has failed; cheap enough for every batch.

        Raises:
            ProcessError: with its reason.

        """
        if self.count == 1:
            return
        try:
            why = self._store.get(_WHY).decode() if self._store.check([_WHY]) else None
        except RuntimeError as error:
            raise _lost() from error
        if why is not None:
            raise ProcessError(f"{why}. {_KEPT}")

    # ---- how

    def _all(self, own: Tensor) -> list[Tensor]:
        import torch.distributed as dist

        found = [torch.empty_like(own) for _ in range(self.count)]
        self._wait(lambda: dist.all_gather(found, own, group=self._group, async_op=True))
        return found

    def _to_main(self, own: Tensor) -> list[Tensor]:
        import torch.distributed as dist

        found = [torch.empty_like(own) for _ in range(self.count)] if self.main else None
        self._wait(lambda: dist.gather(own, found, group=self._group, async_op=True))
        return found or []

    def _wait(self, begin: Callable[[], Any]) -> None:
        """Carry out what all take part in, listening meanwhile for one that failed."""
        began = checked = time.monotonic()
        pause = 1e-4
        try:
            work = begin()
            while not work.is_completed():
                time.sleep(pause)
                pause = min(1.5 * pause, 0.05)
                now = time.monotonic()
                if now - checked > 0.5:
                    self.check()
                    checked = now
                if now - began > _PATIENCE:
                    raise ProcessError(
                        f"process {self.rank} waited {_PATIENCE / 3600:.0f} hours for the others. "
                        f"All processes must make the same call, with shares that take about as "
                        f"long. {_KEPT}"
                    )
            work.wait()
        except ProcessError:
            raise
        except RuntimeError as error:
            self.check()  # it may have said why before it went
            raise _lost() from error


ALONE = Processes()


def processes() -> Processes:
    """Those that were launched together, as seen from here; joins them at the first call.

    Under ``torchrun`` and ``accelerate launch`` all of them must make the same calls.
    """
    global _joined
    if _joined is None:
        _joined = _join() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ALONE
    return _joined


_joined: Processes | None = None


def _join() -> Processes:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_FOREVER)
    # A group of our own: whatever backend the user's code chose, ours takes tensors of the CPU. What
    # is exchanged is small beside a step of a large model: NCCL would gain nothing.
    group = dist.new_group(backend="gloo", timeout=_FOREVER)
    store = PrefixStore("evenkeel", _get_default_store())
    return Processes(dist.get_rank(), dist.get_world_size(), group, store)


def _message(data: Tensor) -> Message:
    tensors = load(data.numpy().tobytes())
    return json.loads(tensors.pop(_HEADER).numpy().tobytes()), tensors


def _lost() -> ProcessError:
    return ProcessError(f"another process is gone: it was killed, or ran out of memory. {_KEPT}")
