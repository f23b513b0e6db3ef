"""Mutations of a corpus, the same ones for the same seed: what the suite plays where nothing guides it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
MOST = 4096
NUMBERS = (0, 1, 0x7F, 0xFF, 0x100, 0xFFFF, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 64) - 1)


def corpus(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def mutations(seeds: Sequence[bytes], seed: int) -> Iterator[bytes]:
    dice = random.Random(seed)
    while True:
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.randint(1, 5)):
            dice.choice(MUTATORS)(data, dice, seeds)
        yield bytes(data[:MOST])


Mutator = Callable[[bytearray, random.Random, Sequence[bytes]], None]


def _byte(data: bytearray, dice: random.Random, seeds: Sequence[bytes]) -> None:
    if data:
        data[dice.randrange(len(data))] = dice.randrange(256)


def _number(data: bytearray, dice: random.Random, seeds: Sequence[bytes]) -> None:
    size = dice.choice((1, 2, 4, 8))
    number = dice.choice(NUMBERS) & (1 << 8 * size) - 1
    at = dice.randint(0, len(data))
    data[at : at + size] = number.to_bytes(size, "little")


def _cut(data: bytearray, dice: random.Random, seeds: Sequence[bytes]) -> None:
    at = dice.randint(0, len(data))
    del data[at : at + dice.randint(1, 16)]


def _insert(data: bytearray, dice: random.Random, seeds: Sequence[bytes]) -> None:
    at = dice.randint(0, len(data))
    data[at:at] = dice.randbytes(dice.randint(1, 16))


def _splice(data: bytearray, dice: random.Random, seeds: Sequence[bytes]) -> None:
    other = dice.choice(seeds)
    at = dice.randint(0, len(other))
    data += other[at : at + dice.randint(1, 512)]


MUTATORS: tuple[Mutator, ...] = (_byte, _byte, _number, _number, _cut, _insert, _splice)
