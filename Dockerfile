# The program in an image, for a CPU and, with the NVIDIA container toolkit, for a GPU: the pinned torch brings CUDA.
#
#     docker build -t classifiers .
#     docker run --rm --gpus all -v ./data:/opt/classifiers/data -v ./mlruns:/opt/classifiers/mlruns classifiers \
#         experiments/task3.py
#
# For a CPU alone, some GB smaller: --build-arg PIP_EXTRA_INDEX_URL=URL, PyTorch's index of builds for CPUs
# On a base with a torch of its own, which stays: --build-arg BASE=IMAGE --build-arg REQUIREMENTS=requirements-ranges.txt
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG REQUIREMENTS=requirements.txt
ARG PIP_EXTRA_INDEX_URL
# the image is the environment, also where its Python belongs to the distribution
ENV PIP_BREAK_SYSTEM_PACKAGES=1

WORKDIR /opt/classifiers
COPY requirements.txt requirements-ranges.txt ./
RUN python -m pip install --no-cache-dir --requirement "${REQUIREMENTS}"
COPY . .

# volumes of the host belong to somebody there: --user "$(id -u)" lets the program write to them
RUN useradd --create-home --uid 10001 classifier && mkdir -p data mlruns && chown classifier data mlruns
USER 10001
VOLUME ["/opt/classifiers/data", "/opt/classifiers/mlruns"]
ENTRYPOINT ["python"]
CMD ["experiments/task3.py", "--help"]
