"""Serves the pipeline on a schedule: `python -m flows.deployments --cron "0 2 * * *"`.

Needs a running server (`prefect server start`) and its address in `PREFECT_API_URL`.
"""

import argparse
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.schedules import Cron
from prefect.settings import PREFECT_API_URL

from flows.pipeline import pipeline


def main(argv: list[str] | None = None) -> None:
    """Serves the flow until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cron", default="0 2 * * *", help="five fields (default: %(default)s)")
    parser.add_argument("--timezone", default="UTC", help="IANA name (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        schedule = Cron(args.cron, timezone=ZoneInfo(args.timezone).key)
    except (ValueError, ZoneInfoNotFoundError) as error:
        parser.error(f"--cron or --timezone: {error}")
    if not PREFECT_API_URL.value():
        # The temporary server that Prefect starts by itself never creates scheduled runs.
        parser.error("PREFECT_API_URL is not set: start `prefect server start` and set it")
    pipeline.serve(
        name="scheduled",
        schedule=schedule,
        # A run that finds another one at work would only repeat it.
        global_limit=ConcurrencyLimitConfig(
            limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
        ),
    )


if __name__ == "__main__":
    main()
