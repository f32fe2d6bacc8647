# The program in an image, for a CPU and, with the NVIDIA container toolkit, for a GPU: the pinned torch brings CUDA.
#
#     docker build -t classifiers .
#     docker run --rm --gpus all -v ./data:/opt/classifiers/data -v ./mlruns:/opt/classifiers/mlruns classifiers \
#         experiments/task3.py
#
# On another base with Python 3.11, such as one of NVIDIA's: --build-arg BASE=IMAGE
ARG BASE=python:3.11-slim
FROM ${BASE}

WORKDIR /opt/classifiers
COPY requirements.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt
COPY . .

# volumes of the host belong to somebody there: --user "$(id -u)" lets the program write to them
RUN useradd --create-home --uid 10001 classifier && mkdir -p data mlruns && chown classifier data mlruns
USER 10001
VOLUME ["/opt/classifiers/data", "/opt/classifiers/mlruns"]
ENTRYPOINT ["python"]
CMD ["experiments/task3.py", "--help"]
