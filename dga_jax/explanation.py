"""What `dga_jax.explain` returns: the implementation of every op that a call uses."""

import dataclasses

from pallas_kernels.dispatch import Report


@dataclasses.dataclass(frozen=True)
class OpChoice:
  """The implementation that one op runs.

  Attributes:
    op: name of the op, a folder or function of `pallas_kernels`.
    runs: the implementation.
    why_not: (implementation, reason) of each other one, in order of preference. The reason is None
      for an implementation that could run the call and comes later in the order.
  """

  op: str
  runs: str
  why_not: tuple[tuple[str, str | None], ...]

  def reason(self, name: str) -> str | None:
    """Why an implementation does not run; None for one that could. KeyError if there is none."""
    return dict(self.why_not)[name]


@dataclasses.dataclass(frozen=True)
class Explanation:
  """The implementation of every op of a call. Prints as a table.

  Attributes:
    device: the device that the call is for.
    ops: in the order in which the call runs them, then the ops of a decoding step. An op that runs
      twice in the same way is listed once.
  """

  device: str
  ops: tuple[OpChoice, ...]

  @classmethod
  def from_reports(cls, device: str, reports: list[Report]) -> "Explanation":
    """The explanation of a traced call.

    Args:
      device: the device that the call is for.
      reports: from `pallas_kernels.dispatch.collect_reports`.
    """
    choices = (
      OpChoice(
        op=report.op,
        runs=report.chosen,
        why_not=tuple(
          (name, reason) for name, reason in report.reasons.items() if name != report.chosen
        ),
      )
      for report in reports
    )
    return cls(device, tuple(dict.fromkeys(choices)))

  def __getitem__(self, op: str) -> OpChoice:
    """The first choice of an op; raises KeyError for an op that the call does not use."""
    for choice in self.ops:
      if choice.op == op:
        return choice
    raise KeyError(op)

  def __str__(self) -> str:
    rows = [("op", "runs", "why not the others")]
    for choice in self.ops:
      # The first line names the device.
      reasons = [
        f"{name}: {reason.removesuffix(f', and this call is for {self.device}')}"
        if reason
        else f"{name}: applies too"
        for name, reason in choice.why_not
      ]
      rows.append((choice.op, choice.runs, reasons[0] if reasons else ""))
      rows.extend(("", "", reason) for reason in reasons[1:])
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = (f"{op:<{first}} | {runs:<{second}} | {reason}" for op, runs, reason in rows)
    return "\n".join((f"for {self.device}", *(line.rstrip() for line in lines)))
