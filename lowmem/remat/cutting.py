"""Operations in forward order -> stages: the chain is cut where one tensor alone is alive.

A stage begins with the cut before a dear operation (a convolution, a matrix product, a module that runs as a whole), so
that what is cheap belongs to what it follows: convolution, batch norm, ReLU and pooling are one stage. Parts of one
small module (at most `SMALL` dear operations: a block without a shortcut) are one stage too. Numbers that follow from
shapes, and what is made of parameters alone, do not count as alive.

Known limitation: a value that is used far away (the skips of a U-Net) leaves no cut between, so that all of it is one
stage, which is planned inside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lowmem.remat.operation import Operation
from lowmem.remat.reading import Reading
from lowmem.remat.stage import Stage
from lowmem.remat.tracing import NotTraceable

SMALL = 4


def cut(source: Reading, readings: Sequence[Reading], output: Reading) -> tuple[Stage, ...]:
    """The stages of a network. `readings`: in forward order."""
    if output is source:
        raise NotTraceable("it returns its input", final=False)
    groups = _grouped(_between_cuts(source, readings, output))
    if len(groups) > 1 and not any(one.dear for one in groups[0]):
        groups[:2] = [groups[0] + groups[1]]
    names: set[str] = set()
    stages: list[Stage] = []
    value = source
    constants = [one for one in readings if one.constant]
    dear = _dear_by_module(groups)
    for number, group in enumerate(groups):
        name = _name(group, number, len(groups), dear)
        while name in names:
            stem, _, count = name.rpartition("#")
            name = f"{stem or name}#{int(count) + 1 if stem else 2}"
        names.add(name)
        result = output if number + 1 == len(groups) else next(one for one in reversed(group) if not one.scalar)
        stages.append(_stage(name, value, group, result, constants))
        value = result
    return tuple(stages)


def _between_cuts(source: Reading, readings: Sequence[Reading], output: Reading) -> list[list[Reading]]:
    """Constants are left out."""
    counted = [one for one in readings if not one.constant]
    last = {source: -1}
    for at, one in enumerate(counted):
        last.setdefault(one, at)
        for operand in one.operands:
            last[operand] = at
    last[output] = len(counted)
    groups: list[list[Reading]] = [[]]
    live = {source}
    for at, one in enumerate(counted):
        groups[-1].append(one)
        if not one.scalar:
            live.add(one)
        live = {value for value in live if last[value] > at and not value.constant}
        if one.scalar:
            continue
        # An operation that nothing reads (it may move buffers) is nobody's output.
        if live == {one} and not one.taken_apart and at + 1 < len(counted):
            groups.append([])
    if not groups[-1]:
        groups.pop()
    return groups


def _grouped(groups: Sequence[list[Reading]]) -> list[list[Reading]]:
    """What lies between two cuts -> stages."""
    stages: list[list[Reading]] = [[]]
    for group in groups:
        if any(one.dear for one in group) and any(one.dear for one in stages[-1]):
            stages.append([])
        stages[-1] += group
    dear = _dear_by_module(stages)
    merged = [stages[0]]
    for stage in stages[1:]:
        module = _common([one.path for one in (*_dear(merged[-1]), *_dear(stage))])
        of_blocks = any(count > 1 and path.rpartition(".")[0] == module for path, count in dear.items())
        if module and dear.get(module, SMALL + 1) <= SMALL and not of_blocks:
            merged[-1] = merged[-1] + stage
        else:
            merged.append(stage)
    return merged


def _dear(stage: Sequence[Reading]) -> list[Reading]:
    return [one for one in stage if one.dear]


def _dear_by_module(stages: Sequence[Sequence[Reading]]) -> dict[str, int]:
    """How many dear operations there are inside each module, by its path."""
    count: dict[str, int] = {}
    for stage in stages:
        for one in _dear(stage):
            parts = one.path.split(".")
            for end in range(1, len(parts) + 1):
                path = ".".join(parts[:end])
                count[path] = count.get(path, 0) + 1
    return count


def _common(paths: Sequence[str]) -> str:
    """The innermost module that all the paths are in."""
    split = [path.split(".") for path in paths]
    found = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        found.append(parts[0])
    return ".".join(found)


def _name(group: Sequence[Reading], number: int, count: int, dear: Mapping[str, int]) -> str:
    """The largest module that has the group's dear operations and no others, but of a sequence its element; `stem` and
    `head` for what has none."""
    mine = _dear(group)
    path = _common([one.path for one in mine or group])
    while "." in path and dear.get(path.rpartition(".")[0]) == len(mine):
        above, _, last = path.rpartition(".")
        if last.isdecimal() and path not in {one.path for one in mine}:
            break
        path = above
    if count == 1:
        return "model"
    if path and ("." in path or len(mine) > 1):
        return path
    return "stem" if number == 0 else "head" if number == count - 1 else path or f"part{number}"


def _stage(
    name: str, source: Reading, group: Sequence[Reading], result: Reading, constants: Sequence[Reading]
) -> Stage:
    """With the constants that its operations use; `result` comes last."""
    wanted: set[Reading] = set()
    for one in reversed([*constants, *group]):
        if not one.constant or one in wanted:
            wanted.update(operand for operand in one.operands if operand.constant)
    before = [one for one in (*constants, *group) if one is not result and (one in wanted or not one.constant)]
    number = {source: 0}
    operations: list[Operation] = []
    names: set[str] = set()
    for one in (*before, result):
        if not all(operand in number for operand in one.operands):
            raise NotTraceable(f"{one.name} reads what comes after the result {result.name}", final=False)
        operations.append(one.make(_local(name, one, names), tuple(number[operand] for operand in one.operands)))
        number[one] = len(operations)
    return Stage(name, tuple(operations))


def _local(stage: str, one: Reading, names: set[str]) -> str:
    """Of an operation inside its stage: alike in stages that are alike. A policy names it, without spaces, commas and
    braces, which a module's name may have."""
    stem = stage.partition("#")[0]
    name = one.kind.removeprefix(stem + ".") if one.kind != stem else one.kind.rpartition(".")[2]
    name = re.sub(r"[\s,{}]", "_", name) or "operation"
    count, found = 1, name
    while found in names:
        count += 1
        found = f"{name}_{count}"
    names.add(found)
    return found
