"""A service under load: many generations in several threads, corrections that come and go, runs that die.

``python -m soaking --generations 200 --threads 4 --interrupted 200``; prints what it did, and exits with 1
if anything was left behind or any image was another one than alone.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import pickle
import random
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from bound_rigs import hooks_of, rigged
from made_corrections import MADE
from torch import Tensor

import evenkeel
from evenkeel.corrections import Composite
from evenkeel.hosts.actuators.binding import Binding
from evenkeel.testing import drawn_evidence
from evenkeel.testing.pipeline import sampled, tiny_law, tiny_pipeline

NAMES = ("plain", "q-drift", "readout", "adapters", "tac", "stepbaq", "qncd", "readout+drift")
_ALLOWED = ("denoiser", "scheduler", "guidance")


class Stop(BaseException):
    """Ends a run from inside."""


class Service:
    """Threads with a pipeline and a scheduler each, on one set of weights."""

    def __init__(self, threads: int, seed: int = 0, names: tuple[str, ...] = NAMES) -> None:
        self.threads, self.seed, self.names = threads, seed, names
        base = tiny_pipeline()
        self.denoiser = base.transformer
        evidence = drawn_evidence(tiny_law(), 0.3)
        self.corrections = {n: MADE[n](evidence) for n in names if n != "plain"}
        self.state = {n: t.clone() for n, t in self.denoiser.state_dict().items()}
        self._others = weakref.WeakSet(_bindings())  # of whoever shares this process
        self._base, self._local = base, threading.local()
        self.alone = {name: self.image(base, name) for name in names}
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, generations: int) -> None:
        """So many, dealt out over the threads."""
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(self._one, range(generations)))

    def image(self, pipe: Any, name: str) -> Tensor:
        """One generation with a correction that is applied for it and removed after it."""
        if name == "plain":
            return sampled(pipe)
        with evenkeel.applied(pipe, self.corrections[name], allow=_ALLOWED):
            return sampled(pipe)

    def left_behind(self) -> list[str]:
        """What is not as it was before."""
        gc.collect()
        now = self.denoiser.state_dict()
        found = [n for n, t in self.state.items() if not torch.equal(now[n], t)]
        parts = list(self.denoiser.modules())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in parts)
        bound = sum(b not in self._others for b in _bindings())
        found += [f"{hooks} hooks"] if hooks else []
        found += [f"{bound} corrections"] if bound else []
        return found

    def _one(self, index: int) -> None:
        chance = random.Random(f"{self.seed} {index}")
        if not hasattr(self._local, "pipe"):
            self._local.pipe = self.twin()
        name = chance.choice(self.names)
        how = chance.choice(("whole", "whole", "stopped", "copied"))
        pipe = self._local.pipe
        if how == "copied" and name != "plain":
            found = self._by_a_copy(pipe, name, chance)
        else:
            if how == "stopped":
                self._stopped(pipe, name, chance)
            found = self.image(pipe, name)
        self.done[f"{how} {name}"] += 1
        if not torch.equal(found, self.alone[name]):
            self.wrong.append(f"generation {index}: {how} {name}")

    def twin(self) -> Any:
        """Another pipeline of the same networks."""
        parts = dict(self._base.components)
        parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
        pipe = type(self._base)(**parts, id2label={3: "three", 7: "seven"})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _stopped(self, pipe: Any, name: str, chance: random.Random) -> None:
        """A run that dies somewhere in the denoiser, in this thread."""
        parts = [m for m in self.denoiser.modules() if not list(m.children())]
        here, left = threading.get_ident(), [chance.randrange(1, 4)]

        def stop(*_: Any) -> None:
            if threading.get_ident() == here:
                left[0] -= 1
                if left[0] <= 0:
                    raise Stop

        handle = chance.choice(parts).register_forward_hook(stop)
        try:
            self.image(pipe, name)
        except Stop:
            pass
        finally:
            handle.remove()

    def _by_a_copy(self, pipe: Any, name: str, chance: random.Random) -> Tensor:
        """By a pipeline with a copy of the corrected scheduler."""
        duplicate = chance.choice((copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))))
        with evenkeel.applied(pipe, self.corrections[name], allow=_ALLOWED):
            twin = copy.copy(pipe)
            twin.scheduler = duplicate(pipe.scheduler)
            found = sampled(twin)
            evenkeel.remove(twin)
        return found


def _bindings() -> list[Binding]:
    return [o for o in gc.get_objects() if type(o) is Binding]


class Interrupted:
    """Runs that end in some way at a random moment; the next one is as if nothing had been.

    Args:
        rig: as of ``bound_rigs.rigged``.
        seed: of the ways, the moments and the corrections.

    """

    WAYS = ("error", "Ctrl-C", "_interrupt", "denoising_end", "inside", "dropped generator")

    def __init__(self, rig: Any, seed: int = 0) -> None:
        self.rig, self.chance = rig, random.Random(seed)
        self.other = rig.sharing(scheduler=rig.own_scheduler())
        self.plain = rig.sample(self.other)
        self.corrections = {"drift": rig.drift, "readout": rig.readout}
        self.corrections["both"] = Composite((rig.readout, rig.drift))
        self.whole = {}
        for name, correction in self.corrections.items():
            with evenkeel.applied(rig.pipe, correction):
                self.whole[name] = rig.sample()
        self.state = {n: t.clone() for n, t in rig.quantized.state_dict().items()}
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, runs: int) -> None:
        """So many, with one correction after the other."""
        for index in range(runs):
            name, way = self.chance.choice([*self.corrections]), self.WAYS[index % len(self.WAYS)]
            with evenkeel.applied(self.rig.pipe, self.corrections[name], allow=_ALLOWED):
                self._end(way)
                now = self.rig.quantized.state_dict()
                same = all(torch.equal(now[n], t) for n, t in self.state.items())
                same = same and torch.equal(self.rig.sample(self.other), self.plain)
                if not same or not torch.equal(self.rig.sample(), self.whole[name]):
                    self.wrong.append(f"run {index}: {way}, {name}")
            self.done[f"{way}, {name}"] += 1

    def _end(self, way: str) -> None:
        """One run that does not come to its end."""
        moment = self.chance.randrange(self.rig.steps - 1)

        def stop(pipe: Any, i: int, t: Any, kw: Any) -> Any:
            if i == moment and way == "_interrupt":
                pipe._interrupt = True
            elif i == moment:
                raise Stop if way == "error" else KeyboardInterrupt
            return kw

        with suppress(Stop, KeyboardInterrupt, GeneratorExit):
            if way == "denoising_end":
                self.rig.sample(denoising_end=self.chance.uniform(0.2, 0.9))
            elif way == "inside":
                self._inside(self.chance.choice((Stop, KeyboardInterrupt, GeneratorExit)))
            elif way == "dropped generator":
                steps = self._steps()
                for _ in range(moment + 1):
                    next(steps)
                del steps
                gc.collect()
            else:
                self.rig.sample(callback_on_step_end=stop)

    def _inside(self, error: type[BaseException]) -> None:
        layers = [m for m in self.rig.quantized.modules() if not list(m.children())]
        left = [self.chance.randrange(6)]

        def stop(*_: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise error

        handle = self.chance.choice(layers).register_forward_hook(stop)
        try:
            self.rig.sample()
        finally:
            handle.remove()

    @torch.no_grad()
    def _steps(self) -> Iterator[Tensor]:
        """A loop of somebody's own, as a generator."""
        pipe, scheduler = self.rig.pipe, self.rig.pipe.scheduler
        embeds, _, pooled, _ = pipe.encode_prompt("a cat", do_classifier_free_guidance=False)
        width = pipe.text_encoder_2.config.projection_dim
        sizes = pipe._get_add_time_ids((32, 32), (0, 0), (32, 32), embeds.dtype, width)
        added = {"text_embeds": pooled, "time_ids": sizes}
        scheduler.set_timesteps(self.rig.steps)
        x = torch.randn(1, 4, 16, 16) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t)
            noise = pipe.unet(
                given, t, encoder_hidden_states=embeds, added_cond_kwargs=added
            ).sample
            x = scheduler.step(noise, t, x).prev_sample
            yield x


def resources() -> dict[str, int]:
    """Threads, open files, and MiB of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if os.path.exists("/proc") else 0
    files = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc") else 0
    size = pages * os.sysconf("SC_PAGE_SIZE") // 2**20
    return {"threads": threading.active_count(), "files": files, "memory": size}


def main(arguments: list[str] | None = None) -> int:
    """The script."""
    parser = argparse.ArgumentParser(prog="soak", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--interrupted", type=int, default=200, help="runs that are cut short")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.monotonic()
    service = Service(options.threads, options.seed)
    service.run(max(options.generations // 4, 1))  # what is filled once is full then
    service.left_behind()
    before = resources()
    service.run(options.generations - max(options.generations // 4, 1))
    left = service.left_behind()
    after = resources()
    _print("generations", service.done, start)
    print(f"before {before}, after {after}")
    start = time.monotonic()
    cut = Interrupted(rigged(), options.seed)
    cut.run(options.interrupted)
    _print("interrupted runs", cut.done, start)
    hooks = hooks_of(cut.rig.quantized)
    left += [f"{hooks} hooks"] if hooks else []
    for what in (*service.wrong, *cut.wrong, *(f"left behind: {what}" for what in left)):
        print(what)
    grown = after["memory"] - before["memory"]
    leaks = after["threads"] > before["threads"] or after["files"] > before["files"] or grown > 64
    print("leaks" if leaks else "nothing leaks")
    return int(bool(service.wrong or cut.wrong or left or leaks))


def _print(what: str, done: Counter[str], start: float) -> None:
    for kind, count in sorted(done.items()):
        print(f"{count:5d}  {kind}")
    print(f"{sum(done.values())} {what} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
