# `ccf-llm serve --api` on a CPU, as an ordinary user who can write nothing but /tmp.
# docs/serving.md tells how to run it.
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY modeling modeling
COPY hub_cards hub_cards
# Builds of torch without CUDA stand there alone.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN python -m venv /venv \
    && /venv/bin/python -m pip install --no-cache-dir -c constraints.txt ".[serve]"

FROM python:3.12-slim
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH \
    HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin ccf-llm
USER 10001
WORKDIR /tmp
EXPOSE 7860
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health')"]
ENTRYPOINT ["ccf-llm", "serve", "--api", "--host", "0.0.0.0"]
CMD ["/checkpoint"]
