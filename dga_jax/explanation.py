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
  """The implementation of every op of a call. Prints as a short table.

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
    """One line for each op: what runs, and the implementations that do not, in order."""
    first, second = (
      max(len(name), *(len(getattr(choice, name)) for choice in self.ops))
      for name in ("op", "runs")
    )
    lines = [f"{'op':<{first}}  {'runs':<{second}}  cannot run"]
    for choice in self.ops:
      refused = ", ".join(name for name, reason in choice.why_not if reason) or "-"
      lines.append(f"{choice.op:<{first}}  {choice.runs:<{second}}  {refused}")
    return "\n".join((f"for {self.device}; explanation.details() has the reasons", *lines))

  def details(self) -> str:
    """The reason of each implementation that does not run, one a line."""
    return "\n".join(
      f"{choice.op}: {name}: {reason or 'could run the call, and comes later in the order'}"
      for choice in self.ops
      for name, reason in choice.why_not
    )
