"""Signals that stop a run: SIGTERM, SIGINT (Ctrl-C) and SIGHUP.

Before the first step the run stops at once, for there is nothing to save. Later it takes the step
to its end, saves it and stops. A SIGINT after any of these signals ends the process at once.
"""

import os
import signal
import threading
import types
from typing import Any, Self

from absl import logging

# Exit status of a run that a signal has stopped: try the same command again (sysexits.h).
EXIT_STATUS = os.EX_TEMPFAIL
# What shells report of a command that SIGINT has ended.
_EXIT_STATUS_AT_ONCE = 128 + signal.SIGINT
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StoppedError(BaseException):
  """A signal came before the first step. Like KeyboardInterrupt it is no Exception."""


class StopSignals:
  """Handles the signals while it is entered, in the main thread; in others it does nothing.

  A signal that is ignored stays ignored, as SIGHUP under nohup.

  Attributes:
    asked: whether a signal came.
  """

  def __init__(self) -> None:
    self.asked = False
    self._is_deferred = False
    self._before: dict[signal.Signals, Any] = {}
    self._thread: threading.Thread | None = None

  def __enter__(self) -> Self:
    if threading.current_thread() is not threading.main_thread():
      return self
    self._read_end, self._write_end = os.pipe()
    os.set_blocking(self._write_end, False)
    for number in _SIGNALS:
      if signal.getsignal(number) is not signal.SIG_IGN:
        self._before[number] = signal.signal(number, self._handle)
    self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
    # Python calls a handler after the main thread's current call into C++, which may be a
    # compilation of minutes. This thread sees every signal at once.
    self._thread = threading.Thread(target=self._watch, name="stop_signals", daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._thread is None:
      return
    for number, before in self._before.items():
      signal.signal(number, before)
    signal.set_wakeup_fd(self._wakeup_before)
    os.close(self._write_end)  # The thread reads the end of the file.
    self._thread.join()
    os.close(self._read_end)

  def defer(self) -> None:
    """From now on a signal sets `asked` and raises nothing: the first step follows."""
    self._is_deferred = True

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    self.asked = True
    if not self._is_deferred:
      raise StoppedError(f"Stopped by {signal.Signals(number).name} before the first step.")

  def _watch(self) -> None:
    came_before = False
    while numbers := os.read(self._read_end, 64):
      for number in numbers:
        if number not in self._before:
          continue
        if came_before and number == signal.SIGINT:
          os.write(2, b"\nLeft at once, without saving.\n")
          os._exit(_EXIT_STATUS_AT_ONCE)
        if self._is_deferred and not came_before:
          logging.warning(
            "%s: the run saves its current step and stops. Ctrl-C ends it at once, without saving.",
            signal.Signals(number).name,
          )
        came_before = True
