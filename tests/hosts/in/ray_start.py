"""``ray start``, with every port given to the raylet, also that of the dashboard's agent, which Ray forgets.

For a port that it was not given the raylet waits 15 s until the agent has written it to a file, and then kills itself
(ray-project/ray#65983). On a busy machine the agent has not imported its modules by then.
"""

from __future__ import annotations

import sys
from typing import Any

from ray._private import services
from ray.scripts.scripts import main

(PORT,) = (word.partition("=")[2] for word in sys.argv if word.startswith("--dashboard-agent-listen-port="))
theirs = services.start_ray_process


def start_ray_process(command: list[str], process_type: str, *args: Any, **kwargs: Any) -> Any:
    """Ray's own, with a word more for the raylet."""
    if process_type == "raylet":
        command = [*command, f"--dashboard_agent_listen_port={PORT}"]
    return theirs(command, process_type, *args, **kwargs)


services.start_ray_process = start_ray_process
main()
