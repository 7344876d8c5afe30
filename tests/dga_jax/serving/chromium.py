"""Headless Chromium, driven by its debugging protocol over a pipe."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
  """The path of an installed Chromium."""
  return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Page:
  """A page of a running Chromium.

  Args:
    to_browser: file descriptor for messages.
    from_browser: file descriptor of answers and events.
  """

  def __init__(self, to_browser: int, from_browser: int) -> None:
    self._to, self._from, self._rest = to_browser, from_browser, b""
    self._numbers = itertools.count(1)
    self._session: dict[str, str] = {}
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self._session = {"sessionId": attached["sessionId"]}
    for domain in ("Page", "Runtime", "DOM"):
      self.call(f"{domain}.enable")

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    """Calls a method of the protocol and returns its result."""
    number = next(self._numbers)
    message = {"id": number, "method": method, "params": params, **self._session}
    os.write(self._to, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._receive()
      if answer.get("id") == number:
        assert "error" not in answer, answer
        return dict(answer["result"])

  def run(self, script: str) -> Any:
    """The value of a JavaScript expression; waits for a promise."""
    result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
    assert "exceptionDetails" not in result, result
    return result["result"].get("value")

  def wait_for(self, script: str) -> None:
    """Until a JavaScript expression is true."""
    deadline = time.monotonic() + 120
    while not self.run(script):
      assert time.monotonic() < deadline, script
      time.sleep(0.05)

  def choose_file(self, selector: str, path: Path) -> None:
    """Gives a file to an input."""
    root = self.call("DOM.getDocument")["root"]["nodeId"]
    node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
    self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

  def screenshot(self, path: Path) -> None:
    """Writes a PNG."""
    path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

  def _receive(self) -> dict[str, Any]:
    while b"\0" not in self._rest:
      assert select.select([self._from], [], [], 120)[0], "Chromium does not answer"
      part = os.read(self._from, 1 << 16)
      assert part, "Chromium has ended"
      self._rest += part
    message, _, self._rest = self._rest.partition(b"\0")
    return dict(json.loads(message))


@contextlib.contextmanager
def open_page(profile: Path) -> Iterator[Page]:
  """Runs Chromium with an empty page until the context ends."""
  path = find()
  assert path is not None
  child_reads, to_browser = os.pipe()
  from_browser, child_writes = os.pipe()
  arguments = [
    path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--remote-debugging-pipe", f"--user-data-dir={profile}", "--window-size=1000,800",
  ]  # fmt: skip
  # Chromium reads messages from the file descriptor 3 and writes answers to 4.
  command = f'exec "$@" 3<&{child_reads} 4>&{child_writes}'
  with (profile.parent / "chromium.log").open("wb") as log:
    process = subprocess.Popen(
      ["bash", "-c", command, "bash", *arguments],
      pass_fds=(child_reads, child_writes),
      stdout=log,
      stderr=log,
    )
  os.close(child_reads)
  os.close(child_writes)
  try:
    yield Page(to_browser, from_browser)
  finally:
    process.terminate()
    process.wait()
    os.close(to_browser)
    os.close(from_browser)
