"""Users of locust that ask ``tlcr serve`` for the rewards of one answer by ids; ``benchmarks/serving.py`` runs them."""

from __future__ import annotations

import os
import random

from locust import FastHttpUser, task

PROMPT, ANSWER = map(int, os.environ["TLCR_LOAD_TOKENS"].split(","))
WAIT = float(os.environ["TLCR_LOAD_WAIT"])


class Trainer(FastHttpUser):
    """Waits a random time after each answer, so that users do not ask in step."""

    def wait_time(self) -> float:
        return random.expovariate(1 / WAIT) if WAIT else 0.0

    @task
    def ask(self) -> None:
        prompt, answer = ([random.randrange(3, 400) for _ in range(length)] for length in (PROMPT, ANSWER))
        body = {"items": [{"prompt_ids": prompt, "response_ids": answer}]}
        with self.client.post("/v1/token_rewards", json=body, catch_response=True) as response:
            if response.status_code != 200 or len(response.json()["data"][0]["rewards"]) != ANSWER:
                response.failure(f"status {response.status_code}")
