"""Runs in lockstep: each as ever, in one process, but the passes through their nets are computed as one."""

import logging
import random
import signal
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
from greenlet import getcurrent, greenlet
from hydra.core.hydra_config import HydraConfig
from pytorch_lightning.callbacks import RichProgressBar
from torch import Tensor, nn

from src.data.loader import BatchLoader
from src.processes import SIGNALS
from src.sweeps.stack import Stack, StackError, are_alike

MEMBER: ContextVar["Member | None"] = ContextVar("MEMBER", default=None)  # the run that is going on, of several


class Request(NamedTuple):
    """What a run waits for: its net's output for ``tensor``, or the gradients of ``tensor``, its loss."""

    kind: str  # forward, backward
    tensor: Tensor


class Member:
    """One of the runs; ``run`` goes on from request to request, on a stack of its own.

    Args:
        run: The run.
        ensemble: All of them.
        is_first: Whether it is the one that shows its progress.
    """

    def __init__(self, run: Callable[[], Any], ensemble: "Ensemble", is_first: bool) -> None:
        self.ensemble = ensemble
        self.is_first = is_first
        self.net: nn.Module | None = None
        self.stack: Stack | None = None
        self.request: Request | None = None
        self.answer: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.handlers: dict[int, Any] = {}  # of signals, its own
        self._run = run
        self._greenlet = greenlet(self._start)
        self._state: dict[str, Any] = _get_state(host=True)
        self._swaps_host = True  # whether Python and NumPy may draw random numbers within an epoch

    @property
    def is_learning(self) -> bool:
        """Whether the run computes gradients just now."""
        return bool(self._state["grad"])

    @property
    def is_done(self) -> bool:
        """Whether the run is over."""
        return bool(self._greenlet.dead)

    def join(self, module: pl.LightningModule, datamodule: pl.LightningDataModule, trainer: pl.Trainer) -> None:
        """Have the passes of a module's steps computed together with those of the other runs."""
        net = getattr(module, "net", None)
        if not isinstance(net, nn.Module):
            self.ensemble.refuse(f"{type(module).__name__} has no net")
        self.net = net
        if not self.is_first:  # the pace of one is that of all
            for handler in logging.root.handlers:
                if type(handler) is logging.StreamHandler:
                    handler.setLevel(logging.WARNING)
            for callback in list(trainer.callbacks):  # type: ignore[attr-defined]
                if isinstance(callback, RichProgressBar):  # one alone can have the terminal
                    trainer.callbacks.remove(callback)  # type: ignore[attr-defined]
        for name in ("training_step", "validation_step"):
            setattr(module, name, self._within(getattr(module, name)))
        module.backward = lambda loss, *args, **kwargs: self._ask(Request("backward", loss))  # type: ignore[method-assign]
        self.ensemble.share_data(datamodule)
        transfer = datamodule.on_after_batch_transfer

        def transfer_once(batch: Any, dataloader_idx: int) -> Any:
            self._swaps_host = not isinstance(trainer.train_dataloader, BatchLoader)  # which draws none
            if self._swaps_host or not isinstance(batch, list | tuple):
                return transfer(batch, dataloader_idx)
            return self.ensemble.transfer(batch, lambda: transfer(batch, dataloader_idx))

        datamodule.on_after_batch_transfer = transfer_once  # type: ignore[method-assign]

    def go_on(self) -> None:
        """Let the run go on until it asks for something, or ends."""
        _set_state(self._state)
        self.request = None
        self._greenlet.switch()
        self._state = _get_state(host=self._swaps_host) if not self.is_done else {}

    def end(self, status: int) -> None:
        """End the run where it waits, with an exit status."""
        while not self.is_done:
            _set_state(self._state)
            self._greenlet.throw(SystemExit(status))

    def _start(self) -> None:
        MEMBER.set(self)
        try:
            self.result = self._run()
        except BaseException as error:
            self.error = error

    def _within(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A step in which the net's output is asked for; outside, callbacks may use the net as it is."""
        net = self.net
        assert net is not None
        forward, layers = net.forward, list(net.modules())

        def together(images: Tensor) -> Any:
            if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
                return forward(images)  # a callback looks inside
            return self._ask(Request("forward", images))

        def run(*args: Any, **kwargs: Any) -> Any:
            net.forward = together
            try:
                return step(*args, **kwargs)
            finally:
                del net.forward

        return run

    def _ask(self, request: Request) -> Any:
        assert getcurrent() is self._greenlet
        self.request = request
        self._greenlet.parent.switch()
        answer, self.answer = self.answer, None
        return answer


class Ensemble:
    """Runs that go on together, a batch each at a time.

    Args:
        runs: Functions; each is to call ``join`` of the member that ``MEMBER`` then holds.
    """

    def __init__(self, runs: Sequence[Callable[[], Any]]) -> None:
        self.members = [Member(run, self, is_first=not number) for number, run in enumerate(runs)]
        self.signum = 0
        self._is_passed_on = False
        self._stacks: list[tuple[nn.Module, Stack]] = []
        self._datamodules: list[Any] = []
        self._refusal: StackError | None = None
        self._batches: list[tuple[Any, Any]] = []  # of this round: before and after the transfer

    def run(self) -> None:
        """Let all go on to their ends; then ``result`` or ``error`` of each tells of it.

        Raises:
            StackError: If the nets cannot be computed as one; all runs have then been ended.
            SystemExit: By a signal, when each run has ended in its own way.
        """
        handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
        handlers = {signum: handler for signum, handler in handlers.items() if callable(handler)}
        own_state = _get_state(host=True)
        try:
            while waiting := [member for member in self.members if not member.is_done]:
                self._pass_signal_on(waiting)
                for member in waiting:
                    self._go_on(member, list(handlers))
                self._batches.clear()
                _set_state(own_state)
                self._serve([member for member in waiting if member.request])
        except BaseException as error:
            status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
            for member in self.members:
                member.end(status)
            raise
        finally:
            _set_state(own_state)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        if self.signum:
            sys.exit(128 + self.signum)

    def transfer(self, batch: Any, transfer: Callable[[], Any]) -> Any:
        """A batch made ready for the net; once for all members that have the same one, unless chance has a part."""
        for before, after in self._batches[:1]:
            if all(mine is its or torch.equal(mine, its) for mine, its in zip(batch, before, strict=True)):
                return after
        states = _get_random_states()
        ready = transfer()
        if all(torch.equal(a, b) for a, b in zip(states, _get_random_states(), strict=True)):
            self._batches.append((batch, ready))
        return ready

    def refuse(self, reason: str) -> NoReturn:
        """End all runs for a reason."""
        self._refusal = StackError(reason)
        sys.exit(1)

    def share_data(self, datamodule: Any) -> None:
        """Let data modules of the same images have them in memory once."""
        if hasattr(datamodule, "share") and not any(datamodule.share(other) for other in self._datamodules):
            self._datamodules.append(datamodule)

    def _go_on(self, member: Member, signums: Sequence[int]) -> None:
        """With signals noted for all members, who each set handlers of their own for themselves."""
        for signum in signums:
            if signal.getsignal(signum) != self._note:
                signal.signal(signum, self._note)
        if self.signum and not member.handlers:  # it has none to save for
            member.end(128 + self.signum)
            return
        member.go_on()
        for signum in signums:
            if (handler := signal.getsignal(signum)) != self._note:
                member.handlers[signum] = handler
        if self._refusal:
            raise self._refusal

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if frame is None:  # a member has saved what it had to, and goes
            sys.exit(128 + signum)
        if self.signum:  # the second one
            raise SystemExit(128 + signum)
        self.signum = signum

    def _pass_signal_on(self, members: Sequence[Member]) -> None:
        """Between two rounds, so that all members save behind the same step."""
        if self.signum and not self._is_passed_on:
            self._is_passed_on = True
            for member in members:
                if self.signum in member.handlers:
                    member.handlers[self.signum](self.signum, None)

    def _serve(self, waiting: Sequence[Member]) -> None:
        losses = [member.request.tensor for member in waiting if member.request and member.request.kind == "backward"]
        if losses:
            with torch.enable_grad():
                torch.autograd.backward(losses)
        groups: dict[Any, list[Member]] = {}
        for member in waiting:
            assert member.request
            assert member.net is not None
            if member.request.kind == "forward":
                member.stack = member.stack or self._find_stack(member.net)
                images = member.request.tensor
                key = (id(member.stack), member.net.training, member.is_learning, images.shape)
                groups.setdefault(key, []).append(member)
        for members in groups.values():
            nets = [member.net for member in members if member.net is not None]
            inputs = [member.request.tensor for member in members if member.request]
            with torch.set_grad_enabled(members[0].is_learning):
                assert members[0].stack
                outputs = members[0].stack(nets, inputs)
            for member, output in zip(members, outputs, strict=True):
                member.answer = output

    def _find_stack(self, net: nn.Module) -> Stack:
        for first, stack in self._stacks:
            if net is first or are_alike(first, net):
                return stack
        self._stacks.append((net, Stack(net)))
        return self._stacks[-1][1]


def _get_random_states() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _get_state(host: bool) -> dict[str, Any]:
    """What is one for the whole process, but of which each run needs its own."""
    state = {
        "grad": torch.is_grad_enabled(),
        "random": _get_random_states(),
        "hydra": HydraConfig.instance().cfg,
        "handlers": list(logging.root.handlers),
    }
    if host:
        state |= {"python": random.getstate(), "numpy": np.random.get_state()}
    return state


def _set_state(state: dict[str, Any]) -> None:
    torch.set_grad_enabled(state["grad"])
    cpu, *cuda = state["random"]
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    HydraConfig.instance().cfg = state["hydra"]
    logging.root.handlers[:] = state["handlers"]
    if "python" in state:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
