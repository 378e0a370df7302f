"""Send images to a running service, and print classes with uncertainties: python examples/client.py URL IMAGE..."""

import os
import sys

import bentoml
import numpy as np
from PIL import Image

url, *files = sys.argv[1:]
with bentoml.SyncHTTPClient(url, token=os.environ.get("ENSEMBLER_TOKEN")) as client:
    height, width, _ = client.request("GET", "/metadata").json()["manifest"]["image_shape"]
    images = np.stack([Image.open(file).convert("RGB").resize((width, height), Image.BILINEAR) for file in files])
    answer = client.predictive_uncertainty(images=images)
for file, one in zip(files, answer["predictions"], strict=True):
    print(file, one["label"], f"{max(one['probabilities']):.3f}", f"{one['predictive_entropy']:.3f} nats", sep="\t")
