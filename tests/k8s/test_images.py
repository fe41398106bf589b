"""The container images: linted, not root, nothing secret, the same installation as `make setup`.

No container engine is needed. VASE_TEST_IMAGES=1 also runs the installations of the gateway's and
the load tests' images in a virtual environment, from the files the build would get (a minute each,
from the package index).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.k8s.chart import ROOT, render

IMAGES = ROOT / "k8s" / "images"
SERVERS = ("gateway", "worker-gpu", "worker-cpu")
NAMES = (*SERVERS, "loadtest")


def dockerfile(name: str) -> str:
    return (IMAGES / f"{name}.Dockerfile").read_text(encoding="utf-8")


def instructions(name: str) -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined, comments dropped."""
    lines = [line for line in dockerfile(name).splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(word, re.sub(r"\s+", " ", rest)) for word, rest in found]


def final_stage(name: str) -> list[tuple[str, str]]:
    every = instructions(name)
    last = max(i for i, (word, _) in enumerate(every) if word == "FROM")
    return every[last:]


def pip_installs(commands: str) -> list[list[str]]:
    """Arguments of every `pip install` among shell commands."""
    found = [shlex.split(part) for part in re.split(r"&&|\|\||;", commands)]
    return [words[2:] for words in found if words[:2] == ["pip", "install"]]


@pytest.mark.parametrize("name", NAMES)
def test_hadolint(name: str) -> None:
    tool = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [tool, "--no-color", IMAGES / f"{name}.Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_two_stages_from_one_pinned_base(name: str) -> None:
    froms = [rest for word, rest in instructions(name) if word == "FROM"]
    bases = {rest.split()[0] for rest in froms}
    assert len(froms) == 2 and len(bases) == 1
    (argument,) = (rest for word, rest in instructions(name) if word == "ARG" and "IMAGE" in rest)
    variable, _, image = argument.partition("=")
    assert bases == {f"${{{variable}}}"}
    # A full version, and room for a digest.
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+", image), image


@pytest.mark.parametrize("name", NAMES)
def test_final_stage_runs_as_the_charts_user(name: str) -> None:
    stage = dict(final_stage(name))
    security = render().gateway_pod()["securityContext"]
    assert stage["USER"] == f"{security['runAsUser']}:{security['runAsGroup']}"
    program = ["vase-sgl"] if name in SERVERS else ["python", "-m", "loadtest"]
    assert json.loads(stage["ENTRYPOINT"]) == ["tini", "--", *program]
    assert ("--timeout" in stage["HEALTHCHECK"]) == (name in SERVERS)
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in stage["LABEL"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_secret_goes_in(name: str) -> None:
    for word, rest in instructions(name):
        if word in ("ARG", "ENV", "LABEL"):
            assert not re.search(r"(?i)token|password|secret|_key\b", rest), rest
        assert word != "ADD"
    copies = [rest for word, rest in final_stage(name) if word == "COPY"]
    assert copies == ["--from=build /opt/vase-sgl /opt/vase-sgl"]


@pytest.mark.parametrize("name", ["worker-cpu", "loadtest"])
def test_what_pip_did_not_write_may_be_read_by_the_images_user(name: str) -> None:
    """Weights are written for their owner alone, and a checkout may be so."""
    copied = {"worker-cpu": "/opt/vase-sgl/models", "loadtest": "/opt/vase-sgl/loadtest"}[name]
    (run,) = (rest for word, rest in instructions(name) if word == "RUN" and copied in rest)
    assert run.rindex(f"chmod -R a+rX {copied}") > run.index(copied)


def test_there_is_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chart = yaml.safe_load((ROOT / "k8s/vase-sgl/Chart.yaml").read_text(encoding="utf-8"))
    images = [
        rest for name in NAMES for word, rest in instructions(name) if rest.startswith("VERSION=")
    ]
    assert {chart["appVersion"], *(rest.partition("=")[2] for rest in images)} == {
        project["version"]
    }


def test_the_lock_is_whole_for_every_python_that_sglang_is_built_for() -> None:
    """It is installed without its own dependencies."""
    lines = (ROOT / "requirements-cpu.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for python in ("3.11.0", "3.11.14", "3.12.0", "3.13.0"):
        environment = {"python_full_version": python, "python_version": python[:4]}
        locked = {
            canonicalize_name(pin.name)
            for pin in pins
            if pin.marker is None or pin.marker.evaluate(environment)
        }
        for name in ("aiohttp", "redis", "sqlalchemy", "grpcio", "pydantic", "alembic", "asyncpg"):
            for line in importlib.metadata.requires(name) or ():
                wanted = Requirement(line)
                if wanted.marker is None or wanted.marker.evaluate(environment | {"extra": ""}):
                    assert canonicalize_name(wanted.name) in locked, (python, name, line)


@pytest.mark.parametrize("name", SERVERS)
def test_chart_passes_arguments_to_the_entrypoint(name: str) -> None:
    """The chart sets `args` alone, so that tini stays the first process."""
    rendered = render()
    container = rendered.gateway() if name == "gateway" else rendered.worker()
    assert "command" not in container
    assert container["args"][0] == dict(final_stage(name))["CMD"].split('"')[1]


def test_the_load_tests_job_runs_their_image() -> None:
    _, job = yaml.safe_load_all((ROOT / "loadtest/k8s/job.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "command" not in container
    assert container["args"] == ["--config", "/etc/loadtest/loadtest.conf"]
    stage = dict(final_stage("loadtest"))
    user = (pod["securityContext"][key] for key in ("runAsUser", "runAsGroup"))
    assert stage["USER"] == ":".join(map(str, user))
    image = container["image"].rpartition("/")[2]
    assert f" -t {image} " in dockerfile("loadtest")


def test_cpu_worker_installs_what_make_setup_does() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = [shlex.split(call) for call in re.findall(r"\$\(call pip_install,(.*)\)", makefile)]
    runs = " && ".join(rest for word, rest in instructions("worker-cpu") if word == "RUN")
    # In the image the project itself is not editable; that is the one difference.
    made = [[w for w in words if w != "-e"] for words in wanted]
    assert pip_installs(runs) == made
    assert ["--no-deps", "-e", "."] in wanted and len(wanted) == 3


@pytest.mark.parametrize("name", ["gateway", "loadtest"])
def test_gateway_and_load_tests_bring_neither_torch_nor_sglang(name: str) -> None:
    runs = " && ".join(rest for word, rest in instructions(name) if word == "RUN")
    assert pip_installs(runs) == [["--constraint", "requirements-cpu.txt", f".[{name}]"]]


@pytest.mark.parametrize(
    ("constraints", "extra"),
    [
        ("requirements-cpu.txt", "gateway"),
        ("requirements-cpu.txt", "loadtest"),
        ("k8s/images/constraints-gpu.txt", "gpu"),
    ],
)
def test_constraints_fit_the_projects_requirements(constraints: str, extra: str) -> None:
    pins = {
        canonicalize_name(name): version
        for name, version in re.findall(
            r"^([\w.-]+)==(\S+)", (ROOT / constraints).read_text(), re.M
        )
    }
    for requirement in requirements_of(extra):
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"{requirement.name}: run `make gpu-constraints`"
        assert requirement.specifier.contains(pinned), f"{requirement} is not {pinned}"


def requirements_of(extra: str) -> Iterator[Requirement]:
    """Requirements of one of the project's extras, and of those it includes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in project["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            for included in requirement.extras:
                yield from requirements_of(included)
        else:
            yield requirement


def test_gpu_worker_brings_sglang_as_published() -> None:
    runs = " && ".join(rest for word, rest in instructions("worker-gpu") if word == "RUN")
    assert pip_installs(runs) == [["--constraint", "k8s/images/constraints-gpu.txt", ".[gpu]"]]


def test_demo_profile_names_the_model_in_the_image() -> None:
    target = next(
        words[-1]
        for word, rest in instructions("worker-cpu")
        if word == "RUN"
        for words in (shlex.split(part) for part in rest.split("&&"))
        if words[0] == "mv"
    )
    assert f"--model-path={target}" in render(profile="cpu-demo").worker()["args"]
    mount = next(
        m for m in render(profile="cpu-demo").worker()["volumeMounts"] if m["name"] == "models"
    )
    assert not target.startswith(mount["mountPath"])  # a volume there would hide it


def test_build_context_is_what_the_images_install(tmp_path: Path) -> None:
    files = {path.relative_to(tmp_path) for path in build_context(tmp_path) if path.is_file()}
    top = {path.parts[0] for path in files}
    assert top == {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "requirements-cpu.txt",
        "kernels",
        "loadtest",
        "vase_sgl",
        "k8s",
    }
    assert {p.name for p in files if p.parts[0] == "k8s"} == {
        "constraints-gpu.txt",
        "vase_grpc_health.py",
    }
    assert not [path for path in files if "__pycache__" in path.parts]


@pytest.mark.skipif(
    os.environ.get("VASE_TEST_IMAGES") != "1", reason="set VASE_TEST_IMAGES=1: installs packages"
)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["gateway", "loadtest"])
def test_image_installs(name: str, tmp_path: Path) -> None:
    source, target = tmp_path / "src", tmp_path / "venv"
    source.mkdir()
    build_context(source)
    subprocess.run([sys.executable, "-m", "venv", target], check=True)
    (run,) = (
        rest
        for word, rest in instructions(name)
        if word == "RUN" and rest.startswith("pip install")
    )
    environment = {**os.environ, "PATH": f"{target}/bin:{os.environ['PATH']}", "PYTHONPATH": ""}
    command = run.replace("/opt/vase-sgl", str(target))
    subprocess.run(["sh", "-euc", command], cwd=source, env=environment, check=True)
    python = target / "bin" / "python"
    heavy = "import importlib.util as u; print([n for n in ('torch', 'sglang') if u.find_spec(n)])"
    done = subprocess.run([python, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    if name == "gateway":
        health = [target / "bin" / "vase-grpc-health", "--target=127.0.0.1:1"]
        assert subprocess.run(health, check=False, env=environment).returncode == 2
    else:  # in the image's working directory; nobody answers
        test = [python, "-m", "loadtest", "--headless", "--host=127.0.0.1:1"]
        environment["VASE_API_KEY"] = "none"
        assert subprocess.run(test, check=False, env=environment, cwd=target).returncode == 2


def build_context(target: Path) -> list[Path]:
    """Copy what .dockerignore lets through, by its rules: the last pattern that fits decides."""
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert patterns[0] == "*"
    for pattern in (p.removeprefix("!") for p in patterns if p.startswith("!")):
        source = ROOT / pattern
        assert source.exists(), f".dockerignore names {pattern}, which is not there"
        (target / pattern).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target / pattern, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / pattern)
    assert [p for p in patterns if p != "*" and not p.startswith("!")] == ["**/__pycache__"]
    return list(target.rglob("*"))
