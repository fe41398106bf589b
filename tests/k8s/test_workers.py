"""Worker groups: what each value changes in the StatefulSet, the arguments and the volumes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest

from tests.k8s.chart import POSTGRESQL, PROFILES, Rendered, Values, render
from vase_sgl.engine.config import EngineConfig
from vase_sgl.engine.server import complete_argv, value_of


def arguments(rendered: Rendered, name: str = "-worker") -> list[str]:
    args: list[str] = rendered.worker(name)["args"]
    assert args[0] == "worker"
    return args[1:]


def test_stateful_set_and_headless_service_belong_together() -> None:
    rendered = render()
    workers, service = rendered.one("StatefulSet"), rendered.one("Service", "-worker")
    assert workers["spec"]["serviceName"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    labels = workers["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert workers["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["ports"][0]["targetPort"] == rendered.worker()["ports"][0]["name"]


def test_worker_command_accepts_the_arguments() -> None:
    """Read by the worker's own code: the port it checks, the model it looks for."""
    rendered = render({"worker.port": 31000}, profile="h100")
    argv = complete_argv(arguments(rendered), cpu=False)
    assert value_of(argv, "--model-path") == "Qwen/Qwen3-14B"
    assert (
        value_of(argv, "--port") == "31000" == str(rendered.worker()["ports"][0]["containerPort"])
    )
    assert value_of(argv, "--host") == "0.0.0.0"


@pytest.mark.parametrize("profile", PROFILES)
def test_streams_carry_what_is_new(profile: str) -> None:
    """With all of an answer in each event, long ones would cost the square of their length."""
    rendered = render({"canary.enabled": True}, profile=profile)
    for name in ("-worker", "-worker-canary"):
        assert "--incremental-streaming-output" in arguments(rendered, name)


def test_default_eviction_is_one_the_engine_accepts() -> None:
    default = value_of(arguments(render(profile="h100")), "--vase-default")
    assert default is not None
    config = EngineConfig.from_env(
        {"VASE_DEFAULT": default, "VASE_MAX_BUDGET": "8192", "VASE_MAX_WINDOW": "64"}
    )
    assert config.default == {"budget": 2048, "window": 64, "policy": "vase-attnv"}


def test_every_flag_is_one_of_sglang_or_the_worker() -> None:
    rendered = render(
        {
            "worker.multiNode.enabled": True,
            "worker.tensorParallelSize": 4,
            "worker.pipelineParallelSize": 2,
            "worker.contextLength": 32768,
            "model.servedName": "m",
        },
        profile="h100",
    )
    given = (*arguments(rendered), *arguments(render(TestTls.VALUES)))
    flags = {re.split("=", argument)[0] for argument in given}
    assert len(flags) >= 18
    sglang = importlib.util.find_spec("sglang")  # not imported: that takes seconds
    assert sglang is not None and sglang.origin is not None
    fields = Path(sglang.origin).parent / "srt" / "arg_groups" / "fields"
    source = "\n".join(path.read_text(encoding="utf-8") for path in fields.glob("*.py"))
    for flag in flags:
        if not flag.startswith("--vase-"):
            field = flag.removeprefix("--").replace("-", "_")
            assert f'"{flag}"' in source or re.search(rf"^    {field}: A\[", source, re.M), flag


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"worker.tensorParallelSize": 2}, "--tp-size=2"),
        ({"worker.attentionBackend": "fa3"}, "--attention-backend=fa3"),
        ({"worker.contextLength": 1000000}, "--context-length=1000000"),
        ({"worker.maxRunningRequests": 64}, "--max-running-requests=64"),
        ({"worker.memFractionStatic": 0.8}, "--mem-fraction-static=0.8"),
        ({"worker.eviction.maxBudget": 1048576}, "--vase-max-budget=1048576"),
        ({"worker.eviction.maxWindow": 128}, "--vase-max-window=128"),
        ({"worker.eviction.default": {"budget": 1048576}}, '--vase-default={"budget":1048576}'),
        ({"worker.extraArgs": ["--log-requests"]}, "--log-requests"),
        ({"model.servedName": "qwen"}, "--served-model-name=qwen"),
        ({"worker.deterministic": True}, "--enable-deterministic-inference"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_value_becomes_a_flag(values: Values, flag: str) -> None:
    assert flag in arguments(render({"worker.deterministic": False, **values}))
    if values != {"worker.deterministic": True}:
        assert flag.split("=")[0] not in " ".join(arguments(render()))


def test_gpus_follow_from_the_parallel_sizes() -> None:
    resources = render({"worker.tensorParallelSize": 4}).worker()["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "4"
    split = render({"worker.tensorParallelSize": 16, "worker.multiNode.enabled": True})
    assert split.worker()["resources"]["limits"]["nvidia.com/gpu"] == "8"
    other = render({"worker.gpu.resource": "amd.com/gpu"}).worker()["resources"]
    assert "nvidia.com/gpu" not in other["limits"] and other["limits"]["amd.com/gpu"] == "1"
    assert set(render(profile="cpu-demo").worker()["resources"]["limits"]) == {"cpu", "memory"}


def test_gpu_nodes_are_chosen_and_shared_out() -> None:
    pod = render(profile="h100").worker_pod()
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod[
        "tolerations"
    ]
    spread = pod["topologySpreadConstraints"]
    assert [s["topologyKey"] for s in spread] == [
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    ]
    labels = render(profile="h100").one("StatefulSet")["spec"]["template"]["metadata"]["labels"]
    for constraint in spread:
        assert constraint["labelSelector"]["matchLabels"].items() <= labels.items()
    demo = render(profile="cpu-demo").worker_pod()
    assert "tolerations" not in demo and "nodeSelector" not in demo


def test_shared_memory_is_memory() -> None:
    pod = render({"worker.shmSize": "32Gi"}).worker_pod()
    (shm,) = (volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


@pytest.mark.parametrize(
    ("values", "source"),
    [
        ({}, {"persistentVolumeClaim": {"claimName": "r-vase-sgl-models"}}),
        (
            {"model.cache.pvc.existingClaim": "weights"},
            {"persistentVolumeClaim": {"claimName": "weights"}},
        ),
        (
            {"model.cache.type": "hostPath"},
            {"hostPath": {"path": "/var/lib/models", "type": "Directory"}},
        ),
        (
            {
                "model.cache.type": "image",
                "model.cache.image.reference": "x/qwen:1",
                "model.download": False,
            },
            {"image": {"reference": "x/qwen:1", "pullPolicy": "IfNotPresent"}},
        ),
        ({"model.cache.type": "emptyDir"}, {"emptyDir": {"sizeLimit": "50Gi"}}),
    ],
    ids=["made claim", "existing claim", "host path", "image", "empty dir"],
)
def test_model_cache(values: Values, source: dict[str, object]) -> None:
    rendered = render(values)
    (volume,) = (v for v in rendered.worker_pod()["volumes"] if v["name"] == "models")
    assert volume == {"name": "models", **source}
    makes_claim = "-models" in rendered.names("PersistentVolumeClaim")
    assert makes_claim == (
        source.get("persistentVolumeClaim") == {"claimName": "r-vase-sgl-models"}
    )


def test_without_download_the_cache_is_read_only_and_the_hub_is_off() -> None:
    def facts(rendered: Rendered) -> tuple[bool, dict[str, str]]:
        worker = rendered.worker()
        (mount,) = (m for m in worker["volumeMounts"] if m["name"] == "models")
        return mount.get("readOnly", False), {e["name"]: e.get("value", "") for e in worker["env"]}

    read_only, variables = facts(render({"model.download": False, "model.path": "/models/q"}))
    assert read_only and variables["HF_HUB_OFFLINE"] == "1" and "HF_HOME" not in variables
    assert variables["HF_HUB_CACHE"] == "/models/huggingface/hub"  # where HF_HOME below puts it
    read_only, variables = facts(render())
    assert not read_only and variables["HF_HOME"] == "/models/huggingface"
    assert "HF_HUB_OFFLINE" not in variables


def test_hub_token_is_a_reference() -> None:
    env = render({"model.tokenSecret.name": "hub"}).worker()["env"]
    assert {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}},
    } in env
    assert "HF_TOKEN" not in {e["name"] for e in render().worker()["env"]}


def test_gateways_know_the_key_of_the_workers() -> None:
    reference = {
        "name": "VASE_WORKER__API_KEY",
        "valueFrom": {"secretKeyRef": {"name": "worker-key", "key": "api-key"}},
    }
    rendered = render({"worker.apiKeySecret.name": "worker-key"})
    assert reference in rendered.worker()["env"] and reference in rendered.gateway()["env"]
    for container in (render().worker(), render().gateway()):
        assert reference["name"] not in {e["name"] for e in container["env"]}


class TestTls:
    VALUES: ClassVar[Values] = {
        "worker.tls.existingSecret": "worker-tls",
        "gateway.workerDiscovery": "list",
        "canary.enabled": True,
    }

    def test_workers_show_the_secrets_certificate(self) -> None:
        rendered = render(self.VALUES)
        for name in ("-worker", "-worker-canary"):
            worker, pod = rendered.worker(name), rendered.worker_pod(name)
            files = dict(a.split("=", 1) for a in worker["args"] if a.startswith("--ssl-"))
            assert set(files) == {"--ssl-certfile", "--ssl-keyfile"}
            (mount,) = (m for m in worker["volumeMounts"] if m["name"] == "tls")
            assert {Path(f).parent for f in files.values()} == {Path(mount["mountPath"])}
            assert {Path(f).name for f in files.values()} == {"tls.crt", "tls.key"}
            (volume,) = (v for v in pod["volumes"] if v["name"] == "tls")
            assert volume["secret"]["secretName"] == "worker-tls"
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert worker[probe]["httpGet"]["scheme"] == "HTTPS"

    def test_gateways_ask_for_a_certificate_of_its_authority(self) -> None:
        rendered = render(self.VALUES)
        config = rendered.gateway_config()["worker"]
        assert config["urls"] == [
            "https://r-vase-sgl-worker-0.r-vase-sgl-worker.ns.svc:30000",
            "https://r-vase-sgl-worker-canary-0.r-vase-sgl-worker-canary.ns.svc:30000",
        ]
        (mount,) = (m for m in rendered.gateway()["volumeMounts"] if m["name"] == "worker-ca")
        assert Path(config["ca_file"]).parent == Path(mount["mountPath"])
        (volume,) = (v for v in rendered.gateway_pod()["volumes"] if v["name"] == "worker-ca")
        # Not the workers' private key.
        assert [item["key"] for item in volume["secret"]["items"]] == ["ca.crt"]

    def test_prometheus_asks_for_it_by_a_name_that_gateways_ask_for(self) -> None:
        rendered = render({**self.VALUES, "monitoring.podMonitor.enabled": True})
        (endpoint,) = rendered.one("PodMonitor")["spec"]["podMetricsEndpoints"]
        assert endpoint["scheme"] == "https"
        assert endpoint["tlsConfig"]["ca"]["secret"] == {"name": "worker-tls", "key": "ca.crt"}
        urls = rendered.gateway_config()["worker"]["urls"]
        assert endpoint["tlsConfig"]["serverName"] == urlsplit(urls[0]).hostname

    def test_is_off_by_default(self) -> None:
        rendered = render({"monitoring.podMonitor.enabled": True})
        assert not any("--ssl" in argument for argument in arguments(rendered))
        (endpoint,) = rendered.one("PodMonitor")["spec"]["podMetricsEndpoints"]
        assert "scheme" not in endpoint and "tlsConfig" not in endpoint
        assert "ca_file" not in rendered.gateway_config()["worker"]


def test_a_hung_worker_is_killed_without_a_drain() -> None:
    values = {"worker.drain.preStopSeconds": 40, "worker.drain.timeoutSeconds": 900}
    rendered = render(values)
    worker = rendered.worker()
    for probe in ("startupProbe", "livenessProbe"):
        # Time for the preStop hook, and no more than a little beyond it.
        assert 40 < worker[probe]["terminationGracePeriodSeconds"] <= 70
    assert "terminationGracePeriodSeconds" not in worker["readinessProbe"]
    assert rendered.worker_pod()["terminationGracePeriodSeconds"] >= 940


def test_further_volumes() -> None:
    volume = {"name": "ca", "configMap": {"name": "company-ca"}}
    mount = {"name": "ca", "mountPath": "/etc/company", "readOnly": True}
    values: Values = {**POSTGRESQL}
    for part in ("worker", "gateway"):
        values |= {f"{part}.volumes": [volume], f"{part}.volumeMounts": [mount]}
    pods = dict(render(values).pods())
    for name in ("-worker", "-gateway", "-migrate"):
        pod = pods[f"r-vase-sgl{name}"]
        assert volume in pod["volumes"] and mount in pod["containers"][0]["volumeMounts"]


def test_startup_probe_lasts_as_long_as_a_load() -> None:
    probe = render({"worker.startup.timeoutSeconds": 1805}).worker()["startupProbe"]
    assert probe["httpGet"] == {"path": "/health", "port": "http"}
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1805
    for name in ("readinessProbe", "livenessProbe"):
        # SGLang takes up to 20 s before it calls itself unhealthy.
        assert render().worker()[name]["timeoutSeconds"] > 20


def test_termination_leaves_time_to_drain() -> None:
    rendered = render({"worker.drain.preStopSeconds": 7, "worker.drain.timeoutSeconds": 100})
    assert rendered.worker()["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert rendered.worker_pod()["terminationGracePeriodSeconds"] >= 107


def test_integrity_check_is_a_variable() -> None:
    variable = {"name": "VASE_CHECK_INTEGRITY", "value": "1"}
    checked = render({"worker.checkIntegrity": True}).worker()
    assert variable in checked["env"]
    log = next(v["value"] for v in checked["env"] if v["name"] == "VASE_INTEGRITY_LOG")
    mounts = {mount["mountPath"] for mount in checked["volumeMounts"]}
    assert str(Path(log).parent) in mounts, "a restarted container would not find it"
    names = {v["name"] for v in render().worker()["env"]}
    assert not names & {"VASE_CHECK_INTEGRITY", "VASE_INTEGRITY_LOG"}


def test_staged_update() -> None:
    strategy = render({"worker.updatePartition": 3}).one("StatefulSet")["spec"]["updateStrategy"]
    assert strategy["rollingUpdate"] == {"partition": 3}


def test_names_leave_room_for_what_kubernetes_adds() -> None:
    """A label of every pod is the StatefulSet's name, a dash and up to ten digits."""
    long: Values = {"fullnameOverride": "x" * 60, "canary.enabled": True}
    for manifest in render(long).of("StatefulSet"):
        assert len(manifest["metadata"]["name"]) + 11 <= 63


def test_a_worker_stays_until_gateways_know_the_next() -> None:
    assert render().one("StatefulSet", "-worker")["spec"]["minReadySeconds"] > 10


def test_a_new_chart_version_alone_restarts_no_worker() -> None:
    labels = render().one("StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(labels)


def test_disruption_budget() -> None:
    rendered = render({"worker.podDisruptionBudget.maxUnavailable": "20%", "canary.enabled": True})
    assert rendered.names("PodDisruptionBudget") == {"-worker", "-worker-canary"}
    spec = rendered.one("PodDisruptionBudget", "-worker")["spec"]
    assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"  # what is broken holds no node up
    assert spec["maxUnavailable"] == "20%"
    assert spec["selector"]["matchLabels"]["vase-sgl/track"] == "stable"
    assert not render({"worker.podDisruptionBudget.enabled": False}).of("PodDisruptionBudget")


def test_inspection_has_a_folder_and_the_gateways_consent() -> None:
    """Refused by a worker: a folder that is not there or cannot be written."""
    rendered = render({"worker.inspect.enabled": True, "worker.inspect.sizeLimit": "2Gi"})
    (folder,) = (a.partition("=")[2] for a in arguments(rendered) if "--vase-inspect-dir" in a)
    worker = rendered.worker()
    (mount,) = (m for m in worker["volumeMounts"] if m["mountPath"] == folder)
    template = rendered.one("StatefulSet")["spec"]["template"]["spec"]
    (volume,) = (v for v in template["volumes"] if v["name"] == mount["name"])
    assert volume["emptyDir"] == {"sizeLimit": "2Gi"} and not mount.get("readOnly")
    assert rendered.gateway_config()["allow_inspect"] is True
    assert "allow_inspect" not in render().gateway_config()
    assert not any("inspect" in argument for argument in arguments(render()))


def test_values_of_an_older_chart_render() -> None:
    """`helm upgrade --reuse-values` brings them: without the keys that came since."""
    newer: tuple[str, ...] = ("worker.inspect", "worker.tls", "canary.clients")
    newer += ("worker.autoscaling.keda.authModes", "networkPolicy.dns.egress")
    newer += ("monitoring.rules.failedRatio",)
    newer += tuple(
        f"{p}.{key}" for p in ("worker", "gateway") for key in ("volumes", "volumeMounts")
    )
    values: Values = {**POSTGRESQL, "canary.enabled": True, "worker.autoscaling.mode": "keda"}
    values |= {f"monitoring.{part}.enabled": True for part in ("podMonitor", "rules")}
    rendered = render({**values, **dict.fromkeys(newer)})
    assert rendered == render(values)


@pytest.mark.parametrize("name", ["HF_HOME", "HF_HUB_CACHE"])
def test_a_cache_that_is_named_is_left_alone(name: str) -> None:
    env = [{"name": name, "value": "/models/hf"}]
    worker = render({"model.download": False, "worker.env": env}).worker()
    assert [v for v in worker["env"] if v["name"] in ("HF_HOME", "HF_HUB_CACHE")] == env


class TestCanary:
    VALUES: ClassVar[Values] = {
        "canary.enabled": True,
        "canary.inRotation": False,
        "canary.replicas": 2,
        "canary.image.tag": "0.2.0",
        "canary.extraArgs": ["--log-requests"],
        "canary.evictionDefault": {"budget": 1024},
        "canary.checkIntegrity": True,
        "worker.replicas": 5,
        "worker.extraArgs": ["--enable-p2p-check"],
        "worker.eviction.default": {"budget": 2048},
    }

    def test_is_off_by_default(self) -> None:
        assert render().names("StatefulSet") == {"-worker"}

    def test_differs_only_in_what_is_set(self) -> None:
        rendered = render(self.VALUES)
        stable, canary = rendered.worker(), rendered.worker("-worker-canary")
        assert canary["image"] == "vase-sgl-worker-gpu:0.2.0"
        assert stable["image"] == "vase-sgl-worker-gpu:0.1.0"
        assert rendered.one("StatefulSet", "-worker-canary")["spec"]["replicas"] == 2
        changed = set(arguments(rendered, "-worker-canary")) ^ set(arguments(rendered))
        assert changed == {
            "--log-requests",
            f"--vase-default={json.dumps({'budget': 1024}, separators=(',', ':'))}",
            f"--vase-default={json.dumps({'budget': 2048}, separators=(',', ':'))}",
        }
        assert canary["resources"] == stable["resources"]
        assert canary["startupProbe"] == stable["startupProbe"]

    def test_has_its_own_label_and_service(self) -> None:
        rendered = render(self.VALUES)
        for name, track in (("-worker", "stable"), ("-worker-canary", "canary")):
            selector = rendered.one("Service", name)["spec"]["selector"]
            assert selector["vase-sgl/track"] == track
            template = rendered.one("StatefulSet", name)["spec"]["template"]
            assert template["metadata"]["labels"]["vase-sgl/track"] == track

    def test_digest_replaces_the_tag(self) -> None:
        digest = "sha256:" + "0" * 64
        rendered = render({**self.VALUES, "canary.image.digest": digest})
        assert rendered.worker("-worker-canary")["image"] == f"vase-sgl-worker-gpu@{digest}"

    def test_a_tag_beats_the_other_workers_digest(self) -> None:
        rendered = render({**self.VALUES, "worker.image.digest": "sha256:" + "0" * 64})
        assert rendered.worker("-worker-canary")["image"] == "vase-sgl-worker-gpu:0.2.0"

    def test_is_never_scaled(self) -> None:
        rendered = render({**self.VALUES, "worker.autoscaling.mode": "keda"})
        assert rendered.one("StatefulSet", "-worker-canary")["spec"]["replicas"] == 2
        assert "replicas" not in rendered.one("StatefulSet", "-worker")["spec"]


class TestMultiNode:
    VALUES: ClassVar[Values] = {
        "worker.multiNode.enabled": True,
        "worker.multiNode.nodes": 2,
        "worker.tensorParallelSize": 16,
        "worker.replicas": 3,
    }

    def test_replaces_the_stateful_set(self) -> None:
        rendered = render(self.VALUES)
        assert not rendered.of("StatefulSet")
        spec = rendered.one("LeaderWorkerSet", "-worker")["spec"]
        assert spec["replicas"] == 3
        assert spec["leaderWorkerTemplate"]["size"] == 2
        assert not render().of("LeaderWorkerSet")

    def test_ranks_meet_at_the_leader(self) -> None:
        args = arguments(render(self.VALUES))
        assert "--nnodes=$(LWS_GROUP_SIZE)" in args
        assert "--node-rank=$(LWS_WORKER_INDEX)" in args
        assert "--dist-init-addr=$(LWS_LEADER_ADDRESS):20000" in args
        assert "--tp-size=16" in args
        assert "--nnodes" not in " ".join(arguments(render()))

    def test_the_service_holds_leaders_only(self) -> None:
        """The operator makes a headless Service of the set's own name, with every rank in it."""
        rendered = render(self.VALUES)
        assert rendered.names("Service") == {"-gateway", "-gateway-metrics", "-worker-leaders"}
        selector = rendered.one("Service", "-worker-leaders")["spec"]["selector"]
        assert selector["leaderworkerset.sigs.k8s.io/worker-index"] == "0"

    def test_gateway_calls_the_leaders(self) -> None:
        worker = render(self.VALUES).gateway_config()["worker"]
        assert worker["dns"] == ["http://r-vase-sgl-worker-leaders.ns.svc:30000"]
        listed = render({**self.VALUES, "gateway.workerDiscovery": "list"}).gateway_config()
        third = listed["worker"]["urls"][2]
        assert third == "http://r-vase-sgl-worker-2.r-vase-sgl-worker.ns.svc:30000"
