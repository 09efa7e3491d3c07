"""The manifests, with the schemas of KubeRay (made strict) and of Kubernetes."""

import copy
import gzip
import json
import shlex

import jsonschema
import kubernetes_validate
import pytest
import yaml

from metadist.config.load import load_config, split_arguments
from tests.cluster.files import CLUSTER, check_ray_start
from tests.conftest import REAL_DATA

FOLDER = CLUSTER / "kuberay"
SCHEMAS = {"raycluster": "rayclusters", "rayjob": "rayjobs"}


def load(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def check(name: str, manifest: dict) -> None:
    file = REAL_DATA / "kuberay" / f"{SCHEMAS[name]}.json.gz"
    if not file.exists():
        pytest.skip(f"no schema in {file}: put KubeRay's there")
    schema = json.loads(gzip.decompress(file.read_bytes()))
    jsonschema.Draft202012Validator(schema).validate(
        manifest
    )  # without a check of the schema itself, which takes seconds


def cluster_of(name: str) -> dict:
    spec = load(name)["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("name", SCHEMAS)
def test_kuberay_accepts_it(name):
    check(name, load(name))


@pytest.mark.parametrize("name", SCHEMAS)
def test_kuberay_refuses_a_key_it_does_not_know(name):
    manifest = load(name)
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    options = spec["autoscalerOptions"]
    options["idleTimeoutSecs"] = options.pop("idleTimeoutSeconds")
    with pytest.raises(jsonschema.ValidationError, match="idleTimeoutSecs"):
        check(name, manifest)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_cluster_grows_by_itself_asks_for_a_token_and_lets_its_pods_end_in_peace(name):
    cluster = cluster_of(name)
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for parameters in (group["rayStartParams"] for group in groups):
        check_ray_start(["ray", "start", *(f"--{key}={value}" for key, value in parameters.items())])
    for pod in (group["template"] for group in groups):
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 150
        assert "restartPolicy" not in pod["spec"]  # the autoscaler's second version refuses another than Never
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
    gpus = [group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for group in groups]
    assert gpus == [None, None, 1]


def test_the_job_is_one_that_metadist_takes_and_a_retry_resumes_it():
    spec = load("rayjob")["spec"]
    program, command, *arguments = shlex.split(spec["entrypoint"])
    assert (program, command, arguments[-2:]) == ("metadist", "train", ["--resume", "auto"])
    inside = [word.replace("/opt/metadist/", f"{CLUSTER.parent}/") for word in arguments[:-2]]
    config = load_config(*split_arguments(inside))
    volume = cluster_of("rayjob")["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]
    assert config.run_dir.startswith(volume["mountPath"] + "/")
    assert spec["backoffLimit"] > 0 and spec["submissionMode"] == "SidecarMode"
    assert {"submitterPodTemplate", "submitterConfig", "clusterSelector"}.isdisjoint(spec)  # which that mode refuses


COMMON = list(yaml.safe_load_all((FOLDER / "common.yaml").read_text()))


@pytest.mark.parametrize("manifest", COMMON, ids=lambda manifest: manifest["kind"])
def test_kubernetes_accepts_it_and_refuses_a_key_it_does_not_know(manifest):
    kubernetes_validate.validate(manifest, "1.30", strict=True)
    broken = copy.deepcopy(manifest)
    broken["spec"]["podSelektor"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="podSelektor"):
        kubernetes_validate.validate(broken, "1.30", strict=True)


def test_what_the_clusters_refer_to_is_there():
    claim, policy = COMMON
    for name in SCHEMAS:
        cluster = cluster_of(name)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = group["template"]
            assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
            assert pod["metadata"]["labels"].items() >= policy["spec"]["podSelector"]["matchLabels"].items()
