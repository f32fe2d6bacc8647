"""`python bucket.py NAME`: make the tracking server's bucket where it is missing.

MLflow makes none, and the S3 store's image has no client, so this runs in the server's. It takes the server's own
variables: MLFLOW_S3_ENDPOINT_URL and those of boto3.
"""

import os
import sys

import boto3
from botocore.exceptions import ClientError


def make_bucket(name: str) -> None:
    """Make a bucket; one that is there, and ours, is left as it is."""
    client = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"))
    try:
        client.head_bucket(Bucket=name)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        client.create_bucket(Bucket=name)


if __name__ == "__main__":
    make_bucket(sys.argv[1])
