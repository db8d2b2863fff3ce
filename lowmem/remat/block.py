"""A block of convolution + batch norm pairs with ReLUs between, maybe with a shortcut, run by hand.

    z1 = conv1(x)   a1 = relu(bn1(z1))   …   y = relu(bn_n(z_n) + shortcut(x))

Bottleneck, basic and plain blocks and the stem (one pair, no shortcut) are all of this form. Between forward and
backward any subset of the z's and a's can be kept; the backward computes the others again, each only when it is needed,
from the nearest kept tensor, and frees every tensor once it is dead. The shortcut's z is called zs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowmem.plan.policy import BlockPolicy, PolicyKind
from lowmem.remat import batch_norm, kernels
from lowmem.remat.stage import Box, Forwarded, Saved, Stage, StagePass


@dataclass(frozen=True)
class Pair:
    """A convolution without bias and the batch norm after it."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d

    def trainable(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def parameters(self) -> Iterator[Tensor]:
        yield self.conv.weight
        yield self.bn.weight
        yield self.bn.bias

    def signature(self) -> Hashable:
        conv, weight = self.conv, self.conv.weight
        operand = (weight.shape, weight.stride(), weight.dtype)
        return (*operand, conv.stride, conv.padding, conv.dilation, conv.groups, self.bn.training)


@dataclass(frozen=True)
class ConvBlock(Stage):
    """The block as a stage. `identity`: the input is added to the output; `projection`: its image under a 1x1
    convolution is. At most one of the two."""

    name: str
    pairs: tuple[Pair, ...]
    projection: Pair | None = None
    identity: bool = False
    relu_output = True

    @property
    def signature(self) -> Hashable:
        return self.identity, tuple(pair and pair.signature() for pair in (*self.pairs, self.projection))

    @property
    def _all_pairs(self) -> tuple[Pair, ...]:
        return (*self.pairs, self.projection) if self.projection else self.pairs

    @property
    def norms(self) -> tuple[nn.BatchNorm2d, ...]:
        return tuple(pair.bn for pair in self._all_pairs)

    def parameters(self) -> Iterator[Tensor]:
        for pair in self._all_pairs:
            yield from pair.parameters()

    @property
    def tensors(self) -> frozenset[str]:
        """Names of everything that can be kept."""
        return self._outputs | {f"a{k}" for k in range(1, len(self.pairs))}

    @property
    def _outputs(self) -> frozenset[str]:
        names = {f"z{k}" for k in range(1, len(self.pairs) + 1)}
        return frozenset(names | {"zs"} if self.projection else names)

    def kept(self, policy: BlockPolicy | None) -> frozenset[str]:
        if policy is None:
            return frozenset()
        if policy.kind is PolicyKind.SAVE_ALL:
            return self.tensors
        return self._outputs if policy.kind is PolicyKind.LEAN else policy.kept

    def check(self, policy: BlockPolicy) -> None:
        unknown = sorted(self.kept(policy) - self.tensors)
        if unknown:
            raise ValueError(f"stage {self.name} has no {', '.join(unknown)}: it has {', '.join(sorted(self.tensors))}")

    def plain(self, x: Tensor) -> Tensor:
        """The output as the model's own modules compute it, for autograd to record."""
        y = x
        for k, pair in enumerate(self.pairs, start=1):
            y = pair.bn(pair.conv(y))
            if k < len(self.pairs):
                y = torch.relu(y)
        if self.projection is not None:
            y = y + self.projection.bn(self.projection.conv(x))
        elif self.identity:
            y = y + x
        return torch.relu(y)

    def forward(self, box: Box, policy: BlockPolicy | None, memo: StagePass, want_output: bool = True) -> Forwarded:
        kept, saved = self.kept(policy), Saved()
        if not want_output:
            return None, self._only_kept(box, kept, memo)
        hold = list(box)  # the tensor the next convolution reads
        x = box.pop() if self.projection or self.identity else None
        box.clear()
        for k, pair in enumerate(self.pairs, start=1):
            z = kernels.convolve(pair.conv, hold[0], memo.low)
            hold.clear()
            hold.append(self._norm(k, z, memo, in_place=f"z{k}" not in kept))
            if f"z{k}" in kept:
                saved[f"z{k}"] = z
            del z
            if k < len(self.pairs):
                hold[0].relu_()
                if f"a{k}" in kept:
                    saved[f"a{k}"] = hold[0]
        return self._finish(hold, x, saved, kept, memo), saved

    def restore(self, saved: Saved, x: Tensor, memo: StagePass) -> Tensor:
        n = len(self.pairs)
        hold = [self._norm(n, self._z(n, saved, x, memo), memo, in_place=False)]
        return self._finish(hold, x, saved, self._outputs, memo)

    def backward(self, grad: Box, saved: Saved, x: Tensor, memo: StagePass) -> Tensor | None:
        shortcut = grad[0] if self.identity and memo.need_input else None
        if self.projection and (memo.need_input or self.projection.trainable()):
            shortcut = self._pair_backward(0, [grad[0]], saved, x, memo, memo.need_input)
        for k in range(len(self.pairs), 0, -1):
            below = memo.need_input or any(lower.trainable() for lower in self.pairs[: k - 1])
            if not (below or self.pairs[k - 1].trainable()):
                return shortcut
            grad_a = self._pair_backward(k, grad, saved, x, memo, below)
            if grad_a is None:
                return shortcut
            grad.append(grad_a)
            del grad_a
        branch = grad.pop()
        return branch if shortcut is None else branch.add_(shortcut)

    def _pair_backward(self, k: int, grad: Box, saved: Saved, x: Tensor, memo: StagePass, below: bool) -> Tensor | None:
        """The gradient of what the pair's convolution reads, before its ReLU, or None if `below` nobody needs it."""
        pair = self._pair(k)
        self._z(k, saved, x, memo)
        needed = below or pair.conv.weight.requires_grad
        name, stats = f"z{k or 's'}", memo.norms[k]
        grad_z = batch_norm.norm_backward(pair.bn, grad.pop(), saved.pop(name), stats, needed, memo.total)
        if grad_z is None:
            return None
        source = self._a(k - 1, saved, x, memo)
        saved.pop(f"a{k - 1}", None)
        grad_a = kernels.convolve_backward(pair.conv, grad_z, source, memo.low, below)
        del grad_z
        return kernels.mask_relu(grad_a, source) if k > 1 and grad_a is not None else grad_a

    def _only_kept(self, box: Box, kept: frozenset[str], memo: StagePass) -> Saved:
        """What a segment's last stage keeps; its output would be for nobody."""
        saved = Saved()
        x = box.pop()
        for k in range(1, len(self.pairs) + 1):
            for name, make in ((f"z{k}", self._z), (f"a{k}", self._a)):
                if name in kept:
                    make(k, saved, x, memo)
            for name in (f"z{k - 1}", f"a{k - 1}"):
                if name not in kept:
                    saved.pop(name, None)
        if "zs" in kept:
            self._z(0, saved, x, memo)
        return {name: tensor for name, tensor in saved.items() if name in kept}

    def _finish(self, hold: Box, x: Tensor | None, saved: Saved, kept: frozenset[str], memo: StagePass) -> Tensor:
        """`hold` has bn_n(z_n), which becomes the output."""
        y = hold.pop()
        if self.projection:
            assert x is not None
            zs = self._z(0, saved, x, memo)
            if "zs" not in kept:
                del saved["zs"]
            y.add_(self._norm(0, zs, memo, in_place="zs" not in kept))
        elif self.identity:
            assert x is not None
            y = y.add_(x) if y.dtype == torch.result_type(y, x) else y + x
        return y.relu_()

    def _pair(self, k: int) -> Pair:
        """The k-th; 0 is the projection."""
        pair = self.pairs[k - 1] if k else self.projection
        assert pair is not None
        return pair

    def _norm(self, k: int, z: Tensor, memo: StagePass, *, in_place: bool) -> Tensor:
        bn = self._pair(k).bn
        if k in memo.norms:
            return batch_norm.norm_again(bn, z, memo.norms[k], in_place)
        out, memo.norms[k] = batch_norm.norm_first(bn, z, in_place, memo.library_norm, memo.total)
        return out

    def _z(self, k: int, saved: Saved, x: Tensor, memo: StagePass) -> Tensor:
        """z_k from `saved`, or computed again and put there."""
        name = f"z{k or 's'}"
        if name not in saved:
            saved[name] = kernels.convolve(self._pair(k).conv, self._a(k - 1, saved, x, memo), memo.low)
        return saved[name]

    def _a(self, k: int, saved: Saved, x: Tensor, memo: StagePass) -> Tensor:
        """a_k likewise; below a_1 it is the input."""
        if k < 1:
            return x
        if f"a{k}" not in saved:
            z = self._z(k, saved, x, memo)
            saved[f"a{k}"] = self._norm(k, z, memo, in_place=False).relu_()
        return saved[f"a{k}"]
