"""Nine clients on three slots: right answers, and every slot is freed; `soak.py` runs longer."""

import asyncio

from tests.dga_jax.serving.load import make_jobs, run_clients


def test_every_answer_is_that_of_the_request_alone(server, engine_alone):
  jobs = make_jobs(engine_alone, 12, seed=1)
  tally = asyncio.run(run_clients(server.url, jobs, clients=9, seconds=4, seed=0))
  assert tally.wrong == []
  assert tally.counts["whole"] + tally.counts["stream"] > 0
  assert tally.counts["leaves"] + tally.counts["leaves whole"] > 0
  server.wait_until_idle(60)
  assert server.metric("dga_requests_running") == 0
