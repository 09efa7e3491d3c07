"""`metadist doctor`: whether a machine or a cluster is fit for runs."""

import json

import click


@click.command()
@click.option("--address", help="A cluster: host:port or auto, or its job server's http://... Default: this machine.")
@click.option("--mlflow", metavar="URI", help="MLflow's tracking URI to try; default MLFLOW_TRACKING_URI.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(address: str | None, mlflow: str | None, as_json: bool) -> int:
    """Check what runs need: versions, token, ports, GPUs, disk, memory, clocks, MLflow; exit code 1 where one fails.

    \b
    metadist doctor
    metadist doctor --address ray-head:6379
    metadist doctor --address http://localhost:8265 --mlflow http://localhost:5000
    """
    from metadist.run.doctor import examine

    found = examine(address, mlflow)
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in found], indent=2))
    else:
        for finding in found:
            where, remedy = f"{finding.node}: " * bool(finding.node), f"; {finding.remedy}" * bool(finding.remedy)
            click.echo(f"{finding.status:4}  {where}{finding.what}{remedy}")
    return int(any(finding.status == "fail" for finding in found))
