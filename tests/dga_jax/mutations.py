"""Mutations of file contents for fuzz tests: bit flips, cuts, copies, wrong sizes, JSON changes."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

# Sizes and counts that overflow, wrap around or request all memory.
_INTEGERS = [0, 1, 2, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]
_VALUES: list[Any] = [
  None,
  True,
  False,
  0,
  1,
  -1,
  2**31,
  10**9,
  10**30,
  0.5,
  -0.5,
  1e308,
  1e-320,
  "",
  "x",
  "0",
  "\ud800",
  "\x00",
  "../x",
  "x" * 5000,
  [],
  {},
  [None],
  [0, -1],
  {"x": None},
  {"type": "x"},
]
# JSON texts, valid or not, that json.dumps does not write.
_RAW = ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000 + "]" * 3000, '{"a":1,"a":2}', "tru"]


def mutate_bytes(content: bytes, rng: random.Random, header: int | None = None) -> bytes:
  """A mutated copy of a file's content.

  Args:
    content: the content of the file.
    rng: the source of randomness.
    header: size of the header in bytes, which most mutations hit. None mutates the whole content.
  """
  for _ in range(rng.choice([1, 1, 1, 2, 4])):
    damage = rng.choice(_BYTE_DAMAGES)
    end = len(content) if header is None or rng.random() < 0.1 else min(header, len(content))
    if end:
      content = damage(content, rng, end)
  return content


def mutate_json(text: str, rng: random.Random) -> str:
  """A mutated copy of a JSON text. Most copies are JSON with replaced values, keys or objects."""
  if rng.random() < 0.2:
    damaged = mutate_bytes(text.encode(), rng)
    return damaged.decode("utf-8", errors="replace")
  values = json.loads(text)
  raw: dict[str, str] = {}
  for number in range(rng.choice([1, 1, 2, 3])):
    slots = _slots(values)
    if not slots:
      break
    holder, key = rng.choice(slots)
    _change(holder, key, slots, rng, raw, f"raw text {number}")
  text = json.dumps(values)
  for mark, replacement in raw.items():
    text = text.replace(json.dumps(mark), replacement)
  return text


def _change(
  holder: Any, key: Any, slots: list, rng: random.Random, raw: dict[str, str], mark: str
) -> None:
  """Replaces, deletes, copies or renames the value `holder[key]` in place."""
  kind = rng.randrange(8)
  if kind == 0:
    del holder[key]
  elif kind == 1:
    other, other_key = rng.choice(slots)
    holder[key] = json.loads(json.dumps(other[other_key]))
  elif kind == 2 and isinstance(holder, dict):
    holder[rng.choice([key + "x", key[1:], "\ud800", rng.choice(slots)[1]])] = holder.pop(key)
  elif kind == 3:
    holder[key] = [holder[key]] if rng.random() < 0.5 else {"x": holder[key]}
  elif kind == 4 and isinstance(holder[key], int):
    holder[key] += rng.choice([-1, 1, 2**31, -(2**63), 7])
  elif kind == 5:
    raw[mark] = rng.choice(_RAW)
    holder[key] = mark
  else:
    holder[key] = copy.deepcopy(rng.choice(_VALUES))


def _slots(values: Any) -> list[tuple[Any, Any]]:
  """Every value in nested objects and lists, as its container and its key or index."""
  found: list[tuple[Any, Any]] = []
  waiting = [values]
  while waiting:
    holder = waiting.pop()
    if isinstance(holder, dict | list):
      keys: Any = holder if isinstance(holder, dict) else range(len(holder))
      found += [(holder, key) for key in keys]
      waiting += [holder[key] for key in keys]
  return found


def _flip(content: bytes, rng: random.Random, end: int) -> bytes:
  damaged = bytearray(content)
  for _ in range(rng.choice([1, 1, 2, 8])):
    damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
  return bytes(damaged)


def _truncate(content: bytes, rng: random.Random, end: int) -> bytes:
  return content[: rng.randrange(end)]


def _overwrite(content: bytes, rng: random.Random, end: int) -> bytes:
  """Copies some bytes over others of the same number."""
  size = rng.randrange(1, min(end, 64) + 1)
  start, offset = rng.randrange(end - size + 1), rng.randrange(end - size + 1)
  return content[:offset] + content[start : start + size] + content[offset + size :]


def _insert(content: bytes, rng: random.Random, end: int) -> bytes:
  offset = rng.randrange(end)
  return content[:offset] + rng.randbytes(rng.choice([1, 4, 8, 100])) + content[offset:]


def _delete(content: bytes, rng: random.Random, end: int) -> bytes:
  offset = rng.randrange(end)
  return content[:offset] + content[offset + rng.choice([1, 4, 8, 100]) :]


def _resize(content: bytes, rng: random.Random, end: int) -> bytes:
  """Writes a number of _INTEGERS over 4 or 8 bytes, as if they were a size or an offset."""
  width, offset = rng.choice([4, 8]), rng.randrange(end)
  number = rng.choice(_INTEGERS) % 256**width
  return content[:offset] + number.to_bytes(width, "little") + content[offset + width :]


_BYTE_DAMAGES: list[Callable[[bytes, random.Random, int], bytes]] = [
  _flip,
  _flip,
  _truncate,
  _overwrite,
  _insert,
  _delete,
  _resize,
  _resize,
]
