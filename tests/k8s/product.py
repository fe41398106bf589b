"""Names the chart uses that the gateway does not have yet, and what they do.

`test_gateway_config.py` takes them out before it loads the rendered configuration with the
gateway's own code, and fails for every name here that the gateway has come to know: delete it then.
"""

from __future__ import annotations

#: Keys of the configuration, as dotted paths.
FUTURE_CONFIG_KEYS = {
    "worker.dns": ["http://workers:30000"],
    "telemetry": {"metrics_port": 9464},
    "http": {"port": 8080},
    "audit.encryption_keys": [{"version": 1, "file": "/etc/vase-sgl/audit-keys/1"}],
}

#: Variables that carry secrets.
FUTURE_VARIABLES = {"VASE_LIMITS__REDIS_URL"}

#: Health services that the probes ask for.
FUTURE_HEALTH_SERVICES = {"readiness", "liveness"}

#: Options of `vase-sgl serve`.
FUTURE_OPTIONS = {"--log-format"}

#: Subcommands of `vase-sgl`.
FUTURE_COMMANDS = {("audit", "migrate")}
