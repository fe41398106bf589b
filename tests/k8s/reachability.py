"""What a set of NetworkPolicies lets through, by the rules of networking.k8s.io/v1."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping
from typing import Any

from tests.k8s.chart import NAMESPACE, Rendered


@dataclasses.dataclass(frozen=True)
class Peer:
    """A pod in a namespace, or an address outside of the cluster."""

    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    namespace: str = NAMESPACE
    namespace_labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    address: str | None = None


def allowed(
    rendered: Rendered, source: Peer, target: Peer, port: int, protocol: str = "TCP"
) -> bool:
    """Whether `source` may open a connection to `port` of `target`."""
    return _way(rendered, "egress", source, target, port, protocol) and _way(
        rendered, "ingress", target, source, port, protocol
    )


def _way(
    rendered: Rendered, direction: str, pod: Peer, other: Peer, port: int, protocol: str
) -> bool:
    policies = [
        policy["spec"]
        for policy in rendered.of("NetworkPolicy")
        if pod.address is None
        and pod.namespace == NAMESPACE
        and _selects(policy["spec"]["podSelector"], pod.labels)
        and direction.capitalize() in policy["spec"]["policyTypes"]
    ]
    if not policies:
        return True  # nothing isolates it
    side = "to" if direction == "egress" else "from"
    return any(
        (not rule.get(side) or any(_matches(peer, other) for peer in rule[side]))
        and (not rule.get("ports") or _port(rule["ports"], port, protocol))
        for policy in policies
        for rule in policy.get(direction) or []
    )


def _port(ports: list[dict[str, Any]], port: int, protocol: str) -> bool:
    return any(p["port"] == port and p.get("protocol", "TCP") == protocol for p in ports)


def _matches(peer: dict[str, Any], other: Peer) -> bool:
    if "ipBlock" in peer:
        if other.address is None:
            return False
        address = ipaddress.ip_address(other.address)
        inside = address in ipaddress.ip_network(peer["ipBlock"]["cidr"])
        return inside and not any(
            address in ipaddress.ip_network(block) for block in peer["ipBlock"].get("except", [])
        )
    if other.address is not None:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": other.namespace, **other.namespace_labels}
        if not _selects(peer["namespaceSelector"], labels):
            return False
    elif other.namespace != NAMESPACE:
        return False
    return "podSelector" not in peer or _selects(peer["podSelector"], other.labels)


def _selects(selector: dict[str, Any], labels: Mapping[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "matchExpressions are not evaluated here"
    return (selector.get("matchLabels") or {}).items() <= labels.items()
