"""Random small chains in bytes and whole seconds, so that equality is exact."""

from __future__ import annotations

import dataclasses
import random

from lowmem.core.units import MIB
from lowmem.plan.cost import ChainCost, OptionCost, StageCost
from lowmem.plan.policy import FUSED, INPUT_ONLY, LEAN, SAVE_ALL, BlockPolicy, keep

PLAIN = (SAVE_ALL, LEAN, keep("conv1", "conv2"), keep("conv2"), INPUT_ONLY)
DROPPING = (keep("conv1", "conv3", drop_output=True), keep("conv2", drop_output=True))


def random_option(rng: random.Random, policy: BlockPolicy, output: int, input_grad: int) -> OptionCost:
    fused = policy == FUSED
    return OptionCost(
        policy=policy,
        forward_seconds=0.0 if fused else float(rng.randint(0, 6)),
        backward_seconds=float(rng.randint(0, 12)),
        kept_bytes=0 if fused else rng.randint(0, 12) + (0 if policy.drop_output else output),
        forward_temp_bytes=0 if fused else rng.randint(0, 9) + (output if policy.drop_output else 0),
        backward_temp_bytes=input_grad + rng.randint(0, 12),
        restore_seconds=float(rng.randint(0, 3)) if policy.drop_output else 0.0,
    )


def random_chain(rng: random.Random, count: int, options: int, *, dropping: bool = False) -> ChainCost:
    """`options` is the most that a stage has, beside FUSED and dropping ones."""
    x = [rng.randint(0, 9) for _ in range(count + 1)]
    g = [rng.randint(0, 9) for _ in range(count + 1)]
    stages = []
    for index in range(count):
        output = x[index + 1]
        policies = rng.sample(PLAIN, rng.randint(1, options))
        if rng.random() < 0.6:
            policies.append(FUSED)
        made = [random_option(rng, policy, output, g[index]) for policy in policies]
        if dropping and rng.random() < 0.7:
            for policy in rng.sample(DROPPING, rng.randint(1, 2)):
                option = random_option(rng, policy, output, g[index])
                left = rng.randint(0, 6)
                peak = output + left + rng.randint(0, 6)
                more = {"restore_temp_bytes": peak, "restored_bytes": left, "restore_reads_input": rng.random() < 0.6}
                made.append(dataclasses.replace(option, **more))
        rng.shuffle(made)
        last = [
            random_option(rng, option.policy, 0, g[index])
            for option in made
            if option.policy in PLAIN and rng.random() < 0.5
        ]
        stages.append(
            StageCost(
                name=f"block{index}",
                input_bytes=x[index],
                input_grad_bytes=g[index],
                options=tuple(made),
                last_options=tuple(last),
                fast_seconds=float(rng.randint(0, 6)),
                fast_temp_bytes=rng.randint(0, 9),
                param_grad_bytes=rng.randint(0, 9),
            )
        )
    return ChainCost(stages=tuple(stages), output_bytes=x[-1], output_grad_bytes=g[-1], fixed_bytes=rng.randint(0, 20))


def scaled(chain: ChainCost, rng: random.Random) -> ChainCost:
    """The same chain with sizes of some MiB that do not divide into slots."""

    def size(value: int) -> int:
        return value * 3_000_000 + (rng.randint(0, 400_000) if value else 0)

    def option_size(option: OptionCost) -> OptionCost:
        return dataclasses.replace(
            option,
            kept_bytes=size(option.kept_bytes),
            forward_temp_bytes=size(option.forward_temp_bytes),
            backward_temp_bytes=size(option.backward_temp_bytes),
            restore_temp_bytes=size(option.restore_temp_bytes),
            restored_bytes=size(option.restored_bytes),
        )

    stages = []
    for stage in chain.stages:
        stages.append(
            dataclasses.replace(
                stage,
                options=tuple(map(option_size, stage.options)),
                last_options=tuple(map(option_size, stage.last_options)),
                input_bytes=size(stage.input_bytes),
                input_grad_bytes=size(stage.input_grad_bytes),
                fast_temp_bytes=size(stage.fast_temp_bytes),
                param_grad_bytes=size(stage.param_grad_bytes),
            )
        )
    return dataclasses.replace(chain, stages=tuple(stages), output_bytes=size(chain.output_bytes))


def tradeoffs(stages: int, options: int, useful: int = 5_000 * MIB) -> ChainCost:
    """A chain of equal stages whose options trade bytes for time."""
    unit = useful // (stages + 4) // options
    made = tuple(
        OptionCost(
            policy=keep(*(f"z{index}" for index in range(1, level + 1))),
            forward_seconds=1.0,
            backward_seconds=3.0 - level / options,
            kept_bytes=(level + 1) * unit,
            forward_temp_bytes=unit,
            backward_temp_bytes=2 * unit,
        )
        for level in range(options)
    )
    block = StageCost(
        name="block",
        input_bytes=unit,
        input_grad_bytes=unit,
        fast_seconds=1.0,
        fast_temp_bytes=unit,
        options=made,
    )
    return ChainCost(stages=tuple(dataclasses.replace(block, name=f"block{i}") for i in range(stages)))
