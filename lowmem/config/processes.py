"""The settings of one of several processes, and the cards that they name."""

from __future__ import annotations

from lowmem.config.schema import Config
from lowmem.core.errors import UsageError
from lowmem.core.units import counted


def for_process(config: Config, rank: int, size: int) -> Config:
    """The settings of one of `size` processes: of several cards named in `memory.card` its own, by rank.
    Raises UsageError unless there is one card for all, or one for each."""
    cards = cards_of(config)
    if len(cards) <= 1:
        return config
    if len(cards) != size:
        raise UsageError(
            f"--card names {len(cards)} cards, for {counted(size, 'process')}: name one for all "
            f"(--set memory.card={cards[0]}), or start one process for each with "
            f"`torchrun --nproc-per-node={len(cards)} -m lowmem …`"
        )
    memory = config.memory.model_copy(update={"card": cards[rank]})
    return config.model_copy(update={"memory": memory})


def cards_of(config: Config) -> tuple[str, ...]:
    """The cards named in `memory.card`, by rank: none, one for all processes, or one for each."""
    named = config.memory.card
    return () if named is None else tuple(part.strip() for part in named.split(",") if part.strip())
