"""Derivatives that otgen does not compute: asking for one is an error, never a zero."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from otgen.errors import Unsupported


def once(sentence: str, found: Tensor | None, *inputs: Tensor | None) -> Tensor | None:
    """`found`, which depends on `inputs`, and on what its own graph says, in a way that is not computed.

    Who differentiates it gets an Unsupported with this sentence.
    """
    passed: Tensor | None = None if found is None else _Once.apply(sentence, found, *inputs)  # type: ignore[no-untyped-call]
    return passed


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sentence: str, found: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.sentence = sentence
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise Unsupported(ctx.sentence)
